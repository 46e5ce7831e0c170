"""What data modules share: a training order that depends on a seed and the epoch alone, and goes on where a run stopped."""

import hashlib
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Sampler


class EpochSampler(Sampler[int]):
    """Shuffles by (seed, epoch): the same order in a resumed epoch, whatever else was drawn before it.

    Lightning calls :meth:`set_epoch`. Under DDP, it puts its own distributed sampler in this one's place.

    Args:
        data: what is sampled; its length matters.
        seed: of the order.
        rows_done: asked when an epoch's first row is: how many rows a resumed epoch has behind it. It needs a loader without
            workers, which would ask before the run knows.

    Example:
        >>> sampler = EpochSampler(range(4), seed=0)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(sampler) == sorted(first) == [0, 1, 2, 3]
        True
    """

    def __init__(self, data: Sized, seed: int, rows_done: Callable[[], int] = lambda: 0) -> None:
        self.data, self.seed, self.rows_done, self.epoch = data, seed, rows_done, 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()  # the generator uses 32 bits of its seed
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        yield from torch.randperm(len(self.data), generator=generator)[self.rows_done() :].tolist()

    def __len__(self) -> int:
        return len(self.data)


def batches_done(trainer: Trainer | None) -> int:
    """Training batches of the current epoch that a resumed run has behind it; 0 in a run that is not resumed."""
    if trainer is None or not trainer.training:
        return 0
    return (trainer.fit_loop.batch_idx + 1) % int(trainer.num_training_batches)  # all of them: the next epoch begins


class EpochLoader(DataLoader[Any]):
    """A loader over an :class:`EpochSampler`. It has no state: the order is a function, the place in it is the trainer's."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing; that there is such a method tells Lightning that the loader goes on where a run stopped."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""
