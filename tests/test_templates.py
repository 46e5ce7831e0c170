"""A task without code: what becomes of a row, and the runs that it is fitted, tested and predicted in."""

import csv
import json
import sys
from pathlib import Path

import datasets
import pytest
from sklearn.metrics import f1_score

from cola_lightning import COLACausalLM, TemplateDataModule, UserError
from cola_lightning.cli import main
from tests import tiny
from tests.toy import trainer

CHAT = tiny.CHAT


def examples(rows, folder, own=None, stage="test", **arguments):
    """The rows as the data module encodes them, and the data module."""
    data = TemplateDataModule(tiny.write_rows(folder, rows), **arguments)
    tiny.set_up(data, own or tiny.chat_tokenizer(None), stage)
    return data.train if stage == "fit" else data.test, data


ROW = {"text": "It was {old}.", "size": 3, "share": 0.5, "label": 1, "by": {"name": "Al", "town": {"name": "Oslo"}}}
ROW |= {"all": ["red", "blue"], "answers": {"text": ["blue", "navy"]}, "gold": "blue", "empty": "", "none": None}
FIXED = {"options": [" no", " yes"]}

MADE = [
    ({"prompt": "{text} Is it?", **FIXED}, "It was {old}. Is it?", (" no", " yes"), 1, ()),
    ({"prompt": "Is it?", "options": [" red", " blue "], "label": "gold"}, "Is it?", (" red", " blue "), 1, ()),
    ({"prompt": "Is it?", "options": "all", "label": "gold"}, "Is it?", (" red", " blue"), 1, ()),
    ({"prompt": "Is it?\n", "options": "all", "label": "gold"}, "Is it?\n", ("red", "blue"), 1, ()),
    ({"prompt": "Is it?", "options": ["no", " yes"]}, "Is it?", (" no", " yes"), 1, ()),
    ({"prompt": "Is it?", "options": "all", "label": "gold", "delimiter": ""}, "Is it?", ("red", "blue"), 1, ()),
    ({"prompt": "Is it?", "options": "all", "label": "gold", "delimiter": ": "}, "Is it?", (": red", ": blue"), 1, ()),
    ({"prompt": "Which?", "answer": "gold", "delimiter": "\n"}, "Which?", ("\nblue\n",), 0, ("blue",)),
    ({"prompt": "Is it?", "options": [" {by.name}", " {gold} {{}}"]}, "Is it?", (" Al", " blue {}"), 1, ()),
    ({"prompt": "Is it?", "options": "answers.text"}, "Is it?", (" blue", " navy"), 1, ()),
    ({"prompt": "{by.town.name}, {{{size}}} {share}{empty}:", **FIXED}, "Oslo, {3} 0.5:", (" no", " yes"), 1, ()),
    ({"prompt": "Which?", "answer": "gold"}, "Which?", (" blue\n",), 0, ("blue",)),
    ({"prompt": "Which?", "answer": "answers.text"}, "Which?", (" blue\n",), 0, ("blue", "navy")),
    ({"prompt": "Which?", "answer": "empty"}, "Which?", (" \n",), 0, ("",)),
]


@pytest.mark.parametrize(("arguments", "prompt", "options", "answer", "references"), MADE)
def test_a_row_becomes_a_prompt_with_options_or_an_answer(tmp_path, arguments, prompt, options, answer, references):
    (row,), data = examples([ROW], tmp_path, **arguments)
    made = row.example
    assert (made.prompt, made.options, made.answer, made.references) == (prompt, options, answer, references)
    assert made.place.endswith("test, row 1")
    assert data.loss == data.collate([row])["loss"] == ("answer" if references else "options")


@pytest.mark.parametrize(
    ("label", "options", "place"),
    [
        (0, [" 1", " 2"], 0),
        (True, [" no", " yes"], 1),
        (1.0, [" no", " yes"], 1),  # a column of pandas with missing values
        ("2", [" 1", " 2", " 3"], 1),
        ("2", [" no", " maybe", " yes"], 2),
        (3, [" 0", " 1", " 2", " 3"], 3),  # the index of its text
        (2, [" 1", " 2", " 3"], None),
        (2.0, [" 1", " 2", " 3"], None),
        (True, [" True", " False"], None),
        ("0", [" 1", " 2"], None),  # in a CSV file
    ],
)
def test_a_number_is_an_index_unless_it_is_the_text_of_another_option(tmp_path, label, options, place):
    """A CSV file, whose values are text, would else mean another option."""
    asked = {"prompt": "Is it?", "options": options}
    if place is None:
        with pytest.raises(
            UserError, match=r"the label .* write it as text: .*row 1|the field 'label' is .*, not one of.*row 1"
        ):
            examples([{"label": label}], tmp_path, **asked)
    else:
        ((row,), _) = examples([{"label": label}], tmp_path, **asked)
        assert row.example.answer == place


def test_a_class_index_is_an_index_whatever_the_options(tmp_path):
    kind = datasets.ClassLabel(names=["1 star", "2 stars", "3 stars"])
    rows = datasets.Dataset.from_list([{"label": k % 3} for k in range(3)])
    rows.cast_column("label", kind).to_parquet(tmp_path / "own.parquet")
    made, _ = examples([{"label": 0}], tmp_path, prompt="Is it?", options=[" 1", " 2", " 3"], test_split="own")
    assert [row.example.answer for row in made] == [0, 1, 2]


def test_a_row_is_unusable_whose_field_is_inside_a_missing_one(tmp_path):
    whole = {"a": {"b": "It was."}, "label": 1}
    rows = [whole] * 99 + [whole | {"a": None}]
    made, _ = examples(rows, tmp_path, prompt="{a.b}", **FIXED)
    assert len(made) == 99
    rows[98] = rows[99]
    with pytest.raises(UserError, match=r"2 of 50 rows cannot be used, .*\(the field 'a' is null, not an object: .*row 49\)"):
        examples(rows[50:], tmp_path, prompt="{a.b}", max_skipped=0.03, **FIXED)


def test_the_loss_of_an_answer_needs_the_right_option_alone_in_training(tmp_path):
    for asked, trained, validated in [
        ({"loss": "answer", **FIXED}, (" yes",), (" no", " yes")),
        ({"loss": "options", **FIXED}, (" no", " yes"), (" no", " yes")),
        ({"answer": "gold"}, (" blue\n",), (" blue\n",)),
    ]:
        (row,), data = examples([ROW], tmp_path, stage="fit", prompt="Is it?", **asked)
        assert (row.example.options, data.val[0].example.options) == (trained, validated)
        assert data.collate([row])["loss"] == asked.get("loss", "answer")


def test_a_space_that_joins_options_is_said_once_and_is_in_the_stored_options(tmp_path, caplog):
    caplog.set_level("INFO")
    _, data = examples([ROW] * 3, tmp_path, prompt="{text} Is it?", options=["no", "yes"])
    assert [one for one in caplog.messages if "data.delimiter" in one] == ["a space joins prompt and option (data.delimiter)"]
    assert data.prompt_format["options"] == [" no", " yes"]
    caplog.clear()
    examples([ROW], tmp_path, prompt="{text} Is it?", **FIXED)
    assert "data.delimiter" not in caplog.text


def test_the_format_of_prompts_is_known_without_validation_rows(tmp_path):
    """Checkpoints store it, for generation."""
    for asked in ({"loss": "answer", **FIXED}, {"options": "all"}, {"loss": "answer", "options": "all"}, {"answer": "gold"}):
        formats = []
        for val_size in (None, 0):
            rows = [ROW, ROW | {"all": ["blue", "grey"]}]
            _, data = examples(rows, tmp_path, stage="fit", prompt="Is it?", label="label", val_size=val_size, **asked)
            formats.append(data.prompt_format)
        assert formats[0] == formats[1] != {}


def test_a_chat_template_is_around_the_prompt_and_the_option_is_what_the_assistant_says(tmp_path):
    own = tiny.chat_tokenizer(CHAT)
    asked = {"apply_chat_template": True, "max_length": 80}
    ((row,), _) = examples([ROW], tmp_path, own, prompt="{text} Is it?", options=["no", "yes it is"], **asked)
    before = "<s>[user]\nIt was {old}. Is it?</s>\n[assistant]\n"
    n_before = len(own(before, add_special_tokens=False)["input_ids"])
    prefixes = [row.prefixes[place] for place in row.prefix_of]
    for option, prefix, ids in zip(row.example.options, prefixes, row.option_ids, strict=True):
        whole = own(before + option, add_special_tokens=False)["input_ids"]
        assert (prefix, ids) == (whole[:-1], whole[n_before:])
    assert row.example.prompt == "It was {old}. Is it?"
    ((row,), _) = examples([ROW], tmp_path, own, prompt="Which?", answer="gold", **asked)
    assert own.decode(row.prompt_ids) == "<s>[user]\nWhich?</s>\n[assistant]\n"
    assert own.decode(row.prefixes[0] + row.option_ids[0][-1:]) == "<s>[user]\nWhich?</s>\n[assistant]\n blue\n"
    long = {"text": "The river is long. " * 50, "label": 0}
    ((row,), _) = examples([long], tmp_path, own, prompt="{text}Is it?", options=["a", "b"], **asked)
    assert 70 < len(row) < 80
    assert own.decode(row.prefixes[0]).startswith("<s>[user]\n")
    assert own.decode(row.prefixes[0]).endswith("long. Is it?</s>\n[assistant]\n")


# ---------------------------------------------------------------------- runs

VERDICTS = ["Yes", "No", "Perhaps"]
TOWNS = [{"by": {"name": "Al"}, "size": k, "verdict": VERDICTS[k % 3], "kinds": VERDICTS, "target": 7} for k in range(16)]
NEW = [row if k % 2 else {name: value for name, value in row.items() if name != "verdict"} for k, row in enumerate(TOWNS)]
NEW[1] = NEW[1] | {"verdict": None}
ASKED = {"prompt": "{by.name}'s mat is {size} {{m}}. Is it big?\n", "label": "verdict", "batch_size": 4}
CONFIG = f"""
seed_everything: 0
model:
  class_path: COLACausalLM
  init_args: {{model_name: model, target_modules: [q_proj, v_proj], rank: 2}}
data:
  class_path: TemplateDataModule
  init_args: {json.dumps(ASKED | {"options": VERDICTS, "source": "rows", "metric": "f1"})}
chain: {{every_n_epochs: 1}}
trainer: {{max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}}
"""


def test_a_task_in_yaml_is_fitted_tested_and_predicted_also_without_targets(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    tiny.folder("model", "opt")
    tiny.write_rows(Path("rows"), TOWNS)
    Path("new.json").write_text(json.dumps(NEW))
    Path("config.yaml").write_text(CONFIG)
    run = ["--config", "runs/version_0/config.yaml", "--ckpt_path", "runs/version_0/checkpoints/last.ckpt"]
    for words in (["fit", "--config", "config.yaml"], ["test", *run], ["predict", *run]):
        assert main(words) == 0, capfd.readouterr().err
    assert "accuracy" not in capfd.readouterr().out
    (path,) = Path("runs").rglob("predictions.jsonl")
    rows = tiny.read_rows(path)
    tables = [csv.DictReader(path.read_text().splitlines()) for path in Path("runs").rglob("metrics.csv")]
    measured = [float(row["test_f1"]) for table in tables for row in table if row.get("test_f1")]
    expected = f1_score([row["target"] for row in rows], [row["prediction"] for row in rows], average="macro")
    assert measured == pytest.approx([expected])
    assert [row["prompt"] for row in rows] == [f"Al's mat is {k} {{m}}. Is it big?\n" for k in range(16)]
    assert [row["target"] for row in rows] == [row["verdict"] for row in rows] == [VERDICTS[k % 3] for k in range(16)]
    assert [row["size"] for row in rows] == [row["index"] for row in rows] == [*range(16)]
    path.unlink()
    assert main(["predict", *run, "--data.source", "new.json"]) == 0
    (path,) = Path("runs").rglob("predictions.jsonl")
    targets = [row["target"] for row in tiny.read_rows(path)]
    assert targets == [None, None, *(VERDICTS[k % 3] if k % 2 else None for k in range(2, 16))]
    capfd.readouterr()
    for subcommand in ("fit", "test"):
        assert main([subcommand, "--config", "config.yaml", "--data.source", "new.json", "--data.test_size", "8"]) == 2
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert "'verdict' is null" in last
        assert "new.json, row " in last


@pytest.mark.parametrize(
    ("asked", "metric", "targets"),
    [({"options": "kinds"}, "accuracy", VERDICTS), ({"answer": "verdict"}, "exact_match", [[name] for name in VERDICTS])],
)
def test_so_is_one_whose_options_are_in_a_field_or_whose_answer_is_written(tmp_path, asked, metric, targets):
    module = COLACausalLM(tiny.folder(tmp_path / "model", "opt"), target_modules=["q_proj"], rank=2, seed=0)
    data = TemplateDataModule(tiny.write_rows(tmp_path / "rows", TOWNS), **ASKED, **asked, metric=metric)
    (measured,) = trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert set(measured) == {"val_loss", f"val_{metric}"}
    (tmp_path / "new.json").write_text(json.dumps(NEW))
    new = TemplateDataModule(str(tmp_path / "new.json"), **ASKED, **asked)
    batches = trainer(tmp_path).predict(module, datamodule=new)
    found = [target for batch in batches for target in batch["target"]]
    assert found == [None, None, *(targets[k % 3] if k % 2 else None for k in range(2, 16))]
