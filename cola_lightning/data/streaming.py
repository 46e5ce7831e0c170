"""Some of the rows of a data set on the hub that does not fit on the disk: once they are read, they are rows like others."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from cola_lightning import hub
from cola_lightning.data.rows import Rows, progress_bar_if
from cola_lightning.data.splits import Splits, contents_on_hub, hub_data

BUFFER = 10_000  # rows that are shuffled together
WORTH_A_BAR = 20_000  # rows, whose download takes a while


def stream_splits(source: str, subset: str | None, revision: str | None, n_rows: Callable[[str], int], seed: int) -> Splits:
    """Splits with some of their rows; see :func:`~cola_lightning.data.splits.load_splits`.

    Args:
        source: the id of a data set on the hub.
        subset: the name of a configuration.
        revision: a branch, tag or commit.
        n_rows: how many rows of a split are read at most.
        seed: of the rows that are drawn.
    """
    from huggingface_hub import HfApi

    splits = hub_data(source, subset, revision, streaming=True)
    with hub.needed_for(f"data.source: {source!r}"):
        commit = HfApi().dataset_info(source, revision=revision).sha
    return {
        split: functools.cache(
            functools.partial(
                draw_rows,
                stream,
                n_rows(split),
                seed,
                f"{source}, {split}",
                contents_on_hub(source, subset, split, f"drawn by {seed}"),
                f"{commit} {subset} {split}",
            )
        )
        for split, stream in splits.items()
    }


def draw_rows(stream: Any, n_rows: int, seed: int, place: str, contents: Callable[[], list[str]], identity: str) -> Rows:
    """The first rows of a stream that is shuffled by a buffer. They are stored in the cache, and read once.

    Args:
        stream: a ``datasets.IterableDataset``.
        n_rows: how many are read at most.
        seed: of the shuffle.
        place: names the stream in messages.
        contents: of the rows.
        identity: of the stream, for the cache.
    """
    import datasets

    known = hashlib.sha256(f"{identity} {n_rows} {seed} {BUFFER}".encode()).hexdigest()[:32]
    some = stream.shuffle(seed=seed, buffer_size=BUFFER).take(n_rows)
    with progress_bar_if(n_rows >= WORTH_A_BAR):
        data = datasets.Dataset.from_generator(_rows, stream.features, gen_kwargs={"stream": some}, fingerprint=known)
    return Rows(data, place, contents)


def _rows(stream: Any) -> Iterator[Any]:
    yield from stream
