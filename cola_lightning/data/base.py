"""What data modules share: a training order that depends on a seed and the epoch alone, and goes on where a run stopped."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from cola_lightning.errors import UserError

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


def batches_done(trainer: Trainer | None) -> int:
    """Training batches of the current epoch that a resumed run has behind it; 0 in a run that is not resumed."""
    if trainer is None or not trainer.training:
        return 0
    return (trainer.fit_loop.batch_idx + 1) % int(trainer.num_training_batches)  # all of them: the next epoch begins


class EpochLoader(DataLoader[Any]):
    """A loader over an :class:`EpochSampler`. It has no state: the order is a function, the place in it is the trainer's."""

    @override
    def __iter__(self) -> Any:
        # A generator: workers would ask for the epoch's first rows at once, before the run knows its epoch and its place in it.
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing; that there is such a method tells Lightning that the loader goes on where a run stopped."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def check_sizes(**sizes: int | None) -> None:
    """Refuses a number of rows below 1; each is named by its field, and None where it is not given."""
    for field, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"data.{field}: expected a whole number of at least 1, received {size}")


class EpochDataModule(LightningDataModule, ABC):
    """Loaders over the parts of a data set, which a subclass' ``setup`` makes: sequences of rows.

    Attributes:
        train: rows of training.
        val: rows of validation.
        test: rows of test, and of predict.
        length_grouped: whether a training batch has rows of like length.

    Args:
        batch_size: rows in a training batch.
        eval_batch_size: rows in a batch of validation, test and predict; None: as in training.
        split_seed: which rows are in which part.
        num_workers: processes that prepare batches beside the training; 0: none.

    Raises:
        UserError: for values that cannot be right.
    """

    train: Any
    val: Any
    test: Any
    length_grouped = False

    def __init__(self, batch_size: int, eval_batch_size: int | None = None, split_seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        check_sizes(batch_size=batch_size, eval_batch_size=eval_batch_size)
        if num_workers < 0:
            raise UserError(f"data.num_workers: expected a whole number of at least 0, received {num_workers}")
        if not 0 <= split_seed < 2**32:
            raise UserError(f"data.split_seed: expected a whole number from 0 to 2**32 - 1, received {split_seed}")
        self.batch_size, self.eval_batch_size, self.split_seed = batch_size, eval_batch_size or batch_size, split_seed
        self.num_workers = num_workers
        self._order_of_checkpoint: dict[str, Any] = {}

    @abstractmethod
    @override
    def setup(self, stage: str) -> None:
        """Makes the parts that the stage needs: ``fit``, ``validate``, ``test`` or ``predict``."""

    @property
    def order_seed(self) -> int | str:
        """What the order of training follows from, with the epoch: the split's seed and the module's."""
        return f"{self.split_seed} {getattr(self.trainer and self.trainer.lightning_module, 'seed', None)}"

    def length(self, row: Any) -> int:
        """How long a row is; evaluation goes from the longest to the shortest, so that little is padding."""
        return 0

    def collate(self, rows: list[Any]) -> Any:
        """Makes a batch of rows."""
        return torch.utils.data.default_collate(rows)

    @override
    def train_dataloader(self) -> EpochLoader:
        def rows_done() -> int:
            if (done := batches_done(self.trainer)) > 0:
                self._check_same_order()
            return done * self.batch_size

        n_processes, rank = self._processes
        lengths = [self.length(row) for row in self.train] if self.length_grouped else None
        group = self.batch_size * n_processes
        sampler = EpochSampler(self.train, self.order_seed, rows_done, n_processes, rank, lengths, group)
        return self._loader(self.train, self.batch_size, sampler)

    @property
    def _processes(self) -> tuple[int, int]:
        """How many processes share the rows, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @override
    def val_dataloader(self) -> EpochLoader:
        return self._evaluation_loader(self.val)

    @override
    def test_dataloader(self) -> EpochLoader:
        return self._evaluation_loader(self.test)

    @override
    def predict_dataloader(self) -> EpochLoader:
        # Where predictions are returned, they come in the data's order; where they are only written, with their places.
        is_returned = self.trainer is None or self.trainer.predict_loop.return_predictions
        order = list(range(len(self.test))) if is_returned else self._by_length(self.test)
        n_processes, rank = self._processes
        sampler: Any = DealingSampler(order, n_processes, rank) if n_processes > 1 else order
        return self._loader(self.test, self.eval_batch_size, sampler)

    def _evaluation_loader(self, data: Any) -> EpochLoader:
        return self._loader(data, self.eval_batch_size, self._by_length(data))

    def _by_length(self, data: Any) -> list[int]:
        return sorted(range(len(data)), key=lambda place: -self.length(data[place]))

    def _loader(self, data: Any, batch_size: int, sampler: Any) -> EpochLoader:
        # Keywords: Lightning makes this loader anew for predict. A generator of its own: without one, each pass over the data
        # would draw from the global one.
        how: dict[str, Any] = {"collate_fn": self.collate, "num_workers": self.num_workers, "generator": torch.Generator()}
        return EpochLoader(data, batch_size=batch_size, sampler=sampler, **how)

    # ------------------------------------------------------------------ the place in an epoch, in a checkpoint

    def _order(self) -> dict[str, Any]:
        """What the order of an epoch's batches follows from, by the option that changes it.

        Processes take turns in the order, so that batches of half the size on twice as many processes are the same rows.
        """
        return {
            "data.batch_size x processes": self.batch_size * self._processes[0],
            "data.train_size": len(self.train),
            "data.split_seed": self.split_seed,
            "data.length_grouped": self.length_grouped,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the place in an epoch depends on; see :meth:`load_state_dict`."""
        return self._order() if hasattr(self, "train") else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes note of it: a run that goes on inside an epoch needs the same."""
        self._order_of_checkpoint = dict(state_dict)

    def _check_same_order(self) -> None:
        """Refuses to go on inside an epoch whose rows would come in another order, some of them twice and some never."""
        for option, value in self._order().items():
            if self._order_of_checkpoint.get(option, value) != value:
                raise UserError(
                    f"{option}: expected {self._order_of_checkpoint[option]}, for the checkpoint lies inside an epoch, "
                    f"received {value}; one from the end of an epoch can go on with another"
                )
