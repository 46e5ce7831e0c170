"""Whether a stored tensor is what a merge should have made of it: to the bit, up to roundings, or not.

Element by element, a difference may be what roundings leave. And over the whole tensor, the differences may not lie along any
of the updates: in half precision an update is often smaller than a rounding, so elements alone do not show that it is missing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from cola_lightning.files.plan import Planned
from cola_lightning.files.stored import StoredTensor, chunks, rows_of

Kind = Literal["same bits", "rounding", "undecided", "wrong"]
STANDARD_ERRORS, SMALLEST = 6.0, 0.005  # how far an update's share may be from 1


@dataclass
class Finding:
    """A stored tensor, compared with what it should be.

    Attributes:
        tensor: its name.
        kind: ``same bits``, as W + B A in float32, rounded once; ``rounding``: it differs by what roundings change, also as
            PEFT makes them: of W, of each update, and of each sum; ``undecided``: it is one of these, but an update is so small
            that roundings hide whether it is there; or ``wrong``.
        cause: if it is wrong, what most likely happened.
        dtype: in which it is stored.
        n_updates: how many updates it should contain.
        n: its elements.
        n_different: elements that differ.
        n_beyond: elements that differ by more than roundings.
        place: the first of them.
        factors: for each update, how much of it is in the tensor: 1 is right. Empty if its bits are those of the merge.
        too_small: the places of the updates that roundings hide.
    """

    tensor: str
    kind: Kind = "same bits"
    cause: str = ""
    dtype: str = ""
    n_updates: int = 0
    n: int = 0
    n_different: int = 0
    n_beyond: int = 0
    place: tuple[int, ...] = ()
    factors: list[float] = field(default_factory=list)
    too_small: list[int] = field(default_factory=list)


def compare(name: str, planned: Planned, merged: StoredTensor | Tensor) -> Finding:
    """Compares a stored tensor with a planned one.

    Args:
        name: the tensor's.
        planned: what it should be.
        merged: what it is.
    """
    dtype, n_updates = merged.dtype, len(planned.updates)
    result = Finding(name, dtype=str(dtype).removeprefix("torch."), n_updates=n_updates, n=prod(merged.shape))
    if planned.start.shape != merged.shape or (planned.updates and not dtype.is_floating_point):
        return replace(result, kind="wrong")
    along, squares, rounding = torch.zeros(len(planned.updates), dtype=torch.float64), 0.0, 0.0
    for first, last in chunks(merged.shape):
        stored = rows_of(merged, first, last)
        nearest, differs = _nearest(planned, first, last, stored)
        if planned.updates:
            rounding += (torch.finfo(dtype).eps * float(stored.to(planned.compute_dtype).norm())) ** 2 / 12
        if not differs.any():
            continue
        beyond = torch.ones(int(differs.count_nonzero()), dtype=torch.bool)
        if planned.updates:
            expected = nearest[differs].to(planned.compute_dtype)
            difference = stored[differs].to(expected.dtype) - expected
            allowed = _allowed(planned, first, last, dtype)[differs] + torch.finfo(dtype).eps * expected.abs()
            beyond = ~(difference.abs() <= allowed)  # also NaN
            difference = difference.nan_to_num()
            squares += float(difference @ difference)
            for index, update in enumerate(planned.updates):
                along[index] += float(update.rows(first, last).view(stored.shape)[differs] @ difference)
        if beyond.any() and not result.n_beyond:
            place = differs.nonzero()[beyond][0].tolist()
            result.place = (first + place[0], *place[1:]) if place else ()
        result.n_different += len(beyond)
        result.n_beyond += int(beyond.count_nonzero())
    if planned.updates:
        _judge(result, planned, along, squares, rounding)
    elif result.n_different:
        result.kind = "wrong"
    return result


def _nearest(planned: Planned, first: int, last: int, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Of what tools make of some rows, that which differs in the fewest elements from the stored rows, and in which."""
    ways, bits = list[tuple[Tensor, Tensor]](), getattr(torch, f"int{8 * stored.dtype.itemsize}")
    for way in _roundings(planned, first, last, stored.dtype):
        ways.append((way, way.view(bits) != stored.view(bits)))
        if not planned.updates or not ways[-1][1].any():
            return ways[-1]
    return min(ways, key=lambda way: int(way[1].count_nonzero()))


def _roundings(planned: Planned, first: int, last: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """What tools make of some rows: all is added and rounded once; or each sum is rounded; or each update, too."""
    yield planned.merged(first, last, dtype)
    for rounds_updates in (False, True):
        rows = rows_of(planned.start, first, last).to(dtype)
        for update in planned.updates:
            part = update.rows(first, last).view(rows.shape)
            rows = ((part.to(dtype).to(part.dtype) if rounds_updates else part) + rows.to(part.dtype)).to(dtype)
        yield rows


def _allowed(planned: Planned, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """What the roundings of updates may change, in this dtype and in float32, by element."""
    precision, rank = torch.finfo(dtype), sum(update.right.shape[-2] for update in planned.updates)
    of_products = precision.eps + 4 * math.sqrt(rank) * torch.finfo(torch.float32).eps
    sizes = torch.stack([update.sizes(first, last) for update in planned.updates]).sum(0)
    return (of_products * sizes + precision.smallest_normal * precision.eps).view(last - first, *planned.start.shape[1:])


def _judge(result: Finding, planned: Planned, along: Tensor, squares: float, rounding: float) -> None:
    """Sets the kind of a finding.

    Args:
        result: the finding.
        planned: what the tensor should be.
        along: the products of the differences with the updates.
        squares: the sum of the squared differences.
        rounding: what this sum is if the tensor is rounded once.
    """
    gram = torch.tensor([[float(one.product(other)) for other in planned.updates] for one in planned.updates]).double()
    sizes = gram.diagonal().clamp(min=0).sqrt()
    sizes = sizes.where(sizes > 0, 1).outer(sizes.where(sizes > 0, 1))  # else a small update is lost beside a large one
    inverse = torch.linalg.pinv(gram / sizes) / sizes
    variances = inverse.diagonal().clamp(min=0) / result.n
    if result.n_different:
        shares, errors = inverse @ along, (squares * variances).sqrt()
        is_right = not result.n_beyond and bool((shares.abs() <= STANDARD_ERRORS * errors + SMALLEST).all())
        result.kind, result.factors = "rounding" if is_right else "wrong", (1 + shares).tolist()
    if result.kind != "wrong":
        result.too_small = (STANDARD_ERRORS * (rounding * variances).sqrt() >= 1).nonzero().flatten().tolist()
        result.kind = "undecided" if result.too_small else result.kind
