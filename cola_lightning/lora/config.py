"""The options of a chain's links, declared, documented and checked in one place."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

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


def is_matched(pattern: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` is for the layer of this name.

    Example:
        >>> [is_matched(pattern, "model.layers.3.q_proj") for pattern in ("q_proj", "layers.[0-3].*", "proj", "^q_proj")]
        [True, True, False, False]

    Source: ``peft.utils.other.get_pattern_key``.
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def value_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """A layer's value: that of the first pattern that matches its name, or else the default."""
    return next((value for pattern, value in (patterns or {}).items() if is_matched(pattern, name)), default)


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get links, and what the links are like.

    Args:
        target_modules: Layers that get links, by PEFT's rule: a regular expression for a layer's whole name, a list of names or
            dotted name endings, or ``all-linear`` (the default): every linear layer (Linear, Conv1D, Linear4bit, and
            the projections of MultiheadAttention) except the output embeddings and ``modules_to_save``. Convolutions (Conv1d,
            Conv2d) must be named. ``null`` trains every parameter without links: full fine-tuning, for comparisons.
        exclude_modules: Modules that get no links, like the layers inside them, by the same rule.
        layers_to_transform: Adapt only the targets in these layers, counted from 0. A layer's number is the first one after the
            name of a list, such as the 3 of ``model.layers.3.mlp.up_proj``. ``null`` adapts all.
        experts: ``true`` includes in ``all-linear`` the projections of transformers' mixtures of experts (``gate_up_proj``,
            ``up_proj``, ``down_proj``). Each expert gets its own link, which adds many parameters. ``target_modules`` may also
            name them.
        rank: Rank of the links: the first link's, and the largest that ``chain.ranks`` may contain.
        alpha: A link's update is scaled by ``alpha / rank``.
        rank_pattern: Other ranks for some layers, as ``{PATTERN: RANK}``. A pattern is a regular expression for a layer's whole
            name or a dotted ending of it; the first match counts. A link of half of ``rank`` has half of these ranks, too.
        alpha_pattern: Other alphas for some layers, by the same rule.
        use_rslora: Scale updates by ``alpha / sqrt(rank)`` instead (rank-stabilized LoRA).
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

    Source: Hu et al., "LoRA" (arXiv 2106.09685), section 4; Kalajdzievski, "A Rank Stabilization Scaling Factor for
        Fine-Tuning with LoRA" (arXiv 2312.03732); the names are those of PEFT's ``LoraConfig``.
    """

    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    experts: bool = False
    rank: int = 8
    alpha: float = 16
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    init: Init = "kaiming"
    modules_to_save: Sequence[str] = ()
    finished_links: FinishedLinks = "auto"

    def __post_init__(self) -> None:
        for name, is_valid, valid in (
            ("rank", is_rank(self.rank), "a whole number of at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "a number above 0"),
            ("rank_pattern", all(map(is_rank, (self.rank_pattern or {}).values())), "whole numbers of at least 1"),
            ("alpha_pattern", all(0 < a < math.inf for a in (self.alpha_pattern or {}).values()), "numbers above 0"),
            ("dropout", 0 <= self.dropout < 1, "a probability from 0 to below 1"),
            ("init", self.init in DRAWS, " or ".join(DRAWS)),
            ("finished_links", self.finished_links in get_args(FinishedLinks), " or ".join(get_args(FinishedLinks))),
        ):
            if not is_valid:
                raise UserError(f"model.{name} must be {valid}, got {getattr(self, name)!r}")

    def size_of(self, name: str, rank: int, alpha: float) -> tuple[int, float]:
        """The rank and the scaling that a layer has in a link of this rank and alpha."""
        rank = max(1, round(value_of(self.rank_pattern, name, self.rank) * rank / self.rank))
        alpha *= value_of(self.alpha_pattern, name, self.alpha) / self.alpha
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def should_stack(self, weights: Iterable[Tensor]) -> bool:
        """Whether the finished links of layers with these weights are stacked instead of merged."""
        if self.finished_links == "auto":
            return any(weight.dtype.itemsize < 4 for weight in weights)  # also in 4 bits
        return self.finished_links == "stack"
