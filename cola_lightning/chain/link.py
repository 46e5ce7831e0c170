"""A link: one low-rank update, from its initialisation to its knot, and its record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cola_lightning.lora.config import Factor
from cola_lightning.lora.layer import LoRALayer, low_rank_delta
from cola_lightning.seeding import derive_seed

OUTSIDE = "self."  # begins a name among a link's extras that is no name in the model, but in the Lightning module around it


@dataclass(frozen=True, repr=False)
class Link:
    """One finished link: the update ``alpha / rank * B A`` for each adapted layer.

    A layer may have a rank and a scaling of its own (``rank_pattern``, ``alpha_pattern``, ``rslora``).

    Attributes:
        index: its place in the chain, from 0.
        rank: rank of its factors.
        alpha: the update is scaled by ``alpha / rank``.
        start_step: global step (optimizer steps of the run) at its initialisation.
        end_step: global step at its knot.
        factors: A (rank x in) and B (out x rank) by the layer's name in the model; of experts, a pair for each, stacked.
        extras: what else training changes, with the values at the knot: fully trained parameters, and buffers, by name in the
            model. Names in a Lightning module, outside of its model, begin with ``self.``.
        metrics: the metrics last logged before the knot.
        own_values: rank and scaling of the layers that have others than ``rank`` and ``alpha / rank``, by name.
    """

    index: int
    rank: int
    alpha: float
    start_step: int
    end_step: int
    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    own_values: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line; tensors are not shown."""
        steps = f"steps {self.start_step} to {self.end_step}"
        metrics = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items() if name.startswith("val_"))
        return f"Link {self.index}: rank {self.rank}, alpha {self.alpha:g}, {len(self.factors)} layers, {steps}{metrics}"

    def scaling(self, name: str) -> float:
        """The factor in front of a layer's B A."""
        return self.own_values.get(name, (self.rank, self.alpha / self.rank))[1]

    def delta(self, name: str) -> Tensor:
        """The link's update of one layer: out x in."""
        return low_rank_delta(*self.factors[name], self.scaling(name))

    def is_same_update(self, other: "Link") -> bool:
        """Whether both links add the same update to the same layers, bit for bit."""
        return self.factors.keys() == other.factors.keys() and all(
            self.scaling(name) == other.scaling(name) and all(map(torch.equal, pair, other.factors[name]))
            for name, pair in self.factors.items()
        )

    def norm(self) -> float:
        """Frobenius norm of the link's update over all layers."""
        # ||BA||^2 = tr(B'B AA'): two rank x rank matrices instead of one out x in.
        squares = sum(
            self.scaling(name) ** 2 * float(((B.mH @ B) * (A @ A.mH).conj()).sum().real)
            for name, (A, B) in self.factors.items()
        )
        return math.sqrt(max(squares, 0.0))  # in this order NaN stays NaN


def is_of_experts(lora_A: Tensor) -> bool:
    """Whether a factor holds one matrix for each expert."""
    return lora_A.dim() > 2


def core_of_product(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, C and P with B A = Q C P^T, where Q and P have orthonormal columns: the SVD of the small C gives that of B A.

    Shape:
        ``lora_A``: rank x in; ``lora_B``: out x rank; Q: out x k; C: k x l; P: in x l, in float64 (complex128 for complex
        factors), where k and l are rank, or out and in where these are smaller.
    """
    wide = torch.promote_types(lora_A.dtype, torch.float64)
    q, r = torch.linalg.qr(lora_B.to(wide))
    p, s = torch.linalg.qr(lora_A.to(wide).mT)
    return q, r @ s.mT, p


def own_values(layers: Mapping[str, LoRALayer], rank: int, alpha: float) -> dict[str, tuple[int, float]]:
    """The :attr:`Link.own_values` of the layers' current link, which has this rank and alpha."""
    values = {name: (layer.rank, layer.scaling) for name, layer in layers.items()}
    return {name: value for name, value in values.items() if value != (rank, alpha / rank)}


def add_links(name: str, layer: LoRALayer, links: Sequence[Link], device: torch.device | str) -> None:
    """Applies finished links to a layer, as their knots did: merged into its weight, or stacked.

    Args:
        name: the layer's, in the links.
        layer: the layer.
        links: the links, some of which may not have this layer.
        device: where the products are computed: the training's device gives equal bits.
    """
    for link in links:
        if name in link.factors:
            lora_A, lora_B = link.factors[name]
            layer.add_finished_link(lora_A.to(device), lora_B.to(device), link.scaling(name))


def begin_link(layers: Mapping[str, LoRALayer], seed: int, index: int, rank: int, alpha: float, drawn: Factor = "A") -> None:
    """Begins a link in every layer: A drawn from (seed, link, layer name), B zero, or the other way round.

    The draw depends on nothing else: not on the global generator, the device, or the number of processes.
    """
    for name, layer in layers.items():
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, index, name))
        layer.rank, layer.alpha = layer.values_in(rank, alpha)
        layer.reset(generator, drawn)
