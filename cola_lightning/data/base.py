"""Base class of the data modules: the order of rows depends on a seed and the epoch alone, and a run resumes inside it."""

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from cola_lightning.errors import UserError
from cola_lightning.seeding import derive_seed, seeded

BATCHES_GROUPED = 50  # batches whose rows are sorted by length together


def batches_done(trainer: Trainer | None) -> int:
    """Training batches of the current epoch that are done; 0 as an epoch begins."""
    if trainer is None or not trainer.training:
        return 0
    n_batches = trainer.num_training_batches  # infinite beside a loader without an end
    return int((trainer.fit_loop.batch_idx + 1) % n_batches)  # all of them: the next epoch begins


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


class SeededBatches(Dataset[Any]):
    """Batches of a data set's rows, each collated under its own seed: random augmentation is the same in a resumed epoch.

    Args:
        rows: the data set.
        collate: makes a batch of rows.
        seed: combined with the epoch and the indices of a batch's rows.
        augment: changes a row at random, by a seed that depends on ``seed``, the epoch and the row's index; None: no change.
    """

    def __init__(
        self, rows: Any, collate: Callable[[list[Any]], Any], seed: int | str, augment: Callable[[Any, int], Any] | None = None
    ) -> None:
        self.rows, self.collate, self.seed, self.augment, self.epoch = rows, collate, seed, augment, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place]

    def __getitems__(self, places: list[int]) -> Any:
        """The batch of the rows at these indices; runs in a worker process if there are any."""
        with seeded(derive_seed(self.seed, self.epoch, *places)):
            read = getattr(self.rows, "__getitems__", None)  # of rows in Arrow: all at once
            rows = read(places) if read else [self.rows[place] for place in places]
            if self.augment is not None:
                seeds = [derive_seed(self.seed, self.epoch, place) for place in places]
                rows = [self.augment(row, seed) for row, seed in zip(rows, seeds, strict=True)]
            return self.collate(rows)


class EpochLoader(DataLoader[Any]):
    """A loader over an :class:`EpochSampler`. It has no state: the order is a function, the trainer has the position in it."""

    @override
    def __iter__(self) -> Any:
        # A generator: otherwise workers fetch the epoch's first rows at once, before the run knows its epoch and position.
        cast(SeededBatches, self.dataset).epoch = getattr(self.sampler, "epoch", 0)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty; the method's existence tells Lightning that the loader can resume inside an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def _identity(batch: Any) -> Any:
    return batch


def from_module(name: str) -> Any:
    """A property of a data module: the trained module's attribute of that name; without a Trainer, or for a module without it,
    what was set.
    """  # noqa: D205

    def read(data: Any) -> Any:
        module = data.trainer and data.trainer.lightning_module
        return getattr(module, name, vars(data).get(name))

    def write(data: Any, value: Any) -> None:
        vars(data)[name] = value

    return property(read, write)


class EpochDataModule(LightningDataModule, ABC):
    """Loaders over the parts of a data set, sequences of rows that a subclass' ``setup`` creates.

    Attributes:
        train: training rows; if their batches are not those of the other parts, with a method ``collate``.
        val: validation rows; empty: the fit runs without validation.
        test: rows of test and predict.
        length_grouped: whether a training batch has rows of similar length.
        main_process_only: attributes that worker processes do not get, in addition to the trainer.
        augment: changes a training row at random, by a seed of the epoch and the row's index; None: no change.

    Args:
        batch_size: rows per training batch.
        eval_batch_size: rows per batch in validation, test and predict; ``null``: as in training.
        split_seed: seed of the split into training, validation and test rows.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.

    Raises:
        UserError: for invalid values.

    Example:
        >>> class Squares(EpochDataModule):
        ...     def setup(self, stage):
        ...         self.train, self.val = [(x, x**2) for x in range(5)], [(5, 25)]
        >>> data = Squares(batch_size=2)
        >>> data.setup("fit")
        >>> [len(x) for x, y in data.train_dataloader()], next(iter(data.val_dataloader()))
        ([2, 2, 1], [tensor([5]), tensor([25])])
    """

    train: Any
    val: Any
    test: Any
    length_grouped = False
    augment: Callable[[Any, int], Any] | None = None
    main_process_only: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, batch_size: int, eval_batch_size: int | None = None, split_seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise UserError(f"data.{name} must be at least 1, got {size}")
        self.batch_size, self.eval_batch_size, self.split_seed = batch_size, eval_batch_size or batch_size, split_seed
        self.num_workers = num_workers
        self._order_of_checkpoint: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process that is not forked needs to collate batches."""
        return {name: value for name, value in vars(self).items() if name not in self.main_process_only} | {"trainer": None}

    @abstractmethod
    @override
    def setup(self, stage: str) -> None:
        """Creates the parts that the stage needs: ``fit``, ``validate``, ``test`` or ``predict``."""

    @property
    def order_seed(self) -> int | str:
        """The seed of the training order, besides the epoch: the split's seed and the module's."""
        return f"{self.split_seed} {getattr(self.trainer and self.trainer.lightning_module, 'seed', None)}"

    @property
    def identity(self) -> dict[str, Any]:
        """Which data this is, in plain types; checkpoints store it, for model cards. Empty if that is not known."""
        return {}

    @property
    def prompt_format(self) -> dict[str, Any]:
        """How a language model was prompted, for its use after training; checkpoints store it.

        In plain types: ``kind`` (``text``, ``response``, ``answer`` or ``options``), ``chat_template`` (whether prompts are a
        user's turn in the tokenizer's), and, if the same for all rows, ``prompt`` and ``options``, with a row's fields in
        braces. Empty if the model is not prompted.
        """
        return {}

    def lengths(self, data: Any) -> Sequence[int]:
        """The lengths of all rows of a part; a full evaluation goes from the longest row to the shortest, to reduce padding."""
        return [0] * len(data)

    def collate(self, rows: list[Any]) -> Any:
        """Makes a batch of rows."""
        return torch.utils.data.default_collate(rows)

    @override
    def train_dataloader(self) -> EpochLoader:
        def rows_done() -> int:
            # Beside a longer loader, Lightning starts this one again where it ends.
            if (done := batches_done(self.trainer) % max(1, math.ceil(len(sampler) / self.batch_size))) > 0:
                self._check_same_order()
            return done * self.batch_size

        n_processes, rank = self._processes
        lengths = self.lengths(self.train) if self.length_grouped else None
        group = self.batch_size * n_processes
        sampler = EpochSampler(self.train, self.order_seed, rows_done, n_processes, rank, lengths, group)
        return self._loader(self.train, self.batch_size, sampler, self.augment)

    @property
    def writes_predictions(self) -> bool:
        """Whether predictions are written with the indices of their rows, and not returned in the order of the rows."""
        return self.trainer is not None and self.trainer.predicting and not self.trainer.predict_loop.return_predictions

    @property
    def _processes(self) -> tuple[int, int]:
        """The number of processes that share the rows, and this process's rank."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @override
    def val_dataloader(self) -> Any:
        if len(self.val):
            return self._evaluation_loader(self.val, "limit_val_batches")
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # Lightning's, of what was asked for
        return []

    @override
    def test_dataloader(self) -> EpochLoader:
        return self._evaluation_loader(self.test, "limit_test_batches")

    @override
    def predict_dataloader(self) -> EpochLoader:
        order = list(range(len(self.test)))
        if self.writes_predictions:
            order = self._evaluation_order(self.test, "limit_predict_batches")
        n_processes, rank = self._processes
        sampler: Any = DistributedEvaluationSampler(order, n_processes, rank) if n_processes > 1 else order
        return self._loader(self.test, self.eval_batch_size, sampler)

    def _evaluation_loader(self, data: Any, limit: str) -> EpochLoader:
        return self._loader(data, self.eval_batch_size, self._evaluation_order(data, limit))

    def _evaluation_order(self, data: Any, limit: str) -> list[int]:
        """The longest rows first if all are taken; under a limit of the trainer's, the first ones of the data."""
        value = getattr(self.trainer, limit, None)
        takes_all = isinstance(value, float) and value == 1.0  # the whole number 1 is one batch
        if not takes_all or type(self).lengths is EpochDataModule.lengths:  # all alike: no row need be read
            return list(range(len(data)))
        lengths = self.lengths(data)
        return sorted(range(len(data)), key=lambda place: -lengths[place])

    def _loader(
        self, data: Any, batch_size: int, sampler: Any, augment: Callable[[Any, int], Any] | None = None
    ) -> EpochLoader:
        # Keywords: Lightning rebuilds this loader for predict. A separate generator: without it, each pass over the data would
        # draw from the global one.
        options: dict[str, Any] = {"num_workers": self.num_workers, "generator": torch.Generator(), "collate_fn": _identity}
        batches = SeededBatches(data, getattr(data, "collate", self.collate), self.order_seed, augment)
        return EpochLoader(batches, batch_size=batch_size, sampler=sampler, **options)

    # ------------------------------------------------------------------ the position in an epoch, in a checkpoint

    def _order(self) -> dict[str, Any]:
        """The values that determine the order of an epoch's batches, by option.

        Processes take turns in the order, so batches of half the size on twice as many processes hold the same rows.
        """
        return {
            "data.batch_size x processes": self.batch_size * self._processes[0],
            "data.train_size": len(self.train),
            "data.split_seed": self.split_seed,
            "data.length_grouped": self.length_grouped,
        } | ({"the tokens of all training rows (data.max_length)": self._n_tokens} if self.length_grouped else {})

    @property
    def _n_tokens(self) -> int:
        """The sum of the training rows' lengths, by which they are grouped: it tells whether the lengths are others."""
        return int(sum(self.lengths(self.train)))

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the position in an epoch depends on; see :meth:`load_state_dict`."""
        return self._order()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Records the state: a run that resumes inside an epoch needs the same values."""
        self._order_of_checkpoint = dict(state_dict)

    def _check_same_order(self) -> None:
        """Refuses to resume inside an epoch in another order, in which rows would be repeated and others omitted."""
        for option, value in self._order().items():
            if self._order_of_checkpoint.get(option, value) != value:
                raise UserError(
                    f"{option} must be {self._order_of_checkpoint[option]} as in the run that is resumed inside an epoch, got "
                    f"{value}. A checkpoint from the end of an epoch allows another value."
                )
