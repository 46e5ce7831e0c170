"""Random initialization of the factor of a link that does not begin at zero."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["kaiming", "gaussian"]

Draw = Callable[[Tensor, torch.Generator | None], None]  # writes the rows of a factor, from a generator


def kaiming_(rows: Tensor, generator: torch.Generator | None) -> None:
    """Kaiming uniform with a = sqrt(5), PEFT's default: between plus and minus 1 / sqrt(n) for rows of n values."""
    nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)


def gaussian_(rows: Tensor, generator: torch.Generator | None) -> None:
    """Normal, with a standard deviation of 1 / rank."""
    nn.init.normal_(rows, std=1 / len(rows), generator=generator)


DRAWS: dict[str, Draw] = {"kaiming": kaiming_, "gaussian": gaussian_}
