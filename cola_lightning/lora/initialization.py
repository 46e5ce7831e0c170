"""Random initialization of the factor of a link that does not begin at zero."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["kaiming", "gaussian", "orthogonal"]

# The rows of a factor, to be written; their generator; and the same factor of the links before, the first link's first.
Draw = Callable[[Tensor, torch.Generator | None, Sequence[Tensor]], None]


def kaiming_(rows: Tensor, generator: torch.Generator | None, before: Sequence[Tensor] = ()) -> None:
    """Kaiming uniform with a = sqrt(5), PEFT's default: between plus and minus 1 / sqrt(n) for rows of n values."""
    nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)


def gaussian_(rows: Tensor, generator: torch.Generator | None, before: Sequence[Tensor] = ()) -> None:
    """Normal, with a standard deviation of 1 / rank."""
    nn.init.normal_(rows, std=1 / len(rows), generator=generator)


@torch.no_grad()
def orthogonal_(rows: Tensor, generator: torch.Generator | None, before: Sequence[Tensor] = ()) -> None:
    """Rows that are orthogonal to each other and to those of the links before, as long as Kaiming's are: 1 / sqrt(3).

    A space of n dimensions has at most n such rows. The link that would need more starts over, regardless of earlier links;
    those after it are orthogonal to it and to those since.

    Args:
        rows: to be written, rank x n.
        generator: of the directions, which are uniform among the remaining ones.
        before: the earlier links' trained factors, each some rank x n.

    Example:
        >>> first, second = torch.zeros(1, 4), torch.zeros(2, 4)
        >>> orthogonal_(first, torch.Generator().manual_seed(0))
        >>> orthogonal_(second, torch.Generator().manual_seed(1), [first])
        >>> (second @ torch.cat([first, second]).T).mul(3).abs().round(decimals=5)
        tensor([[0., 1., 0.],
                [0., 0., 1.]])

    Source: after BoostLoRA (arXiv 2604.27308), whose abstract says that each round has a subspace orthogonal to those before,
        by a basis of singular vectors through which it rotates; of random directions it is our reading.
    """
    rank, n = rows.shape
    start = used = 0
    for place, size in enumerate([*map(len, before), rank]):
        if used + size > n:
            start, used = place, 0
        used += size
    drawn = torch.empty(rank, n, dtype=torch.float32, device="cpu").normal_(generator=generator).double()
    if start < len(before):
        basis, _ = torch.linalg.qr(torch.cat([factor.double() for factor in before[start:]]).T)
        for _ in range(2):  # the second pass removes what rounding leaves
            drawn -= drawn @ basis @ basis.T
    directions, lengths = torch.linalg.qr(drawn.T)
    rows.copy_((directions * lengths.diagonal().sign()).T / math.sqrt(3))


DRAWS: dict[str, Draw] = {"kaiming": kaiming_, "gaussian": gaussian_, "orthogonal": orthogonal_}
