"""Any file people have: how its rows are read, which of them are which part, and what is wrong with it in one line."""

import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import transformers
from lightning.pytorch.trainer.states import TrainerFn, TrainerState

from cola_lightning import Chain, PromptDataModule, TemplateDataModule, TextClassificationDataModule, TextDataModule, UserError
from cola_lightning.cli import main
from cola_lightning.data.classification import find_labels
from cola_lightning.data.splits import draw, load_splits
from tests import tiny
from tests.test_language_data import attach

# What spreadsheets and data sets hold, and what readers like to take for something else.
TEXTS = ["NA", "null", "007", "2020-01-01", 'She said "no", twice', "two\nlines", "café", "", "1e5", "True"]
ROWS = [{"text": text, "label": ["neg", "pos"][k % 2]} for k, text in enumerate(TEXTS)]


def write_csv(path, rows, delimiter=","):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write(path, rows):
    """The rows in the format that a file's ending names."""
    path.parent.mkdir(exist_ok=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("csv", "tsv"):
        write_csv(path, rows, "\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        text = json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


NAMES = ["rows.csv", "rows.tsv", "rows.jsonl", "rows.ndjson", "rows.json", "rows.parquet", "rows.CSV"]
NAMES += ["rows.csv.gz", "rows.tsv.gz", "rows.jsonl.gz", "rows.json.gz"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_format_gives_the_rows_that_were_written(tmp_path, name):
    write(tmp_path / name.lower(), ROWS)
    (tmp_path / name.lower()).rename(tmp_path / name)
    rows = list(load_splits(str(tmp_path / name))["train"]())
    is_csv = name.lower().removesuffix(".gz").endswith(("csv", "tsv"))
    assert rows == [{**row, "text": row["text"] or None} if is_csv else row for row in ROWS]
    assert [row.place for row in rows] == [f"{tmp_path / name}, row {k}" for k in range(1, 11)]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv.gz", "rows.jsonl"])
def test_an_empty_answer_is_missing_where_the_format_has_no_null(tmp_path, name):
    source = write(tmp_path / name, [{"prompt": f"Is it {k}?", "response": ""} for k in range(20)])
    templated = attach(TemplateDataModule(source, prompt="{prompt}", answer="response"))
    instructed = attach(TextDataModule(source, max_new_tokens=4))
    for stage in ("fit", "test"):
        if name == "rows.jsonl":
            templated.setup(stage)
        else:
            for data in (templated, instructed):
                with pytest.raises(UserError, match=r"row \d+: expected .* in the field 'response', received None"):
                    data.setup(stage)
    for data in (templated, instructed):
        data.setup("predict")
    assert {row.example.references for row in templated.test} == {()}
    assert {row.target for row in instructed.test} == {"" if name == "rows.jsonl" else None}


@pytest.mark.parametrize("name", ["test.jsonl", "test.csv"])
@pytest.mark.parametrize("is_label", [False, True])
def test_minus_one_is_no_label_in_any_format_unless_it_is_one(tmp_path, name, is_label):
    label = "-1" if is_label else -1
    write(tmp_path / name, [{"text": f"It was {k}.", "label": label} for k in range(4)])
    names = ["-1", "1"] if is_label else ["neg", "pos"]
    template = attach(TemplateDataModule(str(tmp_path), prompt="{text} It is", options=[f" {name}" for name in names]))
    classifier = attach(TextClassificationDataModule(str(tmp_path), text_fields="text"))
    classifier.trainer.lightning_module.label_names = names
    for data in (template, classifier):
        data.setup("predict")
        assert data.can_be_tested is is_label
        if not is_label:
            with pytest.raises(UserError, match=r"row \d: expected .* in the field 'label', received '?-1"):
                data.setup("test")
    assert {row.example.answer for row in template.test} == {0 if is_label else None}
    assert {row["labels"] for row in classifier.test} == {0 if is_label else -100}


def test_a_label_of_any_length_is_no_traceback(tmp_path):
    """Python converts no more than 4,300 digits to a number."""
    long = "7" * 5000
    source = write(tmp_path / "rows.csv", [{"text": f"It was {k}.", "label": "0" if k % 2 else long} for k in range(20)])
    for stage in ("fit", "predict"):
        template = attach(TemplateDataModule(source, prompt="{text} It is", options=[" neg", " pos"]))
        with pytest.raises(UserError, match=r"row \d+: expected one of the options .* received '7"):
            template.setup(stage)
        classifier = attach(TextClassificationDataModule(source, text_fields="text"))
        classifier.trainer.lightning_module.label_names = ["neg", "pos"]
        with pytest.raises(UserError, match=r"row \d+: expected one of the labels neg, pos .* received '7"):
            classifier.setup(stage)
    assert find_labels(load_splits(source)["train"](), "label") == ["0", long]


def test_minus_one_may_be_the_answer(tmp_path):
    source = write(tmp_path / "rows.csv", [{"text": "2 - 3 =", "answer": "-1"}])
    data = attach(TemplateDataModule(source, prompt="{text}", answer="answer"))
    data.setup("predict")
    assert data.test[0].example.references == ("-1",)
    sst2 = attach(PromptDataModule("SST2", write(tmp_path / "sst2.tsv", [{"sentence": "Fine.", "label": "-1"}])))
    sst2.setup("predict")
    assert sst2.test[0].example.answer is None


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_no_part_of_a_row(tmp_path):
    (tmp_path / "rows.csv").write_bytes("\ufefftext,label\r\nfine,pos\r\n\r\nbad,neg\r\n".encode())
    rows = [{"text": "fine", "label": "pos"}, {"text": "bad", "label": "neg"}]
    assert list(load_splits(str(tmp_path / "rows.csv"))["train"]()) == rows


@pytest.mark.filterwarnings("default")  # as outside of tests, where a warning is no error
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\nwell, bad,neg\nfine, good,pos\n", "Length of header or names does not match"),
        ("text,text\nfine,pos\n", "columns of the same name, text, text"),
    ],
)
def test_no_cell_of_a_csv_file_is_dropped_in_silence(tmp_path, text, message):
    """A comma in a text without quotes makes one more cell; of two columns of one name, a row would have the last."""
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_splits(str(tmp_path / "rows.csv"))["train"]()


def test_a_split_is_one_file_or_its_numbered_parts(tmp_path):
    for name in ("train.csv", "train.jsonl"):
        write(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=r"expected one file for each split in .*, received train\.csv and train\.jsonl$"):
        load_splits(str(tmp_path))


def test_a_split_that_is_not_asked_for_is_not_read(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    (tmp_path / "notes.json").write_text("no rows")
    assert len(load_splits(str(tmp_path))["train"]()) == len(ROWS)


def test_the_process_that_prepares_the_rows_of_many_reads_those_of_its_command(tmp_path):
    """Rows without answers are for predict alone; ``str`` of Lightning's stage is not its name."""
    source = write(tmp_path / "rows.jsonl", [{"prompt": "Is it?", "response": None}])
    data = attach(TextDataModule(source, chat_template=False))
    data.trainer.world_size, data.trainer.state = 2, TrainerState(fn=TrainerFn.PREDICTING)
    data.prepare_data()
    assert len(data.test) == 1


def test_a_folder_holds_a_file_a_split_in_any_format(tmp_path):
    for k, name in enumerate(["train.csv", "dev.json", "Test.parquet"]):
        write(tmp_path / name, [{"text": f"It was {k}.", "label": "pos"}, {"text": f"Is it {k}?", "label": "neg"}])
    for k, name in enumerate(["own-00000-of-00002.jsonl", "own-00001-of-00002.jsonl"]):
        write(tmp_path / name, ROWS[k : k + 1])
    splits = load_splits(str(tmp_path))
    assert {split: next(iter(rows()))["text"] for split, rows in splits.items()} == {
        "train": "It was 0.",
        "dev": "It was 1.",
        "test": "It was 2.",
        "own": "NA",
    }
    assert list(splits["own"]()) == ROWS[:2]
    data = attach(TextDataModule(str(tmp_path)))
    data.setup("fit")
    data.setup("test")
    assert [data.tokenizer.decode(part[0]["input_ids"][1:-1]) for part in (data.train, data.val, data.test)] == [
        f"It was {k}." for k in range(3)
    ]
    with pytest.raises(UserError, match=r"data\.val_split: expected one of the splits .*, received 'no'$") as caught:
        attach(TextDataModule(str(tmp_path), val_split="no")).setup("fit")
    assert all(split in str(caught.value) for split in splits)


@pytest.mark.parametrize(("name", "text"), [("test.jsonl", "{"), ("test.jsonl", ""), ("test.csv", "\0a")])
def test_test_rows_that_cannot_be_read_are_refused_before_training(tmp_path, name, text):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "validation.jsonl", ROWS)
    (tmp_path / name).write_text(text, encoding="utf-16")
    data = attach(TextDataModule(str(tmp_path)))
    with pytest.raises(UserError, match=name):
        data.setup("fit")


def test_a_quote_in_a_tsv_file_does_not_join_rows(tmp_path):
    (tmp_path / "rows.tsv").write_text('label\ttext\n1\t"I loved it.\n0\tAnd so will you."\n')
    with pytest.raises(UserError, match=r"rows.tsv: expected cells without tabs; one that begins"):
        load_splits(str(tmp_path / "rows.tsv"))["train"]()
    (tmp_path / "rows.tsv").write_text('label\ttext\n1\t"""I"" loved it.\nYes."\n')
    assert list(load_splits(str(tmp_path / "rows.tsv"))["train"]()) == [{"label": "1", "text": '"I" loved it.\nYes.'}]


ASKED = {"role": "user", "content": "Is it?"}


@pytest.mark.parametrize(
    ("name", "row", "can_be_tested"),
    [
        ("test.jsonl", {"text": "It was."}, True),
        ("test.jsonl", {"prompt": "Is it?", "response": "No"}, True),
        ("test.jsonl", {"prompt": "Is it?"}, False),
        ("test.jsonl", {"prompt": "Is it?", "response": None}, False),
        ("test.csv", {"prompt": "Is it?", "response": ""}, False),
        ("test.jsonl", {"messages": [ASKED, {"role": "assistant", "content": "No"}]}, True),
        ("test.jsonl", {"messages": [ASKED]}, False),
        ("dev.jsonl", {"prompt": "Is it?"}, False),
    ],
)
def test_test_needs_a_text_a_response_or_a_last_turn_of_the_assistants(tmp_path, name, row, can_be_tested):
    write(tmp_path / "train.jsonl", [{"text": "It was."}])
    assert attach(TextDataModule(str(tmp_path))).can_be_tested  # by rows of the train split
    write(tmp_path / name, [row])
    data = attach(TextDataModule(str(tmp_path), test_split=name.partition(".")[0]))
    data.tokenizer.chat_template = tiny.CHAT
    assert data.can_be_tested is can_be_tested


# ---------------------------------------------------------------------- the parts of one file


def test_a_size_beside_a_named_split_is_so_many_rows_of_that_split(tmp_path):
    for split in ("train", "held", "dev"):
        write(tmp_path / f"{split}.jsonl", [{"text": f"{split} {k}"} for k in range(20)])
    data = attach(TextDataModule(str(tmp_path), val_split="held", val_size=5, test_split="dev", test_size=0.5))
    for stage in ("fit", "test"):
        data.setup(stage)
    texts = [
        [data.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in part] for part in (data.val, data.test)
    ]
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 5, 10]
    assert {text.partition(" ")[0] for text in texts[0]} == {"held"}
    assert {text.partition(" ")[0] for text in texts[1]} == {"dev"}
    data.setup("predict")
    assert [row.prompt for row in data.test] == sorted(
        {text.strip() for text in texts[1]}, key=lambda text: int(text.split()[1])
    )


def labelled(n_rows, shares=(0.9, 0.1)):
    labels = [name for name, share in zip(("pos", "neg"), shares, strict=True) for _ in range(round(n_rows * share))]
    return [{"text": f"It was {k}.", "label": label} for k, label in enumerate(labels)]


def template(source, **arguments):
    return attach(TemplateDataModule(source, prompt="{text}", options=[" neg", " pos"], **arguments))


def parts(data):
    for stage in ("fit", "test"):
        data.setup(stage)
    return [[row.example.prompt for row in part] for part in (data.train, data.val, data.test)]


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({}, [160, 20, 20]),
        ({"val_size": 0.25, "test_size": 7}, [143, 50, 7]),
        ({"train_size": 0.5}, [100, 20, 20]),
        ({"train_size": 30, "val_size": 0.001}, [30, 1, 20]),
        ({"train_size": 1, "val_size": 1}, [1, 1, 20]),
    ],
)
def test_one_file_is_split_by_the_seed_in_numbers_or_shares(tmp_path, arguments, sizes):
    source = write(tmp_path / "rows.csv", labelled(200))
    first, again, other = (parts(template(source, split_seed=seed, **arguments)) for seed in (0, 0, 1))
    assert [len(part) for part in first] == sizes
    assert len({prompt for part in first for prompt in part}) == sum(sizes)
    assert first == again
    assert first[0] != other[0]
    prompted = PromptDataModule("SST2", write(tmp_path / "sst2.csv", [{"sentence": "a", "label": k % 2} for k in range(200)]))
    prompted = attach(prompted)
    prompted.setup("fit")
    prompted.setup("test")
    assert [len(part) for part in (prompted.train, prompted.val, prompted.test)] == [160, 20, 20]


def test_a_folder_with_one_file_is_split_as_the_file_is(tmp_path):
    source = write(tmp_path / "rows" / "train.csv", labelled(200))
    assert parts(template(source)) == parts(template(str(tmp_path / "rows")))
    write(tmp_path / "rows" / "test.csv", labelled(10))
    train, val, test = parts(template(str(tmp_path / "rows")))
    assert [len(train), len(val), len(test)] == [180, 20, 10]
    write(tmp_path / "rows" / "validation.csv", labelled(30))
    train, val, test = parts(template(str(tmp_path / "rows")))
    assert [len(train), len(val), len(test)] == [200, 30, 10]
    assert train == [row["text"] for row in labelled(200)]  # nothing is drawn
    assert len(parts(template(str(tmp_path / "rows"), test_split="validation"))[2]) == 30


def test_each_part_of_a_labelled_file_has_the_same_share_of_each_label(tmp_path):
    source = write(tmp_path / "rows.csv", [*labelled(200), {"text": "Rare.", "label": "rare"}])
    module = Labelled(source, text_fields="text")
    data = attach(module)
    for stage in ("fit", "test"):
        data.setup(stage)
    counts = [Counter(row["labels"] for row in part) for part in (data.train, data.val, data.test)]
    assert [[count[0], count[1]] for count in counts] == [[16, 144], [2, 18], [2, 18]]
    assert [count[2] for count in counts] == [1, 0, 0]  # what is rare is trained on


@pytest.mark.parametrize("row", [{}, {"label": None}])
def test_a_part_of_an_unlabelled_train_file_is_predicted(tmp_path, row):
    write(tmp_path / "train.jsonl", [{"text": f"It was {k}."} | row for k in range(20)])
    data = attach(Labelled(str(tmp_path), text_fields="text"))
    data.setup("predict")
    assert [row["labels"] for row in data.test] == [-100, -100]


class Labelled(TextClassificationDataModule):
    """Knows three labels."""

    label_names = ["neg", "pos", "rare"]  # noqa: RUF012


def test_groups_are_spread_evenly_and_no_group_is_chance_alone():
    groups = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    for part, size in zip(draw(100, [50, 30, 20], 3, "rows", groups), [50, 30, 20], strict=True):
        count = Counter(groups[place] for place in part)
        assert all(abs(count[name] - size * share) <= 1 for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)))
    drawn, alike = draw(100, [50, 30], 3, "rows"), draw(100, [50, 30], 3, "rows", [None] * 100)
    assert all((one == other).all() for one, other in zip(drawn, alike, strict=True))


BAD_SIZES = [
    ({"val_size": 0.6, "test_size": 0.6}, r"expected at least 241 rows, received 200"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_SIZES)
def test_sizes_that_cannot_be_are_named(tmp_path, arguments, message):
    source = write(tmp_path / "rows.csv", labelled(200))
    with pytest.raises(UserError, match=message):
        parts(template(source, **arguments))
    with pytest.raises(UserError, match=r"expected at least 3 rows, received 2"):
        parts(template(write(tmp_path / "two.csv", labelled(2, (0.5, 0.5)))))


# ---------------------------------------------------------------------- from a file to an exported model

CONFIG = """
seed_everything: 0
model:
  class_path: COLASequenceClassifier
  init_args: {model_name: model, target_modules: [query, value], rank: 2}
data:
  class_path: TextClassificationDataModule
  init_args: {source: reviews.csv, text_fields: text, batch_size: 8}
chain: {every_n_epochs: 1}
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""
VERDICTS = ["positive", "negative", "mixed"]


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    tiny.folder("model", "bert", "AutoModel")
    rows = [{"id": k, "text": f"It was {VERDICTS[k % 3]}, {k} times.", "label": VERDICTS[k % 3]} for k in range(90)]
    write(tmp_path / "reviews.csv", rows)
    write(tmp_path / "new.tsv", [{"text": row["text"]} for row in rows[:5]])
    Path("config.yaml").write_text(CONFIG)


def told(out, beginning):
    """The command that a line of the output tells, as words."""
    (line,) = [line for line in out.splitlines() if line.startswith(beginning)]
    return line.partition(": cola ")[2].split()


@pytest.mark.usefixtures("_folder")
def test_a_csv_of_names_becomes_a_tested_and_exported_model_by_the_commands_that_are_told(capfd):
    assert main(["fit", "--config", "config.yaml"]) == 0
    out = capfd.readouterr().out
    assert "reviews.csv: 72 rows for training, 9 for validation, 9 for test, by data.split_seed" in out
    test = told(out, "use it")
    assert test[0] == "test"
    assert main(test) == 0
    assert main(["predict", *test[1:], "--data.source", "new.tsv"]) == 0
    (path,) = Path("runs").rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["index"], row["target"]) for row in rows] == [(k, None) for k in range(5)]
    assert {row["prediction"] for row in rows} <= set(VERDICTS)

    expected = dict(enumerate(sorted(VERDICTS)))
    checkpoint = ["--checkpoint", test[-1]]
    for format_ in ("merged", "peft", "chain"):
        assert main(["export", *checkpoint, "--format", format_, "--output", format_]) == 0
    config = json.loads(Path("merged", "config.json").read_text())
    assert config["id2label"] == {str(place): name for place, name in expected.items()}
    assert config["label2id"] == {name: place for place, name in expected.items()}
    classify = transformers.pipeline("text-classification", model="merged")
    predicted = classify([f"It was {VERDICTS[k % 3]}, {k} times." for k in range(5)])
    assert [row["label"] for row in predicted] == [row["prediction"] for row in rows]
    labels = json.loads(Path("peft", "labels.json").read_text())
    names = {"id2label": dict(enumerate(labels)), "num_labels": 3}
    assert transformers.AutoModelForSequenceClassification.from_pretrained("peft", **names).config.id2label == expected
    assert Chain.load("chain").base.labels == labels


@pytest.mark.usefixtures("_folder")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")  # Lightning's advice about folders that are used again
def test_what_a_fit_tells_last_fits_a_test_file_without_labels(capfd):
    rows = list(load_splits("reviews.csv")["train"]())
    write(Path("rows", "train.csv").absolute(), rows)
    write(Path("rows", "test.csv").absolute(), [{"text": row["text"]} for row in rows[:4]])
    assert main(["fit", "--config", "config.yaml", "--data.source", "rows"]) == 0
    predict = told(capfd.readouterr().out, "use it")
    assert predict[0] == "predict"
    assert main(predict) == 0
    assert main(["test", *predict[1:]]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == "error: data.label_field: expected one of the columns text, received none"


# ---------------------------------------------------------------------- what is wrong with a file


CSV = "text,label\nfine,pos\n"
BAD = {
    "column.csv": (
        "review,label\nfine,pos\n" * 9,
        "data.text_fields: expected one or two of the columns review",
    ),
    "unlabelled.csv": ("text\nfine\n", "data.label_field: expected one of the columns text, received none"),
    "some.csv": (
        CSV + "bad,neg\nfine,pos\n" * 9 + "so,\n" * 9,
        r"row \d\d: expected a label in the field 'label', received None",
    ),
    "number.jsonl": (
        "".join(json.dumps({"text": 3, "label": k % 2}) + "\n" for k in range(9)),
        r"row \d: expected text in the field 'text', received 3",
    ),
    "one.csv": (CSV + "fine,pos\n" * 9, "model.num_labels: expected at least 2 labels in the data, received pos"),
    "more.csv": ("text,label\na,b\na,b,c\n", "data.source: expected rows that can be read, received .*more.csv"),
    "broken.jsonl": ('{"text": "a"}\n{"text\n', "data.source: expected rows that can be read, received .*broken.jsonl"),
    "empty.jsonl": ("", "data.source: expected rows that can be read, received .*empty.jsonl': it is empty"),
    "empty.csv": ("", "data.source: expected rows that can be read, received .*empty.csv': it is empty"),
    "rows.xlsx": ("", "data.source: expected a file that ends in .csv, .tsv, .*, received .*rows.xlsx"),
}


class Learner:
    """What a classifier knows of its labels, as the data module sees it."""

    label_names = None

    def settle_labels(self, found):
        if len(found) < 2:
            raise UserError(f"model.num_labels: expected at least 2 labels in the data, received {', '.join(found)}")
        self.label_names = found


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_text(content)
    data = attach(TextClassificationDataModule(str(tmp_path / name), text_fields="text"))
    module = Learner()
    module.tokenizer, module.seed = data.trainer.lightning_module.tokenizer, 3
    data.trainer.lightning_module = module
    with pytest.raises(UserError, match=message) as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_file_is_not_asked_for_on_the_hub():
    with pytest.raises(UserError, match=r"data\.source: expected a file, a folder or a data set .* received 'no_such.csv'"):
        load_splits("no_such.csv")["train"]()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("cls", [TextDataModule, TextClassificationDataModule])
def test_several_processes_make_the_same_rows(tmp_path, cls):
    source = write(tmp_path / "rows.csv", labelled(40))

    def prepared(**arguments):
        data = attach(cls(source, **arguments))
        module = SimpleNamespace(tokenizer=tiny.tokenizer(), seed=3, label_names=["neg", "pos"], are_names_given=False)
        data.trainer.lightning_module = module
        data.setup("fit")
        return data.train[:]

    alone = prepared()
    datasets.disable_caching()
    try:
        assert prepared(num_proc=2) == alone
    finally:
        datasets.enable_caching()


def test_rows_are_tokenized_once_and_again_for_another_text_tokenizer_or_format(tmp_path, monkeypatch):
    """In Arrow, under a fingerprint of all that the tokens depend on."""
    calls = []
    encode = TextDataModule._encode
    monkeypatch.setattr(TextDataModule, "_encode", lambda *args: calls.append(1) or encode(*args))

    def prepared(source, tokenizer=None, **arguments):
        data = TextDataModule(source, val_size=2, test_size=2, **arguments)
        module = SimpleNamespace(tokenizer=tokenizer or tiny.tokenizer(), seed=3)
        data.trainer = SimpleNamespace(lightning_module=module, training=False, world_size=1, global_rank=0)
        calls.clear()
        data.setup("fit")
        assert data.train.cache_files  # memory-mapped
        return len(calls), data.train[:]["input_ids"]

    source = write(tmp_path / "rows.jsonl", [{"text": f"The town is {k} years old."} for k in range(20)])
    first, ids = prepared(source)
    assert first == 2  # of training and of validation
    assert prepared(source) == (0, ids)
    longer = tiny.tokenizer()
    longer.add_tokens(["own is"])
    for other in ({"tokenizer": longer}, {"max_length": 5}, {"split_seed": 1}):
        assert prepared(source, **other)[0] == 2
    write(tmp_path / "rows.jsonl", [{"text": f"The town is {k} days old."} for k in range(20)])
    again, other = prepared(source)
    assert (again, other == ids) == (2, False)
