"""Rows of a data set on the hub that are read while a model trains on them: for what fits no disk."""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader

from cola_lightning.data.report import RowReport
from cola_lightning.data.rows import Encode, Row, Rows
from cola_lightning.data.splits import Splits, hub_data
from cola_lightning.errors import UnusableRow
from cola_lightning.seeding import derive_seed

log = logging.getLogger(__name__)

HELD_OUT = 1_000  # the first rows of a split that are read, for validation and for test
BUFFER = 10_000  # rows that are shuffled together


class Stream:
    """The training rows of a streamed data set, after the first ones, which are held out.

    Args:
        data: a ``datasets.IterableDataset``.
        place: names it in messages.
    """

    def __init__(self, data: Any, place: str) -> None:
        self.data, self.place = data, place
        self.n_held_out = 0  # rows, from the first, that are others' rows

    def __getitem__(self, first: slice) -> Rows:
        """Its first rows, read now."""
        import datasets

        rows = list(self.data.take(first.stop))[first]
        return Rows(datasets.Dataset.from_list(rows, features=self.data.features), self.place)

    def held_out(self, n_rows: float | None) -> Rows:
        """Its next rows, read now, which are none of its training rows; None: 1,000."""
        start, self.n_held_out = self.n_held_out, self.n_held_out + int(n_rows or HELD_OUT)
        return self[start : self.n_held_out]

    def encoded(
        self,
        encode: Encode,
        columns: Sequence[str],
        seed: int | str,
        n_processes: int,
        rank: int,
        max_skipped: float,
    ) -> Any:
        """The rows that are not held out, shuffled by a buffer, each process its own, and encoded.

        Args:
            encode: makes rows of the result: several of one row, or none.
            columns: the names of the rows' fields.
            seed: of the order.
            n_processes: the number of processes that share the rows.
            rank: this process's rank.
            max_skipped: the largest share of the rows read so far that may be skipped.

        Raises:
            UserError: while rows are read, if too many of them are skipped.
        """
        from datasets.distributed import split_dataset_by_node

        report = RowReport()

        def batch(fields: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows = [Row(dict(zip(fields, values, strict=True)), self.place) for values in zip(*fields.values(), strict=True)]
            encoded = encode(rows, notes := set[str]())
            report.n_rows += len(rows)
            for reason in (str(one) for one in encoded if isinstance(one, UnusableRow)):
                notes.add(f"{self.place}: rows are skipped: {reason}")
                report.skip(reason, self.place)
            report.check(max_skipped)
            for note in sorted(notes - report.notes):
                log.info("%s", note)
            report.notes |= notes
            used = [row for one in encoded if not isinstance(one, UnusableRow) for row in one]
            return {name: [row[name] for row in used] for name in ("input_ids", "spans")}

        data = self.data.skip(self.n_held_out).shuffle(seed=derive_seed(seed), buffer_size=BUFFER)
        data = split_dataset_by_node(data, rank=rank, world_size=n_processes)
        return data.map(batch, batched=True, remove_columns=list(columns))


def stream_splits(source: str, subset: str | None, revision: str | None) -> Splits[Stream]:
    """The splits of a data set on the hub; see :func:`~cola_lightning.data.splits.load_splits`."""
    splits = hub_data(source, subset, revision, streaming=True)
    return {split: functools.partial(Stream, data, f"{source}, {split}") for split, data in splits.items()}


def stream_loader(data: Any, collate: Callable[[list[Any]], Any], batch_size: int, num_workers: int) -> Any:
    """A loader of a stream: torchdata's, which has a state, if that package is installed."""
    kind: Any = DataLoader
    with contextlib.suppress(ImportError):
        from torchdata.stateful_dataloader import StatefulDataLoader as kind  # type: ignore[no-redef]
    loader = kind(data, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    loader.sampler.set_epoch = data.set_epoch  # Lightning calls a sampler's
    return loader
