"""In which order rows come: a training order that depends on a seed and the epoch alone, and rows dealt out to processes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import cast

import torch
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

BATCHES_GROUPED = 50  # batches whose rows are sorted by length together


class EpochSampler(DistributedSampler[int]):
    """Shuffles by (seed, epoch): the same order in a resumed epoch, whatever else was drawn before it.

    Lightning calls :meth:`set_epoch`, and puts no sampler of its own in the place of a distributed one. Processes take turns in
    the order; where they do not divide it, its first rows come again at its end.

    Args:
        data: what is sampled; its length matters.
        seed: of the order: a number, or several in a text.
        rows_done: asked when an epoch's first row is: how many rows a resumed epoch has behind it.
        n_processes: how many share the order.
        rank: which of them this is.
        lengths: of the rows, to go through rows of like length together; None: by chance alone.
        batch_size: rows that are like, in a batch of all processes together; they matter with ``lengths`` alone.

    Example:
        >>> sampler = EpochSampler(range(4), seed=0)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(sampler) == sorted(first) == [0, 1, 2, 3]
        True
    """

    def __init__(
        self,
        data: Sized,
        seed: int | str,
        rows_done: Callable[[], int] = lambda: 0,
        n_processes: int = 1,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        super().__init__(cast(Dataset[int], data), n_processes, rank)
        self.order_seed, self.rows_done = seed, rows_done
        self.lengths, self.group_size = lengths, batch_size

    @override
    def __iter__(self) -> Iterator[int]:
        digest = hashlib.sha256(f"{self.order_seed} {self.epoch}".encode()).digest()  # the generator uses 32 bits of its seed
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        order = torch.randperm(len(cast(Sized, self.dataset)), generator=generator).tolist()
        if self.lengths is not None:
            order = group_by_length(order, self.lengths, self.group_size, generator)
        order += order[: self.total_size - len(order)]
        yield from order[self.rank : self.total_size : self.num_replicas][self.rows_done() :]


def group_by_length(order: list[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Another order, in which each batch has rows of like length: of some fifty batches' rows at a time, so that chance stays.

    Args:
        order: of the rows, by chance.
        lengths: of the rows.
        batch_size: rows in a batch.
        generator: which shuffles the batches.

    Example:
        >>> group_by_length([0, 1, 2, 3], [9, 2, 8, 1], 2, torch.Generator().manual_seed(0))
        [0, 2, 1, 3]
    """
    near = BATCHES_GROUPED * batch_size
    pieces = [sorted(order[start : start + near], key=lambda row: -lengths[row]) for start in range(0, len(order), near)]
    ordered = [row for piece in pieces for row in piece]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    n_whole = len(ordered) // batch_size  # a last one that is not stays the last
    shuffled = torch.randperm(n_whole, generator=generator).tolist()
    return [row for place in [*shuffled, *range(n_whole, len(batches))] for row in batches[place]]


class DealingSampler(DistributedSampler[int]):
    """Deals rows out to processes, one after another in an order.

    Some are dealt twice, so that each process has as many: where a model is sharded, all must compute together.

    Args:
        order: of the rows.
        n_processes: how many share them.
        rank: which of them this is.

    Example:
        >>> [list(DealingSampler([4, 2, 3], n_processes=2, rank=rank)) for rank in (0, 1)]
        [[4, 3], [2, 4]]
    """

    def __init__(self, order: Sequence[int], n_processes: int, rank: int) -> None:
        super().__init__(cast(Dataset[int], order), n_processes, rank, shuffle=False)
        self.order = order

    @override
    def __iter__(self) -> Iterator[int]:
        return (self.order[place] for place in super().__iter__())
