"""Samplers: a training order that depends only on a seed and the epoch, and rows distributed over processes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import cast

import torch
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

BATCHES_GROUPED = 50  # batches whose rows are sorted by length together


class EpochSampler(DistributedSampler[int]):
    """Shuffles by (seed, epoch): the same order in a resumed epoch, whatever else was drawn before it.

    Lightning calls :meth:`set_epoch`, and does not replace a distributed sampler by its own. Processes take turns in the order;
    if their number does not divide its length, its rows are repeated from its first one on.

    Args:
        data: the data set; only its length is used.
        seed: seed of the order: a number, or several in a text.
        rows_done: called at the start of an epoch: the number of rows done before a resume.
        n_processes: the number of processes that share the order.
        rank: this process's rank.
        lengths: the rows' lengths, to group rows of similar length; None: purely random.
        batch_size: rows in a group of similar length, a batch of all processes together; used only with ``lengths``.

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
        order = list(islice(cycle(order), self.total_size))
        yield from order[self.rank : self.total_size : self.num_replicas][self.rows_done() :]


def group_by_length(order: list[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Reorders rows to put similar lengths into a batch: sorts only fifty batches' rows at a time, so that it stays random.

    Args:
        order: a random order of the rows.
        lengths: the rows' lengths.
        batch_size: rows in a batch.
        generator: shuffles the batches.

    Example:
        >>> group_by_length([0, 1, 2, 3], [9, 2, 8, 1], 2, torch.Generator().manual_seed(0))
        [0, 2, 1, 3]
    """
    near = BATCHES_GROUPED * batch_size
    pieces = [sorted(order[start : start + near], key=lambda row: -lengths[row]) for start in range(0, len(order), near)]
    ordered = [row for piece in pieces for row in piece]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    n_whole = len(ordered) // batch_size  # an incomplete last batch stays last
    shuffled = torch.randperm(n_whole, generator=generator).tolist()
    return [row for place in [*shuffled, *range(n_whole, len(batches))] for row in batches[place]]


class DistributedEvaluationSampler(DistributedSampler[int]):
    """Distributes rows over processes round-robin, in a given order.

    Some rows are repeated, so that all processes have equally many: with a sharded model, all must run each forward pass.

    Args:
        order: the rows' order.
        n_processes: the number of processes.
        rank: this process's rank.

    Example:
        >>> [list(DistributedEvaluationSampler([4, 2, 3], n_processes=2, rank=rank)) for rank in (0, 1)]
        [[4, 3], [2, 4]]
    """

    def __init__(self, order: Sequence[int], n_processes: int, rank: int) -> None:
        super().__init__(cast(Dataset[int], order), n_processes, rank, shuffle=False)
        self.order = order

    @override
    def __iter__(self) -> Iterator[int]:
        return (self.order[place] for place in super().__iter__())
