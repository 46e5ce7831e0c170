"""Labels of rows, whatever a data set has in their column: the same label is the same class in a CSV and in a JSON file."""

from collections import Counter

import pytest
from transformers import CanineTokenizer

from cola_lightning import COLASequenceClassifier, PromptDataModule, TemplateDataModule, TextClassificationDataModule, UserError
from tests.helpers import tiny
from tests.helpers.toy import trainer


def write(path, labels):
    """A file of a sentence per label, in the format of its name."""
    return tiny.write_file(path, [{"sentence": f"It was {k}.", "label": label} for k, label in enumerate(labels)])


@pytest.fixture(params=["csv", "jsonl"])
def path(request, tmp_path):
    return tmp_path / f"rows.{request.param}"


in_csv = pytest.mark.parametrize("path", ["csv"], indirect=True)


def fitted(path, values, *, module=(), **arguments):
    """The labels that a classifier gets from these rows, and its data module after the setup of a fit."""
    name, options = tiny.folder(path.parent / "roberta", "roberta", "AutoModel"), {"rank": 2, "seed": 0} | dict(module)
    module = COLASequenceClassifier(name, target_modules=tiny.targets("roberta"), **options)
    data = TextClassificationDataModule(write(path, values), **arguments)
    run = trainer(path.parent, max_steps=0, num_sanity_val_steps=0)
    run.fit(module, datamodule=data)
    return module.label_names, data


@pytest.mark.parametrize("odd", [0.5, None, -1])
def test_a_row_with_an_odd_label_is_skipped_and_counted(path, caplog, odd):
    caplog.set_level("INFO", "cola_lightning")
    if path.suffix == ".csv" and odd == 0.5:
        odd = ""  # in a CSV file, 0.5 is a name
    names, data = fitted(path, [k % 2 for k in range(40)] + [odd])
    assert names == ["0", "1"]
    assert len(data.train) + len(data.val) == 40
    assert "1 skipped (the field 'label' is" in caplog.text
    assert "2 labels: 0, 1\n" in caplog.text


def test_a_fit_says_which_labels_there_are_for_scores_or_spellings_are_labels_too(path, caplog):
    caplog.set_level("INFO", "cola_lightning")
    fitted(path, ["Yes", "yes", "No"] * 9)
    assert "3 labels: No, Yes, yes\n" in caplog.text


def test_minus_one_is_no_label_unless_it_is_one_of_the_models(path):
    labels, own = [-1, 0, 1] * 20, tiny.chat_tokenizer(None)
    with pytest.raises(UserError, match=r"'label' is '-1', not a label \(for a class -1, list it in model\.label_names\)"):
        fitted(path, labels)
    names, data = fitted(path, labels, module={"label_names": ["-1", "0", "1"]})
    assert names == ["-1", "0", "1"]
    assert {*data.train["labels"]} == {0, 1, 2}
    assert fitted(path, [-1, 1] * 20, module={"label_names": ["-1", "1"]})[0] == ["-1", "1"]
    source = write(path, [-1] * 20)
    for data in (PromptDataModule("SST2", source), TemplateDataModule(source, prompt="{sentence}", options=["no", "yes"])):
        tiny.set_up(data, own, "predict")
        assert [row.example.answer for row in data.test] == [None] * 20
        with pytest.raises(UserError, match=r"the field 'label' is '-1', not "):
            tiny.set_up(data, own, "fit")


def test_predicting_needs_no_label(path):
    """A fit skips a row whose label is outside the options or the classes; predict gives it no target."""
    labels, own = ["no", "yes"] * 20 + ["perhaps"], tiny.chat_tokenizer(None)
    source = write(path, labels)
    template = TemplateDataModule(source, prompt="{sentence}", options=["no", "yes"])
    classes = TextClassificationDataModule(source)
    classes.label_names = ["no", "yes"]
    for data in (template, classes):
        tiny.set_up(data, own, "fit", "predict")
        assert len(data.train) + len(data.val) == 40
    assert [row.example.answer for row in template.test] == [0, 1] * 20 + [None]
    assert [*classes.test["labels"]] == [0, 1] * 20 + [-100]
    task = tiny.set_up(PromptDataModule("SST2", write(path, [*[0, 1] * 20, 7])), own, "fit", "predict")
    assert [row.example.answer for row in task.test] == [0, 1] * 20 + [None]


NAMES = ["math", "network", "files"]
DIRTY = [*NAMES * 20, "Math", "sports"]


@in_csv
def test_rows_whose_label_is_none_of_the_models_are_skipped(path, caplog):
    caplog.set_level("INFO", "cola_lightning")
    names, data = fitted(path, DIRTY, module={"label_names": NAMES})
    assert names == NAMES
    counts = [sorted(Counter([*part["labels"]]).values()) for part in (data.train, data.val)]
    assert counts == [[18, 18, 18], [2, 2, 2]]
    assert data._report.n_skipped == 2


@pytest.mark.parametrize("is_slow", [False, True])
def test_the_tokens_that_a_pair_loses_are_those_that_it_has_more_and_skip_leaves_longer_ones_out(tmp_path, caplog, is_slow):
    rows = [{"a": "one two " * 9, "b": "three " * 5, "label": k % 2} for k in range(8)] + [
        {"a": "x", "b": "y", "label": k % 2} for k in range(8)
    ]
    caplog.set_level("INFO", "cola_lightning")
    source, own = tiny.write_file(tmp_path / "pairs.jsonl", rows), CanineTokenizer() if is_slow else tiny.tokenizer(pad=True)
    whole = len(own(rows[0]["a"], rows[0]["b"])["input_ids"])
    for too_long in ("shorten", "skip"):
        data = TextClassificationDataModule(
            source, text_fields=["a", "b"], max_length=16, too_long=too_long, val_size=0, max_skipped=1.0
        )
        data.trainer = tiny.process(module=tiny.stub(own, label_names=["0", "1"], num_labels=2))
        data.setup("fit")
        assert len(data.train) == (16 if too_long == "shorten" else 8)
        assert max(len(row["input_ids"]) for row in data.train) <= 16
    assert f"8 shortened by {8 * (whole - 16):,} tokens" in caplog.text


def test_labels_of_mixed_types_are_read(tmp_path):
    names, _ = fitted(tmp_path / "mixed.jsonl", [["a", 1, True][k % 3] for k in range(30)])
    assert {"a", "1"} <= {*names}
