"""A chain: the finished links of a run, in order, as plain CPU tensors, and what is needed to put them into a base again.

The chain is what a checkpoint stores instead of weights. Replaying it runs link by link through the very function that the
knots used, so the weights, or what is stacked beside them, come out equal to the last bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cola_lightning import distributed
from cola_lightning.errors import UserError
from cola_lightning.layers import LoRALayer, low_rank_delta
from cola_lightning.seeding import derive_seed


@dataclass(frozen=True)
class Link:
    """One finished link: the update ``alpha / rank * B A`` for each adapted layer.

    Attributes:
        index: its place in the chain, from 0.
        rank: rank of its factors.
        alpha: the update is scaled by ``alpha / rank``.
        start_step: global step (optimizer steps of the run) at its initialisation.
        end_step: global step at its knot.
        factors: A (rank x in) and B (out x rank) by the layer's name in the model.
        extras: what else training changes in the model, as it was at the knot: parameters that are trained whole, and buffers.
        metrics: what was logged last before the knot.
        outside: the same of the Lightning module outside of its model, by name in the module.
    """

    index: int
    rank: int
    alpha: float
    start_step: int
    end_step: int
    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    outside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """The factor ``alpha / rank`` in front of B A."""
        return self.alpha / self.rank

    def delta(self, name: str) -> Tensor:
        """The link's update of one layer: out x in."""
        return low_rank_delta(*self.factors[name], self.scaling)

    def is_same_update(self, other: "Link") -> bool:
        """Whether both links add the same to the same layers, to the bit."""
        if self.scaling != other.scaling or self.factors.keys() != other.factors.keys():
            return False
        pairs = [
            (mine, theirs)
            for name, pair in self.factors.items()
            for mine, theirs in zip(pair, other.factors[name], strict=True)
        ]
        return all(mine is theirs or torch.equal(mine, theirs) for mine, theirs in pairs)

    def norm(self) -> float:
        """Frobenius norm of the link's update over all layers."""
        # ||BA||^2 = tr(B'B AA'): two rank x rank matrices instead of one out x in.
        squares = sum(float(((B.T @ B) * (A @ A.T)).sum()) for A, B in self.factors.values())
        return abs(self.scaling) * math.sqrt(max(squares, 0.0))  # in this order NaN stays NaN


@dataclass
class Chain:
    """Finished links in order.

    Attributes:
        links: the links, ``links[k].index == k``.
        base: what the base was: ``name``, ``fingerprint``, ``dtypes`` and ``weight_norms``, see
            :func:`~cola_lightning.fingerprint.describe_base`; empty where that is not known.

    Example:
        >>> factors = {"fc": (torch.ones(1, 3), torch.ones(2, 1))}
        >>> chain = Chain([Link(0, rank=1, alpha=1.0, start_step=0, end_step=10, factors=factors)])
        >>> chain.delta("fc").shape, chain.total_rank("fc")
        (torch.Size([2, 3]), 1)
    """

    links: list[Link] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.links)

    def append(self, link: Link) -> None:
        """Adds the next finished link.

        Raises:
            ValueError: if its index is not the next one.
        """
        if link.index != len(self.links):
            raise ValueError(f"expected link {len(self.links)}, received link {link.index}")
        self.links.append(link)

    def delta(self, name: str) -> Tensor:
        """The whole chain's update of one layer: the sum of its links' (out x in)."""
        if not self.links:
            raise ValueError("expected a chain with links, received an empty one")
        return torch.stack([link.delta(name) for link in self.links if name in link.factors]).sum(0)

    def total_rank(self, name: str) -> int:
        """The sum of the links' ranks for one layer: an upper bound of the rank of :meth:`delta`."""
        return sum(link.rank for link in self.links if name in link.factors)

    def truncate(self, n: int) -> "Chain":
        """A chain of the first n links; the links are shared, not copied.

        Raises:
            UserError: if the chain is shorter.
        """
        if not 0 <= n <= len(self.links):
            raise UserError(f"links: expected 0 to {len(self.links)}, the length of the chain, received {n}")
        return Chain(self.links[:n], self.base)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that the links adapt, in the model's order."""
        return list(dict.fromkeys(name for link in self.links for name in link.factors))

    def is_beginning_of(self, other: "Chain") -> bool:
        """Whether the other chain starts with this one's links: the same factors, to the bit."""
        if len(self) > len(other):
            return False
        return all(mine.is_same_update(theirs) for mine, theirs in zip(self.links, other.links, strict=False))

    def replay(self, layers: Mapping[str, LoRALayer], device: torch.device | str = "cpu", start: int = 0) -> None:
        """Has the layers take up the links from ``start`` on, as at their knots: merged into the weights, or stacked.

        Args:
            layers: the adapted layers by name, or some of them.
            device: where the products are computed: the device of the training, for equal bits.
            start: the first link that the layers do not hold yet.
        """
        for link in self.links[start:]:
            for name, layer in layers.items():
                if name in link.factors:
                    lora_A, lora_B = link.factors[name]
                    layer.absorb(lora_A.to(device), lora_B.to(device), link.scaling)

    def state_dict(self) -> dict[str, Any]:
        """The chain as plain types and tensors, for a checkpoint that ``torch.load(weights_only=True)`` reads."""
        return {"links": [vars(link) for link in self.links], "base": self.base}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The chain of a :meth:`state_dict`."""
        return cls([Link(**link) for link in state["links"]], dict(state["base"]))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the chain as a folder, whole or not at all.

        Args:
            folder: where; it is made.
            overwrite: replace a folder that is not empty.

        Raises:
            UserError: for a folder that is not empty, without ``overwrite``.
            DiskError: if it cannot be written.
        """
        from cola_lightning.chain_folder import write_folder

        write_folder(self, Path(folder), overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a chain that :meth:`save` wrote.

        Raises:
            UserError: for a folder that is no chain, or a damaged one, or one of a newer version.
        """
        from cola_lightning.chain_folder import read_folder

        read = read_folder(Path(folder))
        return cls(read.links, read.base)


def finish_link(layers: Mapping[str, LoRALayer], **facts: Any) -> Link:
    """Records the live link of the layers as a finished one; the layers stay as they are.

    Args:
        layers: the adapted layers by name; they share rank and alpha.
        **facts: ``index``, ``start_step``, ``end_step`` and, where there are any, ``extras``, ``metrics`` and ``outside``.
    """
    first = next(iter(layers.values()))
    factors = {}
    for name, layer in layers.items():
        lora_A, lora_B = layer.factors
        factors[name] = distributed.gather(lora_A), distributed.gather(lora_B)
    return Link(rank=first.rank, alpha=first.alpha, factors=factors, **facts)


def begin_link(layers: Mapping[str, LoRALayer], seed: int, index: int, rank: int, alpha: float) -> None:
    """Begins a link in every layer: A drawn from (seed, link, layer name), B zero.

    The draw depends on nothing else: not on the global generator, the device, or the number of processes.
    """
    for name, layer in layers.items():
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, index, name))
        layer.reset(generator, rank=rank, alpha=alpha)
