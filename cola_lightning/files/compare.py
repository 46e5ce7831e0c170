"""Whether a stored tensor is what a merge should have made of it: to the bit, up to roundings, or not.

Element by element, a difference may be what roundings leave. And over the whole tensor, the differences may not lie along any
of the updates: in half precision an update is often smaller than a rounding, so elements alone do not show that it is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from cola_lightning.files.plan import Planned
from cola_lightning.files.stored import StoredTensor, chunks, rows_of

Kind = Literal["same bits", "rounding", "wrong"]
STANDARD_ERRORS, SMALLEST = 6.0, 0.005  # how far an update's share may be from 1


@dataclass
class Finding:
    """A stored tensor, compared with what it should be.

    Attributes:
        tensor: its name.
        kind: ``same bits``, as W + B A in float32, rounded once; ``rounding``: it differs by what roundings change, also as
            PEFT makes them: of W, of each update, and of each sum; or ``wrong``.
        cause: if it is wrong, what most likely happened.
        n: its elements.
        n_different: elements that differ.
        n_beyond: elements that differ by more than roundings.
        place: the first of them.
        factors: for each update, how much of it is in the tensor: 1 is right.
    """

    tensor: str
    kind: Kind = "same bits"
    cause: str = ""
    n: int = 0
    n_different: int = 0
    n_beyond: int = 0
    place: tuple[int, ...] = ()
    factors: list[float] = field(default_factory=list)


def compare(name: str, planned: Planned, merged: StoredTensor | Tensor, through: torch.dtype | None = None) -> Finding:
    """Compares a stored tensor with a planned one.

    Args:
        name: the tensor's.
        planned: what it should be.
        merged: what it is.
        through: a dtype in which it was merged before it was stored in a wider one; None: its own.
    """
    result = Finding(name, n=prod(merged.shape))
    if planned.start.shape != merged.shape:
        result.kind = "wrong"
        return result
    dtype, along, squares = through or merged.dtype, torch.zeros(len(planned.updates), dtype=torch.float64), 0.0
    for first, last in chunks(merged.shape):
        stored, fewest, nearest, differs = rows_of(merged, first, last), result.n + 1, torch.empty(0), torch.empty(0)
        if through is not None and not torch.equal(stored.to(through).to(stored.dtype), stored):
            result.kind = "wrong"
            return result
        for way in _roundings(planned, first, last, dtype):
            other = _bits(way.to(stored.dtype)) != _bits(stored)
            if (n_other := int(other.count_nonzero())) < fewest:
                fewest, nearest, differs = n_other, way, other.view(stored.shape)
            if not n_other or not way.is_floating_point():
                break
        if not fewest:
            continue
        result.n_different += fewest
        expected = nearest[differs].to(planned.compute_dtype)
        difference = stored[differs].to(expected.dtype) - expected
        allowed = _allowed(planned, first, last, dtype)[differs] + _step(dtype) * expected.abs()
        beyond = ~(difference.abs() <= allowed) if planned.updates else torch.ones_like(difference, dtype=torch.bool)
        if beyond.any() and not result.n_beyond:  # also NaN
            place = differs.nonzero()[beyond][0].tolist()
            result.place = (first + place[0], *place[1:]) if place else ()
        result.n_beyond += int(beyond.count_nonzero())
        difference = difference.nan_to_num()
        squares += float(difference @ difference)
        for index, update in enumerate(planned.updates):
            along[index] += float(update.rows(first, last).view(stored.shape)[differs] @ difference)
    _judge(result, planned, along, squares)
    return result


def _roundings(planned: Planned, first: int, last: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """What tools make of some rows: all is added and rounded once; or each sum is rounded; or each update, too."""
    yield planned.merged(first, last, dtype)
    for rounds_updates in (False, True):
        rows = rows_of(planned.start, first, last).to(dtype)
        for update in planned.updates:
            part = update.rows(first, last).view(rows.shape)
            rows = ((part.to(dtype).to(part.dtype) if rounds_updates else part) + rows.to(part.dtype)).to(dtype)
        yield rows


def _bits(values: Tensor) -> Tensor:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return values.contiguous().view(kind)


def _step(dtype: torch.dtype) -> float:
    """The largest distance of two neighbours, relative to them; 0 for integers."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _allowed(planned: Planned, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """What the roundings of updates may change, in this dtype and in float32, by element."""
    shape = (last - first, *planned.start.shape[1:]) if planned.start.shape else ()
    smallest = torch.finfo(dtype).smallest_normal * _step(dtype) if dtype.is_floating_point else 0.0
    allowed = torch.full(shape, smallest, dtype=planned.compute_dtype if planned.dtype.is_floating_point else torch.float64)
    rank = sum(update.right.shape[-2] for update in planned.updates)
    for update in planned.updates:
        allowed += (_step(dtype) + 4 * rank**0.5 * _step(torch.float32)) * update.sizes(first, last).view(shape)
    return allowed


def _judge(result: Finding, planned: Planned, along: Tensor, squares: float) -> None:
    """Sets the kind of a finding, from the products of the differences with the updates, and the sum of their squares."""
    if not result.n_different:
        return
    gram = torch.tensor([[float(one.product(other)) for other in planned.updates] for one in planned.updates])
    inverse = torch.linalg.pinv(gram.double().reshape(len(along), len(along)))
    shares, errors = inverse @ along, (squares / result.n * inverse.diagonal().clamp(min=0)).sqrt()
    is_right = not result.n_beyond and bool((shares.abs() <= STANDARD_ERRORS * errors + SMALLEST).all())
    result.kind, result.factors = "rounding" if is_right else "wrong", (1 + shares).tolist()
