"""Any file people have: how its rows are read, which of them are which part, and what is wrong with it in one line."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pandas
import pytest
import transformers

from cola_lightning import COLASequenceClassifier, TemplateDataModule, TextClassificationDataModule, TextDataModule, UserError
from cola_lightning.data.reading import load_splits
from tests.helpers import tiny
from tests.helpers.tiny import attach
from tests.helpers.tiny import write_file as write
from tests.helpers.toy import trainer

# What spreadsheets and data sets hold, and what readers like to take for something else.
TEXTS = ["NA", "null", "007", "2020-01-01", 'She said "no", twice', "two\nlines", "café", "", "1e5", "True"]
ROWS = [{"text": text, "label": ["neg", "pos"][k % 2]} for k, text in enumerate(TEXTS)]
VERDICTS = ["positive", "negative", "mixed"]


def labelled(n_rows):
    """Of which the last tenth has another label."""
    return [{"text": f"It was {k}.", "label": "neg" if 10 * k >= 9 * n_rows else "pos"} for k in range(n_rows)]


def template(source, **arguments):
    return attach(TemplateDataModule(source, prompt="{text}", options=[" neg", " pos"], **arguments))


def classifier(source, *names, **arguments):
    data = attach(TextClassificationDataModule(source, text_fields="text", **arguments))
    data.label_names = list(names)
    return data


def parts(data):
    """The training, validation and test rows."""
    data.setup("fit")
    if data.can_be_tested:
        data.setup("test")
    return data.train, data.val, getattr(data, "test", [])


@pytest.mark.parametrize("name", ["csv", "tsv.gz", "jsonl.zst", "ndjson", "json", "parquet", "CSV"])
def test_a_file_of_any_format_gives_the_rows_that_were_written(tmp_path, name):
    source = write(tmp_path / f"rows.{name}", ROWS)
    rows = list(load_splits(source)["train"]())
    is_csv = name.lower()[:3] in ("csv", "tsv")
    assert rows == [{**row, "text": row["text"] or None} if is_csv else row for row in ROWS]
    assert [row.place for row in rows] == [f"{source}, row {k} (counted from 0)" for k in range(10)]


@pytest.mark.parametrize("name", ["jsonl", "json", "jsonl.gz"])
def test_json_values_are_those_of_the_file_also_in_a_column_of_mixed_types(tmp_path, name):
    values = ['{"a": 1}', '"hi"', '["x"]', "007", "1e5", "0.10", " 7 ", "plain", 5, 5.5, ["x", "007"], {"a": "1"}, None, True]
    rows = [{"prompt": f"{k}", "answer": value, "turns": [{"content": value}], "n": k or 0.5} for k, value in enumerate(values)]
    rows[0]["when"] = "2020-01-01T00:00:00"
    read = list(load_splits(write(tmp_path / f"rows.{name}", rows))["train"]())
    assert [repr(row["answer"]) for row in read] == [repr(value) for value in values]
    assert [repr(row["turns"][0]["content"]) for row in read] == [repr(value) for value in values]
    assert [repr(row["n"]) for row in read] == [repr(row["n"]) for row in rows]
    assert read[0]["when"] == rows[0]["when"]


def test_nan_is_no_value(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": NaN}\n{"text": "b", "label": 1.5}\n')
    (tmp_path / "a.json").write_text('[{"text": "a", "label": NaN}, {"text": "b", "label": 1.5}]')
    for name in ("a.jsonl", "a.json"):
        assert [row["label"] for row in load_splits(str(tmp_path / name))["train"]()] == [None, 1.5]


def test_a_quote_at_the_beginning_of_a_cell_is_text_in_a_tsv_and_said_in_a_csv(tmp_path, caplog):
    lines = ["text{}label", '"so" it{}a', "plain{}b", '"never closed{}a', 'the "end{}b']
    for name, sep in (("a.tsv", "\t"), ("a.csv", ",")):
        (tmp_path / name).write_text("\n".join(line.format(sep) for line in lines) + "\n")
        rows = list(load_splits(str(tmp_path / name))["train"]())
        if sep == "\t":
            assert [row["text"] for row in rows] == ['"so" it', "plain", '"never closed', 'the "end']
            assert "quote" not in caplog.text
    assert "line 2" in caplog.text


def test_a_name_is_a_pattern_only_where_no_file_has_it_and_a_missing_shard_is_noticed(tmp_path):
    for name in ("part1", "part[1]", "a*b", "axb"):
        write(tmp_path / f"{name}.csv", [{"text": name}])
    for name in ("part[1]", "a*b", "part1"):
        assert [row["text"] for row in load_splits(str(tmp_path / f"{name}.csv"))["train"]()] == [name]
    (tmp_path / "of[1]").mkdir()
    (tmp_path / "of1").mkdir()
    write(tmp_path / "of[1]" / "latest.csv", [{"text": "right"}])
    write(tmp_path / "of1" / "latest.csv", [{"text": "wrong"}])
    assert [row["text"] for row in load_splits(str(tmp_path / "of[1]"))["train"]()] == ["right"]
    for k in (0, 2):
        write(tmp_path / "shards" / f"train-0000{k}-of-00003.csv", [{"text": "a"}])
    with pytest.raises(UserError, match="3 files"):
        load_splits(str(tmp_path / "shards"))


def test_a_csv_file_of_pandas_begins_with_its_index(tmp_path):
    pandas.DataFrame({"text": TEXTS, "label": "pos"}).to_csv(tmp_path / "rows.csv")
    (read,) = load_splits(str(tmp_path / "rows.csv")).values()
    assert list(read()) == [{"Unnamed: 0": str(k), "text": text or None, "label": "pos"} for k, text in enumerate(TEXTS)]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_an_empty_answer_is_missing_where_the_format_has_no_null(tmp_path, name):
    source = write(tmp_path / name, [{"prompt": f"Is it {k}?", "response": ""} for k in range(20)])
    templated = attach(TemplateDataModule(source, prompt="{prompt}", answer="response"))
    instructed = attach(TextDataModule(source, max_new_tokens=4))
    for data in (templated, instructed):
        if name == "rows.csv":
            with pytest.raises(UserError, match=r"'response' is null, not .*: .*row \d+"):
                data.setup("fit")
        data.setup("predict")
    assert {row.example.references for row in templated.test} == {()}
    assert {row.target for row in instructed.test} == {None if name == "rows.csv" else ""}


@pytest.mark.filterwarnings("default")  # as outside of tests, where a warning is no error
def test_what_cannot_be_read_or_would_lose_a_cell_is_one_line(tmp_path):
    for name, text in [
        ("comma.csv", "text,label\nwell, bad,neg\nfine, good,pos\n"),  # without quotes, it makes one more cell
        ("twice.csv", "text,text\nfine,pos\n"),  # of two columns of one name, a row would have the last
        ("rows.xlsx", ""),
        ("broken.jsonl", '{"text": "a"}\n{"text": "b\n'),
        ("latin.jsonl", '{"text": "é"}\n'.encode("latin-1")),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 2000)[:60]),
        ("head.csv", "text,label\n"),
        ("no_such.csv", None),  # which is not asked for on the hub
    ]:
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=name) as caught:
            load_splits(str(tmp_path / name))["train"]()
        assert "\n" not in str(caught.value)


def test_a_folder_holds_a_file_a_split_in_any_format(tmp_path):
    for k, name in enumerate(["train.csv", "dev.json", "Test.parquet"]):
        write(tmp_path / name, [{"text": f"It was {k}.", "label": "pos"}, {"text": f"Is it {k}?", "label": "neg"}])
    for k, name in enumerate(["own-00000-of-00002.jsonl", "own-00001-of-00002.jsonl"]):
        write(tmp_path / name, ROWS[k : k + 1])
    (tmp_path / "notes.json").write_text("no rows")  # nobody asks for this split
    splits = load_splits(str(tmp_path))
    assert list(splits["own"]()) == ROWS[:2]
    data = attach(TextDataModule(str(tmp_path)))
    texts = [data.tokenizer.decode(part[0]["input_ids"][1:-1]) for part in parts(data)]
    assert texts == [f"It was {k}." for k in range(3)]
    with pytest.raises(UserError, match=r"^data\.val_split") as caught:
        attach(TextDataModule(str(tmp_path), val_split="no"), "fit")
    assert all(split in str(caught.value) for split in ("train", "dev", "test", "own", "notes"))
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"train\.csv' and .*train\.jsonl'"):
        load_splits(str(tmp_path))["train"]()


# How many rows the files have, what is asked for, and how many rows are then trained, validated and tested.
PARTS = [
    ({"train": 200}, {}, [180, 20, 0]),
    ({"train": 200}, {"val_size": 0.25, "test_size": 7}, [143, 50, 7]),
    ({"train": 200}, {"train_size": 30, "val_size": 0.001, "test_size": 0.1}, [30, 1, 20]),
    ({"train": 200}, {"train_size": 1, "val_size": 1, "test_size": 0}, [1, 1, 0]),
    ({"train": 200}, {"val_size": 0, "test_size": 7}, [193, 0, 7]),
    ({"train": 200, "test": 10}, {}, [180, 20, 10]),
    ({"train": 200, "test": 10, "validation": 30}, {}, [200, 30, 10]),
    ({"train": 200, "validation": 30}, {}, [200, 30, 0]),  # nothing is taken from the training rows
    ({"train": 200, "validation": 30}, {"test_size": 9}, [191, 30, 9]),
    ({"train": 20, "validation": 20, "test": 20}, {"val_size": 5, "test_size": 0}, [20, 5, 0]),
    ({"train": 20, "test": 20}, {"val_split": "train", "val_size": 5, "test_split": "train", "test_size": 3}, [12, 5, 3]),
]


@pytest.mark.parametrize(("files", "arguments", "sizes"), PARTS)
def test_parts_are_the_splits_that_there_are_and_else_drawn_from_the_training_rows(tmp_path, files, arguments, sizes):
    for split, n_rows in files.items():
        write(tmp_path / f"{split}.csv", labelled(n_rows))
    found = parts(template(str(tmp_path), **arguments))
    assert [len(part) for part in found] == sizes
    if len(files) == 1:  # no row is in two parts
        assert len({row.example.prompt for part in found for row in part}) == sum(sizes)
    if sizes[0] == files["train"]:
        assert [row.example.prompt for row in found[0]] == [row["text"] for row in labelled(sizes[0])]


@pytest.mark.parametrize("val_size", [0.25, 0])
def test_one_file_is_split_by_the_seed_and_the_log_says_so(tmp_path, caplog, val_size):
    caplog.set_level("INFO")

    def prompts(source, seed):
        return [[row.example.prompt for row in part] for part in parts(template(source, split_seed=seed, val_size=val_size))]

    source = write(tmp_path / "rows.csv", labelled(200))
    first, again, other = (prompts(source, seed) for seed in (0, 0, 1))
    assert first == again == prompts(write(tmp_path / "rows" / "train.csv", labelled(200)), 0)  # which is as one file
    assert (first[0] != other[0]) is (val_size > 0)  # all rows stay in their order
    drawn = "150 rows for training, 50 for validation, by data.split_seed" if val_size else "200 rows for training"
    assert f"{source}: {drawn}" in caplog.messages


def test_predict_takes_all_rows_of_the_split_that_was_not_trained_if_there_is_one(tmp_path):
    for number, (arguments, splits, predicted) in enumerate(
        [
            ({"test_size": 3}, ["train"], "train"),
            ({"test_size": 3}, ["train", "test"], "test"),
            ({}, ["train"], "train"),
            ({"val_size": 0}, ["train", "dev"], "dev"),
            ({}, ["train", "dev", "test"], "test"),
            ({}, ["test"], "test"),
        ]
    ):
        for split in splits:
            tiny.write_rows(tmp_path / str(number), [{"text": f"The {split} was {k}."} for k in range(10)], [split])
        data = template(str(tmp_path / str(number)), **arguments)
        data.setup("predict")
        assert [row.example.prompt for row in data.test] == [f"The {predicted} was {k}." for k in range(10)]


def test_each_part_of_a_labelled_file_has_the_same_share_of_each_label(tmp_path):
    source = write(tmp_path / "rows.csv", [*labelled(200), {"text": "Rare.", "label": "rare"}])
    counts = [Counter(row["labels"] for row in part) for part in parts(classifier(source, "neg", "pos", "rare", test_size=0.1))]
    # What is rare is trained on.
    assert [[count[k] for k in range(3)] for count in counts] == [[16, 144, 1], [2, 18, 0], [2, 18, 0]]


def test_rows_are_tokenized_once_and_again_for_another_text_tokenizer_or_format(tmp_path):
    def prepared(tokenizer=None, **arguments):
        data = TextDataModule(str(tmp_path / "rows.jsonl"), val_size=2, test_size=2, **arguments)
        tiny.set_up(data, tokenizer or tiny.tokenizer(), "fit")
        (file,) = data.train.cache_files  # memory-mapped
        return Path(file["filename"]), Path(file["filename"]).stat().st_mtime_ns

    write(tmp_path / "rows.jsonl", [{"text": f"The town is {k} years old."} for k in range(20)])
    found = [prepared()]
    assert prepared() == found[0]
    longer = tiny.tokenizer()
    longer.add_tokens(["own is"])
    found += [prepared(**other) for other in ({"tokenizer": longer}, {"max_length": 5}, {"split_seed": 1})]
    write(tmp_path / "rows.jsonl", [{"text": f"The town is {k} days old."} for k in range(20)])
    found.append(prepared())
    assert len({path for path, _ in found}) == len(found) == 5


def test_a_csv_of_names_becomes_a_model_in_two_stages_that_is_tested_on_held_out_rows_and_exported(tmp_path):
    model = tiny.folder(tmp_path / "model", "bert", "AutoModel")
    texts = [f"It was {VERDICTS[k % 3]}, {k} times." for k in range(60)]
    rows = [{"text": text, "label": VERDICTS[k % 3]} for k, text in enumerate(texts)]
    reviews, others = write(tmp_path / "reviews.csv", rows), write(tmp_path / "other.csv", rows[:30])

    def fitted(source, **arguments):
        module = COLASequenceClassifier(model, rank=2, target_modules=["query", "value"], seed=0, **arguments)
        run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=1)
        run.fit(module, datamodule=TextClassificationDataModule(source, text_fields="text", test_size=0.1))
        run.save_checkpoint(f"{source}.ckpt")
        return module

    fitted(reviews)
    module = fitted(others, init_chain=f"{reviews}.ckpt")
    data = TextClassificationDataModule(reviews, text_fields="text", test_size=0.1)
    trainer(tmp_path).test(module, datamodule=data, ckpt_path=f"{others}.ckpt", verbose=False)
    assert len(data.test) == 6  # the first stage has held them out
    new = TextClassificationDataModule(write(tmp_path / "new.tsv", [{"text": text} for text in texts[:5]]), text_fields="text")
    (batch,) = trainer(tmp_path).predict(module, datamodule=new)
    for format_ in ("merged", "peft"):
        module.export(tmp_path / format_, format_)
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "merged"))
    assert [row["label"] for row in classify(texts[:5])] == batch["prediction"]
    assert classify.model.config.label2id == {name: place for place, name in enumerate(sorted(VERDICTS))}
    assert json.loads((tmp_path / "peft" / "labels.json").read_text()) == sorted(VERDICTS)
