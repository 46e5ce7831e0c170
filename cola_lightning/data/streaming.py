"""Rows of a data set on the hub that are read while a model trains on them: for data that fits on no disk."""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from cola_lightning.data.preprocessing import Preprocessor
from cola_lightning.data.report import RowReport
from cola_lightning.data.rows import MOST_VALIDATION_ROWS, Row, Rows
from cola_lightning.data.splits import Splits, hub_data
from cola_lightning.errors import UnusableRow, UserError
from cola_lightning.seeding import derive_seed

log = logging.getLogger(__name__)

BUFFER = 10_000  # rows that are shuffled together


class Stream:
    """A split that is streamed. It stands where :class:`~cola_lightning.data.rows.Rows` stands for one that is on disk.

    Its first rows are read for validation and test; they are not trained on.

    Args:
        data: a ``datasets.IterableDataset``.
        place: names it in messages.

    Attributes:
        n_held_out: the number of its first rows that belong to validation and test.
    """

    source_columns = None
    may_lack_targets = False
    default_val_size = MOST_VALIDATION_ROWS
    drawing = "the first ones"

    def __init__(self, data: Any, place: str) -> None:
        self.data, self.place, self.n_held_out = data, place, 0

    @functools.cached_property
    def _first(self) -> Rows:
        return self._read(0, 1)

    @property
    def columns(self) -> list[str]:
        """The names of the fields."""
        return self._first.columns

    @property
    def lists(self) -> list[str]:
        """The names of the fields that hold lists."""
        return self._first.lists

    @property
    def booleans(self) -> list[str]:
        """The names of the fields that hold true or false."""
        return self._first.booleans

    def _read(self, start: int, end: int) -> Rows:
        """Some of its rows, read now."""
        import datasets

        rows = Rows(datasets.Dataset.from_list(list(self.data.take(end))[start:], features=self.data.features), self.place)
        rows.may_lack_targets = self.may_lack_targets
        return rows

    def lacking_targets(self) -> "Stream":
        """The same rows; their answers may be missing."""
        other = copy.copy(self)
        other.may_lack_targets = True
        return other

    def drawn(self, sizes: Mapping[str, float | None], seed: int, groups: Sequence[object] | None = None) -> dict[str, Any]:
        """Parts of the rows, by their sizes; None: 1,000. Training has the rest of the stream, other parts its first rows."""
        parts = dict[str, Any]()
        for part, size in sizes.items():
            start = self.n_held_out
            self.n_held_out += 0 if part == "train" else int(size or MOST_VALIDATION_ROWS)
            parts[part] = self if part == "train" else self._read(start, self.n_held_out)
        return parts


class EncodedStream:
    """Training rows that are encoded while they are read.

    Args:
        stream: the rows.
        preprocessor: that of their kind.
    """

    def __init__(self, stream: Stream, preprocessor: Preprocessor) -> None:
        self.stream, self.preprocessor = stream, preprocessor

    def loader(
        self,
        seed: int | str,
        processes: tuple[int, int],
        check: Callable[[RowReport], None],
        **options: int,
    ) -> Any:
        """A loader of the rows that are not held out, shuffled by a buffer; torchdata's, which has a state, if it is installed.

        Args:
            seed: of the order.
            processes: the number of processes, each of which reads other rows, and this process's rank.
            check: refuses the rows read so far, by the report on them, if too many of them are skipped.
            **options: the ``batch_size`` and ``num_workers`` of the loader.

        Raises:
            UserError: if rows are held out and several processes read; while rows are read, if too many of them are skipped.
        """
        from datasets.distributed import split_dataset_by_node

        n_processes, rank = processes
        if self.stream.n_held_out and (options["num_workers"] or n_processes > 1):  # each of which would skip other rows
            raise UserError("data.streaming: rows are held out, so use one process (trainer.devices 1) and data.num_workers 0")
        data = self.stream.data.skip(self.stream.n_held_out).shuffle(seed=derive_seed(seed), buffer_size=BUFFER)
        data = split_dataset_by_node(data, rank=rank, world_size=n_processes)
        encode_batch = functools.partial(self._encode_batch, RowReport(), check)
        data = data.map(encode_batch, batched=True, remove_columns=self.stream.columns)
        kind: Any = DataLoader
        with contextlib.suppress(ImportError):
            from torchdata.stateful_dataloader import StatefulDataLoader as kind  # type: ignore[no-redef]
        loader = kind(data, collate_fn=self.preprocessor.collate, **options)
        loader.sampler.set_epoch = data.set_epoch  # Lightning calls a sampler's
        return loader

    def _encode_batch(
        self, report: RowReport, check: Callable[[RowReport], None], fields: dict[str, list[Any]]
    ) -> dict[str, list[Any]]:
        place, notes = self.stream.place, set[str]()
        rows = [Row(dict(zip(fields, values, strict=True)), place) for values in zip(*fields.values(), strict=True)]
        outcomes = self.preprocessor.examples(rows, notes)
        report.n_rows += len(rows)
        for reason in (str(outcome) for outcome in outcomes if isinstance(outcome, UnusableRow)):
            notes.add(f"{place}: rows are skipped: {reason}")
            report.skip(reason, place)
        check(report)
        for note in sorted(notes - report.notes):
            log.info("%s", note)
        report.notes |= notes
        encoded = [row for outcome in outcomes if not isinstance(outcome, UnusableRow) for row in outcome]
        return {name: [row[name] for row in encoded] for name in self.preprocessor.features or ()}


def stream_splits(source: str, subset: str | None, revision: str | None) -> Splits[Stream]:
    """The splits of a data set on the hub; see :func:`~cola_lightning.data.splits.load_splits`."""
    splits = hub_data(source, subset, revision, streaming=True)
    return {split: functools.partial(Stream, data, f"{source}, {split}") for split, data in splits.items()}
