"""Rows of the hub that are read while a model trains on them: which rows a stage reads, and which part has them."""

import functools

import datasets
import pytest

from cola_lightning import TextDataModule, UserError
from cola_lightning.data.streaming import Stream
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torch's own call, for rows without a length


def text_row(split, k):
    return {"text": f"{split} {k}."}


def streamed(splits, stage, make=text_row, **arguments):
    """A data module after its setup on streamed splits of so many rows, and the texts that were read from each."""
    read = {split: [] for split in splits}

    def rows(split, n_rows):
        for k in range(n_rows):
            read[split].append(k)
            yield make(split, k)

    data = TextDataModule("owner/rows", streaming=True, batch_size=4, **arguments)
    data._splits = [
        {
            split: functools.partial(
                Stream,
                datasets.IterableDataset.from_generator(functools.partial(rows, split, n)),
                split,
            )
            for split, n in splits.items()
        }
    ]
    return tiny.set_up(data, tiny.tokenizer(pad=True), stage), read


def texts(data, rows):
    rows = [row["input_ids"] if isinstance(row, dict) else row.prompt_ids for row in rows]
    return [data.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def trained_texts(data):
    return sorted(texts(data, [{"input_ids": ids} for batch in data.train_dataloader() for ids in batch["input_ids"]]))


def test_a_fit_holds_out_the_first_rows_and_reads_no_test_rows():
    data, read = streamed({"train": 30, "test": 30}, "fit", val_size=5)
    assert texts(data, data.val) == [f"train {k}." for k in range(5)]
    assert trained_texts(data) == sorted(f"train {k}." for k in range(5, 30))
    assert data.can_be_tested
    assert read["test"] == []
    assert data.state_dict() == {}


def test_validation_and_test_have_their_splits_or_the_first_training_rows():
    data, _ = streamed({"train": 30, "validation": 8}, "fit", test_size=3)
    assert texts(data, data.val) == [f"validation {k}." for k in range(8)]
    assert trained_texts(data) == sorted(f"train {k}." for k in range(3, 30))
    data.setup("test")
    assert texts(data, data.test) == [f"train {k}." for k in range(3)]


@pytest.mark.parametrize("split", ["test", "validation", "train"])
def test_predict_reads_the_test_rows_or_those_of_validation_or_training(split):
    splits = {name: 9 for name in ("train", "validation", "test") if name in (split, "train")}
    data, read = streamed(splits, "predict", max_new_tokens=4)
    assert texts(data, data.test) == [f"{split} {k}." for k in range(9)]
    assert split == "train" or read["train"] == []


def test_rows_that_are_too_long_are_skipped_and_do_not_count_as_unusable():
    def row(split, k):
        return {"prompt": f"Is {k} old?", "response": "No. " * (1 + 40 * (k % 2))}

    data, _ = streamed({"train": 20}, "fit", row, val_size=0, too_long="skip", max_length=30)
    assert len(trained_texts(data)) == 10


def test_rows_are_held_out_in_one_process_alone():
    for arguments in ({"num_workers": 1}, {}):
        data, _ = streamed({"train": 30}, "fit", val_size=5, **arguments)
        data.trainer = None if arguments else tiny.process(0, 2)
        with pytest.raises(UserError, match=r"data\.streaming: rows are held out, so use one process"):
            data.train_dataloader()
