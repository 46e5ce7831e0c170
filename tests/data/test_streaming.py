"""Rows of a data set on the hub that does not fit on the disk: which are read, once, and that they are rows like others."""

import datasets
import pytest

from cola_lightning import TextDataModule, UserError
from cola_lightning.data import streaming
from cola_lightning.data.base import EpochSampler
from cola_lightning.data.streaming import draw_rows
from tests.helpers import tiny


def stream_of(n_rows, make=lambda k: {"text": f"It was {k}."}):
    """A stream, and the rows that were read from it."""
    read = []

    def rows():
        for k in range(n_rows):
            read.append(k)
            yield make(k)

    return datasets.IterableDataset.from_generator(rows), read


def test_as_many_rows_are_drawn_as_are_needed_and_read_once(monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER", 200)
    stream, read = stream_of(600)
    rows = draw_rows(stream, 20, 0, "rows, train", "as many")
    assert len(rows) == 20
    assert len(read) < 300  # a buffer, and not all
    texts = [row["text"] for row in rows]
    assert len({*texts}) == 20
    n_read = len(read)
    assert [row["text"] for row in draw_rows(stream, 20, 0, "rows, train", "as many")] == texts
    assert len(read) == n_read
    assert [row["text"] for row in draw_rows(stream, 20, 1, "rows, train", "as many")] != texts
    assert next(iter(rows)).place == "rows, train, row 0 (counted from 0)"


def test_rows_that_were_drawn_are_split_skipped_and_resumed_like_others(caplog):
    caplog.set_level("INFO", "cola_lightning")
    stream, _ = stream_of(40, lambda k: {"prompt": f"Is {k} old?", "response": "No. " * (1 + 40 * (k % 2))})
    data = TextDataModule(
        "owner/rows", streaming=True, train_size=20, val_size=5, too_long="skip", max_length=30, max_skipped=0, batch_size=2
    )
    data._splits = [{"train": lambda: draw_rows(stream, 40, 0, "rows, train", "split")}]
    tiny.set_up(data, tiny.tokenizer(pad=True), "fit")
    n_long = sum("No. No." in data.tokenizer.decode(row["input_ids"]) for row in data.train)
    assert (n_long, data._report.n_rows) == (0, 25)
    assert len(data.train) + len(data.val) + data._report.n_skipped == 25
    assert "longer than data.max_length" in caplog.text
    assert isinstance(data.train_dataloader().sampler, EpochSampler)


@pytest.mark.parametrize(
    "arguments", [{"source": "owner/rows"}, {"source": "owner/rows", "train_size": 0.5}, {"source": ".", "train_size": 5}]
)
def test_streaming_needs_the_hub_and_a_number_of_rows(arguments):
    with pytest.raises(UserError, match=r"data\.streaming reads data\.train_size rows from the hub"):
        TextDataModule(**arguments, streaming=True)
