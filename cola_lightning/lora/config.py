"""The options of a chain's links, declared, documented and checked in one place."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cola_lightning.errors import UserError

Init = Literal["kaiming", "gaussian"]  # how A is drawn
FinishedLinks = Literal["auto", "merge", "stack"]


def kaiming_(rows: Tensor, generator: torch.Generator | None) -> None:
    """Kaiming uniform with a = sqrt(5), PEFT's default: between plus and minus 1 / sqrt(n) for rows of n values."""
    nn.init.kaiming_uniform_(rows.flatten(end_dim=-2), a=math.sqrt(5), generator=generator)


def gaussian_(rows: Tensor, generator: torch.Generator | None) -> None:
    """Normal, with a standard deviation of 1 / rank."""
    nn.init.normal_(rows, std=1 / rows.shape[-2], generator=generator)


# Functions that write the rows of a factor, from a generator.
DRAWS: dict[str, Callable[[Tensor, torch.Generator | None], None]] = {"kaiming": kaiming_, "gaussian": gaussian_}


def is_rank(value: float) -> bool:
    """Whether a link can have this rank."""
    return value >= 1 and value % 1 == 0


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get links, and what the links are like.

    Args:
        target_modules: Layers that get links, by PEFT's rule: a regular expression for a layer's whole name, a list of names or
            dotted name endings, or ``all-linear`` (the default): every linear layer (Linear, Conv1D, Linear4bit, and
            the projections of MultiheadAttention) except the output embeddings and ``modules_to_save``. Convolutions (Conv1d,
            Conv2d) must be named. ``null`` trains every parameter without links: full fine-tuning, for comparisons.
        exclude_modules: Modules that get no links, like the layers inside them, by the same rule.
        experts: ``true`` includes in ``all-linear`` the projections of transformers' mixtures of experts (``gate_up_proj``,
            ``up_proj``, ``down_proj``). Each expert gets its own link, which adds many parameters. ``target_modules`` may also
            name them.
        rank: Rank of the links: the first link's, and the largest that ``chain.ranks`` may contain.
        alpha: A link's update is scaled by ``alpha / rank``.
        dropout: Probability with which training drops an input of A.
        init: How A is initialised: ``kaiming`` (uniform, a = sqrt(5), PEFT's default) or ``gaussian`` (std 1 / rank).
        modules_to_save: Modules that are trained completely, such as a new head: a list of names or dotted name endings. Layers
            in them get no links.
        finished_links: ``merge`` adds a finished link to the frozen weights, which are stored in float32 for that. ``stack``
            never changes a weight and stores the finished links as one frozen low-rank pair per layer. ``auto`` merges into a
            base in float32, and stacks on one in half precision (its own dtype, or by ``bf16-true``) or in 4 bits.

    Raises:
        UserError: for a value that no link could have.

    Example:
        >>> LoRAConfig(["q_proj", "v_proj"], rank=4, alpha=8).rank
        4

    Source: Hu et al., "LoRA" (arXiv 2106.09685), section 4; the names are those of PEFT's ``LoraConfig``.
    """

    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    experts: bool = False
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    init: Init = "kaiming"
    modules_to_save: Sequence[str] = ()
    finished_links: FinishedLinks = "auto"

    def __post_init__(self) -> None:
        for name, is_valid, valid in (
            ("rank", is_rank(self.rank), "a whole number of at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "a number above 0"),
            ("dropout", 0 <= self.dropout < 1, "a probability from 0 to below 1"),
            ("init", self.init in DRAWS, " or ".join(DRAWS)),
            ("finished_links", self.finished_links in get_args(FinishedLinks), " or ".join(get_args(FinishedLinks))),
        ):
            if not is_valid:
                raise UserError(f"model.{name} must be {valid}, got {getattr(self, name)!r}")

    def should_stack(self, weights: Iterable[Tensor]) -> bool:
        """Whether the finished links of layers with these weights are stacked instead of merged."""
        if self.finished_links == "auto":
            return any(weight.dtype.itemsize < 4 for weight in weights)  # also in 4 bits
        return self.finished_links == "stack"
