"""Whether a stored tensor is what a merge should have made of it: to the bit, up to roundings, or not.

Element by element, a difference may be what roundings leave. And over the whole tensor, the differences may not lie along any
of the updates: in half precision an update is often smaller than a rounding, so elements alone do not show that it is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from cola_lightning.files.plan import Planned
from cola_lightning.files.stored import StoredTensor, chunks

Kind = Literal["same bits", "rounding", "wrong"]
WAYS = ("once", "each", "each twice")  # a rounding of the sum, of each sum, or of each update and each sum
STANDARD_ERRORS, SMALLEST = 6.0, 0.005  # how far an update's share may be from 1


@dataclass
class Sums:
    """What is summed over a tensor for one way to round: how a merged tensor differs from what it gives.

    Attributes:
        n_beyond: elements that differ by more than roundings.
        first: the first of them.
        largest: the largest difference.
        squares: the sum of the squared differences.
        along: their products with each update.
    """

    along: Tensor
    n_beyond: int = 0
    first: tuple[int, ...] = ()
    largest: float = 0.0
    squares: float = 0.0


@dataclass
class Comparison:
    """A stored tensor, compared with what it should be.

    Attributes:
        kind: ``same bits``, as W + B A in float32, rounded once; ``rounding``: it differs by what roundings change, also as
            PEFT makes them: of W, of each update, and of each sum; or ``wrong``.
        n_different: elements that differ.
        n: elements.
        factors: for each update, how much of it is in the tensor: 1 is right.
        sums: those of the way to round that is nearest.
    """

    kind: Kind
    n_different: int
    n: int
    factors: list[float] = field(default_factory=list)
    sums: Sums | None = None


def compare(planned: Planned, merged: StoredTensor, through: torch.dtype | None = None) -> Comparison:
    """Compares a stored tensor with a planned one.

    Args:
        planned: what it should be.
        merged: what it is.
        through: a dtype in which it was merged before it was stored in a wider one; None: its own.
    """
    updates = planned.updates
    if tuple(planned.shape) != merged.shape:
        return Comparison("wrong", prod(merged.shape), prod(merged.shape))
    dtype, wide, n_different = through or merged.dtype, planned.wide, 0
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    ways = {name: Sums(gram.new_zeros(len(updates))) for name in WAYS}
    for first, last in chunks(planned.shape):
        rows, stored = planned.rows(first, last), merged.rows(first, last)
        if not (rows.is_floating_point() and stored.is_floating_point()):
            n_different += int((rows != stored).sum())
            ways["once"].n_beyond = n_different
            continue
        rows = rows.to(wide)
        parts = [update.rows(first, last).reshape(rows.shape) for update in updates]
        once = torch.stack([rows, *parts]).sum(0).to(dtype) if parts else rows.to(dtype)
        if torch.equal(_bits(once.to(stored.dtype)), _bits(stored)):
            continue
        n_different += int((once.to(stored.dtype) != stored).sum())
        each = twice = rows.to(dtype)
        for part in parts:
            each, twice = (each.to(wide) + part).to(dtype), (twice.to(wide) + part.to(dtype).to(wide)).to(dtype)
        size = sum((update.sizes(first, last).reshape(rows.shape) for update in updates), torch.zeros(()))
        rank = sum(update.right.shape[-2] for update in updates)
        step, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        allowed = (step + 4 * rank**0.5 * torch.finfo(torch.float32).eps) * size + smallest
        for sums, way in zip(ways.values(), (once, each, twice), strict=True):
            _add(sums, way.to(wide), stored.to(wide), allowed + step * way.to(wide).abs(), parts, first)
        gram += torch.tensor([[_dot(a, b) for b in parts] for a in parts], dtype=torch.float64).reshape(gram.shape)
    return _judged(ways, gram, n_different, prod(planned.shape))


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.reshape(-1) @ b.reshape(-1))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(-1).view(torch.uint8)


def _add(sums: Sums, expected: Tensor, stored: Tensor, allowed: Tensor, parts: Sequence[Tensor], first: int) -> None:
    difference = (stored - expected).masked_fill(stored == expected, 0)
    beyond = ~(difference.abs() <= allowed)  # also for NaN
    if not sums.n_beyond and beyond.any():
        place = beyond.nonzero()[0].tolist()
        sums.first = (first + place[0], *place[1:]) if place else ()
    sums.n_beyond += int(beyond.sum())
    difference = difference.nan_to_num()
    sums.largest = max(sums.largest, float(difference.abs().max()))
    sums.squares += _dot(difference, difference)
    sums.along += torch.tensor([_dot(difference, part) for part in parts], dtype=torch.float64)


def _judged(ways: dict[str, Sums], gram: Tensor, n_different: int, n: int) -> Comparison:
    """The kindest judgement that the sums allow."""
    if not n_different and not any(sums.n_beyond for sums in ways.values()):
        return Comparison("same bits", 0, n)
    inverse = torch.linalg.pinv(gram)
    for sums in ways.values():
        shares = inverse @ sums.along
        errors = (sums.squares / n * inverse.diagonal().clamp(min=0)).sqrt()
        if not sums.n_beyond and bool((shares.abs() <= STANDARD_ERRORS * errors + SMALLEST).all()):
            return Comparison("rounding", n_different, n)
    nearest = min(ways.values(), key=lambda sums: (sums.n_beyond, sums.squares))
    return Comparison("wrong", n_different, n, (1 + inverse @ nearest.along).tolist(), nearest)
