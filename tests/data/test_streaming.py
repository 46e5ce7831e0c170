"""Rows of a data set on the hub that does not fit on the disk: which are read, once, and that they are rows like others."""

import datasets
import pytest

from cola_lightning import TextDataModule, UserError
from cola_lightning.data import streaming
from cola_lightning.data.streaming import draw_rows


def test_as_many_rows_are_drawn_as_are_needed_and_read_once(monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER", 200)
    read = []

    def rows():
        for k in range(600):
            read.append(k)
            yield {"text": f"It was {k}."}

    def drawn(seed=0):
        return draw_rows(datasets.IterableDataset.from_generator(rows), 20, seed, "rows, train", list, "as many")

    first = drawn()
    assert next(iter(first)).place == "rows, train, row 0 (counted from 0)"
    texts, n_read = [row["text"] for row in first], len(read)
    assert len({*texts}) == len(first) == 20
    assert n_read < 300  # a buffer, and not all
    assert [row["text"] for row in drawn()] == texts
    assert len(read) == n_read
    assert [row["text"] for row in drawn(1)] != texts


def test_streaming_needs_the_hub_and_a_number_of_rows():
    for arguments in ({"source": "a/b"}, {"source": "a/b", "train_size": 0.5}, {"source": ".", "train_size": 5}):
        with pytest.raises(UserError, match=r"data\.streaming reads data\.train_size rows from the hub"):
            TextDataModule(**arguments, streaming=True)
