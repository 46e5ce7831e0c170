"""A chain: the finished links of a run, in order, as plain CPU tensors, and what is needed to replay them on a base.

A checkpoint stores the chain instead of weights. Replay passes each link through the same function as its knot did, so the
weights, or the factors stacked beside them, are equal bit for bit.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cola_lightning.chain.base import BaseIdentity
from cola_lightning.chain.link import Link
from cola_lightning.chain.store import layers_of, read_files, write_files
from cola_lightning.errors import UserError
from cola_lightning.writing import atomic_folder


def check_links(links: int, total: int) -> None:
    """Refuses a number of links that a chain of ``total`` links does not have."""
    if not 0 <= links <= total:
        raise UserError(f"links: must be between 0 and {total}, the length of the chain, got {links}")


@dataclass(repr=False)
class Chain:
    """Finished links in order.

    Attributes:
        links: the links, ``links[k].index == k``.
        base: identifies the base; without a fingerprint if it is unknown.

    Example:
        >>> factors = {"fc": (torch.ones(1, 3), torch.ones(2, 1))}
        >>> chain = Chain([Link(0, rank=1, alpha=1.0, start_step=0, end_step=10, factors=factors)])
        >>> chain.delta("fc").shape, chain.total_rank("fc"), chain[-1]
        (torch.Size([2, 3]), 1, Link 0: rank 1, alpha 1, 1 layers, steps 0 to 10)
    """

    links: list[Link] = field(default_factory=list)
    base: BaseIdentity = field(default_factory=BaseIdentity)

    def __len__(self) -> int:
        return len(self.links)

    def __getitem__(self, index: int) -> Link:
        """A link, by its index; -1 is the last."""
        return self.links[index]

    def __repr__(self) -> str:
        """The base's name and a line for each link; tensors are not shown."""
        lines = [f"Chain of {len(self)} link{'' if len(self) == 1 else 's'} on {self.base.name or 'an unknown base'}"]
        return "\n  ".join([*lines, *map(repr, self.links)])

    def append(self, link: Link) -> None:
        """Adds the next finished link, whose index is the chain's length."""
        assert link.index == len(self.links), "links are appended in order"
        self.links.append(link)

    def delta(self, name: str) -> Tensor:
        """The whole chain's update of one layer: the sum of its links' updates (out x in)."""
        return torch.stack([link.delta(name) for link in self.links if name in link.factors]).sum(0)

    def total_rank(self, name: str) -> int:
        """The sum of the links' ranks for one layer: an upper bound of the rank of :meth:`delta`."""
        return sum(link.factors[name][0].shape[-2] for link in self.links if name in link.factors)

    def truncate(self, n: int) -> "Chain":
        """A chain of the first n links; the links are shared, not copied.

        Raises:
            UserError: if n is negative or the chain has fewer links.
        """
        check_links(n, len(self.links))
        return Chain(self.links[:n], self.base)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that the links adapt, in the model's order."""
        return layers_of(self.links)

    def is_beginning_of(self, other: "Chain") -> bool:
        """Whether the other chain starts with this one's links: the same factors, to the bit."""
        if len(self) > len(other):
            return False
        return all(mine.is_same_update(theirs) for mine, theirs in zip(self.links, other.links, strict=False))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the chain as a folder, atomically.

        Args:
            folder: the folder, which is created.
            overwrite: replace a folder that is not empty.

        Raises:
            UserError: for a folder that is not empty, without ``overwrite``.
            DiskError: if it cannot be written.
        """
        with atomic_folder(Path(folder), overwrite=overwrite) as partial:
            write_files(self.links, self.base, partial)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a chain that :meth:`save` wrote.

        Raises:
            UserError: if the folder holds no chain, a damaged one, or one of an unknown format version.
        """
        return cls(*read_files(Path(folder)))
