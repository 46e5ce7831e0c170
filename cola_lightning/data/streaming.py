"""Rows of a data set on the hub that are read while a model trains on them: for what fits no disk."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader

from cola_lightning.data.row import Row
from cola_lightning.data.rows import Rows, hub_data
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)

Encode = Callable[[list[Row]], Sequence[dict[str, Any]]]
HELD_OUT = 1_000  # the first rows of a split that are read, for validation and for test
BUFFER = 10_000  # rows that are shuffled together


class Stream:
    """The training rows of a streamed data set, after the first ones, which are held out.

    Args:
        data: a ``datasets.IterableDataset``.
        place: names it in messages.
        n_held_out: how many of its rows, from the first, are others' rows.
    """

    def __init__(self, data: Any, place: str, n_held_out: int = 0) -> None:
        self.data, self.place, self.n_held_out = data, place, n_held_out

    def first(self, n_rows: int) -> Rows:
        """Its first rows, read now."""
        import datasets

        return Rows(datasets.Dataset.from_list(list(self.data.take(n_rows)), features=self.data.features), self.place)

    def encoded(self, encode: Encode, columns: Sequence[str], seed: int, n_processes: int, rank: int) -> Any:
        """The rows that are not held out, shuffled by a buffer, each process its own, and encoded.

        Args:
            encode: makes rows of the result: several of one row, or none.
            columns: the names of the rows' fields.
            seed: of the order.
            n_processes: the number of processes that share the rows.
            rank: this process's rank.
        """
        from datasets.distributed import split_dataset_by_node

        def batch(fields: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows = [Row(dict(zip(fields, values, strict=True)), self.place) for values in zip(*fields.values(), strict=True)]
            try:
                encoded = encode(rows)
            except UserError:  # of one row, or several: the others need not wait for it
                encoded = [row for one in rows for row in _if_usable(encode, one)]
            return {name: [row[name] for row in encoded] for name in ("input_ids", "spans")}

        data = self.data.skip(self.n_held_out).shuffle(seed=seed, buffer_size=BUFFER)
        data = split_dataset_by_node(data, rank=rank, world_size=n_processes)
        return data.map(batch, batched=True, remove_columns=list(columns))


def _if_usable(encode: Encode, row: Row) -> Sequence[dict[str, Any]]:
    try:
        return encode([row])
    except UserError as error:
        log.warning("a row cannot be used, and is skipped: %s", error)
        return []


def stream_splits(source: str, subset: str | None, revision: str | None) -> dict[str, Stream]:
    """The splits of a data set on the hub; see :func:`~cola_lightning.data.rows.load_splits`."""
    splits = hub_data(source, subset, revision, streaming=True)
    return {split: Stream(data, f"{source}, {split}") for split, data in splits.items()}


def stream_loader(**options: Any) -> Any:
    """A loader of a stream: torchdata's, which has a state, if that package is installed."""
    if importlib.util.find_spec("torchdata") is None:
        return DataLoader(**options)
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(**options)
