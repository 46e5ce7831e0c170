"""A task without code, and conversations: what becomes of a row, token by token, and each mistake in one line."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sklearn.metrics import f1_score

from cola_lightning import TemplateDataModule, TextDataModule, UserError
from cola_lightning.cli import main
from cola_lightning.data.encoding import labels_of
from cola_lightning.hf.pretrained import Pretrained
from tests import tiny

CHAT = tiny.CHAT


def tokenizer(architecture="llama", chat=None, **arguments):
    made = tiny.tokenizer(architecture, **{"pad": True} | arguments)
    made.chat_template = chat
    return made


def examples(rows, tmp_path, own=None, stage="test", cls=TemplateDataModule, **arguments):
    """The rows as the data module encodes them, and the data module."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(text)
    data = cls(str(tmp_path), **arguments)
    module = SimpleNamespace(tokenizer=own or tokenizer(), seed=3)
    data.trainer = SimpleNamespace(lightning_module=module, training=False, world_size=1, global_rank=0)
    data.setup(stage)
    rows = data.train if stage == "fit" else data.test
    return [with_labels(row) if isinstance(row, dict) else row for row in rows], data


def with_labels(row):
    return {"input_ids": row["input_ids"], "labels": labels_of(row)}


ROW = {"text": "It was {old}.", "size": 3, "share": 0.5, "label": 1, "by": {"name": "Al", "town": {"name": "Oslo"}}}
ROW |= {"all": ["red", "blue"], "answers": {"text": ["blue", "navy"]}, "gold": "blue", "empty": "", "none": None}
FIXED = {"options": [" no", " yes"]}

MADE = [
    ({"prompt": "{text} Is it?", **FIXED}, "It was {old}. Is it?", (" no", " yes"), 1, ()),
    ({"prompt": "Is it?", "options": [" red", " blue "], "label": "gold"}, "Is it?", (" red", " blue "), 1, ()),
    ({"prompt": "Is it?", "options": "all"}, "Is it?", ("red", "blue"), 1, ()),
    ({"prompt": "Is it?", "options": "all", "label": "gold"}, "Is it?", ("red", "blue"), 1, ()),
    ({"prompt": "Is it?", "options": [" {by.name}", " {gold} {{}}"]}, "Is it?", (" Al", " blue {}"), 1, ()),
    ({"prompt": "Is it?", "options": "answers.text"}, "Is it?", ("blue", "navy"), 1, ()),
    ({"prompt": "{by.town.name}, {by.name}:", **FIXED}, "Oslo, Al:", (" no", " yes"), 1, ()),
    ({"prompt": "{{{size}}} {share} {{text}}", **FIXED}, "{3} 0.5 {text}", (" no", " yes"), 1, ()),
    ({"prompt": "{empty}Is it{empty}?", **FIXED}, "Is it?", (" no", " yes"), 1, ()),
    ({"prompt": "Which?", "answer": "gold"}, "Which?", (" blue\n",), 0, ("blue",)),
    ({"prompt": "Which?", "answer": "all"}, "Which?", (" red\n",), 0, ("red", "blue")),
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
        (3, [" 0", " 1", " 2", " 3"], 3),  # the index of its text
        (0, [" 1", " 2"], 0),
        (True, [" no", " yes"], 1),
        (1.0, [" no", " yes"], 1),  # a column of pandas with missing values
        (2.0, [" 1", " 2", " 3"], None),
        ("2", [" 1", " 2", " 3"], 1),
        ("2", [" no", " maybe", " yes"], 2),
        ("2", [" 1", " two", " three"], 2),
        (2, [" 1", " 2", " 3"], None),
        (4, [" 1", " 2", " 3", " 4"], None),
        (0, [" 1", " 0"], None),
        (True, [" True", " False"], None),
        (False, ["true", "false"], None),
    ],
)
def test_a_number_is_an_index_unless_it_is_the_text_of_another_option(tmp_path, label, options, place):
    """A CSV file, whose values are text, would else mean another option."""
    asked = {"prompt": "Is it?", "options": options}
    if place is None:
        message = rf"row 1: expected text, for the option '.*' has the index \d, in the field 'label', received {label}$"
        with pytest.raises(UserError, match=message):
            examples([{"label": label}], tmp_path, **asked)
        return
    (row,), _ = examples([{"label": label}], tmp_path, **asked)
    assert row.example.answer == place


@pytest.mark.parametrize("label", ["0", "3"])
def test_a_number_in_a_csv_file_that_is_none_of_the_options_which_are_numbers_is_no_index(tmp_path, label):
    with pytest.raises(UserError, match=rf"expected one of the options \['1', '2'\] in the field 'label', received '{label}'$"):
        examples([{"label": label}], tmp_path, prompt="Is it?", options=[" 1", " 2"])


WHOLE = {"a": {"b": "It was."}, "answer": {"text": "It is."}, "label": 1, "size": 1.5}


@pytest.mark.parametrize(
    ("field", "missing", "asked"),
    [
        ("a", None, {"prompt": "{a.b}", **FIXED}),
        ("answer", None, {"prompt": "{a.b}", "answer": "answer.text"}),
    ],
)
def test_a_row_is_unusable_whose_field_is_missing_or_inside_a_missing_one(tmp_path, field, missing, asked):
    rows = [WHOLE] * 99 + [WHOLE | {field: missing}]
    made, _ = examples(rows, tmp_path, **asked)
    assert len(made) == 99
    with pytest.raises(UserError, match=rf"row 50: expected .* in the field '{field}', received .* \(1 of 50 rows cannot be"):
        examples(rows[50:], tmp_path, **asked)


def test_a_class_index_is_an_index_whatever_the_options(tmp_path):
    import datasets

    kind = datasets.ClassLabel(names=["1 star", "2 stars", "3 stars"])
    rows = datasets.Dataset.from_list([{"label": k % 3} for k in range(3)])
    rows.cast_column("label", kind).to_parquet(tmp_path / "own.parquet")
    asked = {"prompt": "Is it?", "options": [" 1", " 2", " 3"], "test_split": "own"}
    made, _ = examples([{"label": 0}], tmp_path, **asked)
    assert [row.example.answer for row in made] == [0, 1, 2]


def test_the_loss_of_an_answer_needs_the_right_option_alone_in_training(tmp_path):
    asked = {"prompt": "Is it?", "loss": "answer", **FIXED}
    (row,), data = examples([ROW], tmp_path, stage="fit", **asked)
    assert (data.loss, row.example.options, data.val[0].example.options) == ("answer", (" yes",), (" no", " yes"))
    assert data.collate([row])["loss"] == "answer"
    (row,), data = examples([ROW], tmp_path, stage="fit", prompt="Is it?", loss="options", **FIXED)
    assert (data.loss, row.example.options) == ("options", (" no", " yes"))
    (row,), data = examples([ROW], tmp_path, stage="fit", prompt="Which?", answer="gold")
    assert (row.example.options, data.val[0].example.references) == ((" blue\n",), ("blue",))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # with a beginning of sentence of its own, and without
def test_a_chat_template_is_around_the_prompt_and_the_option_is_what_the_assistant_says(tmp_path, architecture):
    own = tokenizer(architecture, CHAT)
    (row,), _ = examples([ROW], tmp_path, own, prompt="{text} Is it?", options=["no", "yes it is"], apply_chat_template=True)
    before = "<s>[user]\nIt was {old}. Is it?</s>\n[assistant]\n"
    n_before = len(own(before, add_special_tokens=False)["input_ids"])
    for option, prefix, ids in zip(
        row.example.options, (row.prefixes[place] for place in row.prefix_of), row.option_ids, strict=True
    ):
        whole = own(before + option, add_special_tokens=False)["input_ids"]
        assert (prefix, ids) == (whole[:-1], whole[n_before:])
        assert whole.count(0) == 1
    assert row.example.prompt == "It was {old}. Is it?"
    (row,), _ = examples([ROW], tmp_path, own, prompt="Which?", answer="gold", apply_chat_template=True, max_length=80)
    assert own.decode(row.prompt_ids) == "<s>[user]\nWhich?</s>\n[assistant]\n"
    assert own.decode(row.prefixes[0] + row.option_ids[0][-1:]) == "<s>[user]\nWhich?</s>\n[assistant]\n blue\n"


TURNS = [("system", "Be kind."), ("user", "Is it 🏠?"), ("assistant", "Yes."), ("user", "Old?"), ("assistant", "No, נו 🏠")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def test_the_loss_of_a_conversation_is_on_what_the_assistant_says(tmp_path):
    own = tokenizer(chat=CHAT)
    row, data = examples([{"messages": MESSAGES, "id": 4}], tmp_path, own, cls=TextDataModule)
    parts = [("<s>[system]\nBe kind.</s>\n[user]\nIs it 🏠?</s>\n[assistant]\n", False), ("Yes.</s>", True)]
    parts += [("\n[user]\nOld?</s>\n[assistant]\n", False), ("No, נו 🏠</s>", True), ("\n", False)]
    ids, labels = [], []
    for text, is_said in parts:
        tokens = own(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if is_said else [-100] * len(tokens)
    assert row == [{"input_ids": ids, "labels": labels}]
    assert data.collate(list(data.test))["labels"].tolist() == [labels]
    assert own.decode([label for label in labels if label != -100]) == "Yes.</s>No, נו 🏠</s>"
    row, _ = examples([{"messages": MESSAGES}], tmp_path, own, cls=TextDataModule, max_length=12)
    assert row == [{"input_ids": ids[-12:], "labels": [-100, *labels[-11:]]}]


ASKED = [("Is it old? ", "It is."), ("Is it old?", " It is."), ("2 + 2 = ", "4"), ("Old?\n", "No, נו 🏠"), ("A\n  ", "  b")]
PAIRS = [{"prompt": prompt, "response": response} for prompt, response in ASKED]
AS_TURNS = [
    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}
    for prompt, response in ASKED
]


def test_instructions_are_in_the_chat_template_where_the_tokenizer_has_one(tmp_path, caplog):
    caplog.set_level("INFO", "cola_lightning")
    how = {"cls": TextDataModule, "stage": "fit"}
    chat, plain = tokenizer(chat=CHAT), tokenizer()
    turns, _ = examples(AS_TURNS, tmp_path, chat, **how)
    following, _ = examples(PAIRS, tmp_path, plain, **how)
    assert turns != following
    for own, asked, expected, format_, said in [
        (chat, None, turns, True, "formatted by the tokenizer's chat template (data.chat_template)"),
        (chat, True, turns, True, "formatted by the tokenizer's chat template (data.chat_template)"),
        (chat, False, following, False, "without a chat template (data.chat_template)"),
        (plain, None, following, False, "without a chat template (data.chat_template)"),
        (plain, False, following, False, "without a chat template (data.chat_template)"),
    ]:
        caplog.clear()
        rows, data = examples(PAIRS, tmp_path, own, chat_template=asked, **how)
        assert rows == expected
        assert data.prompt_format == {"kind": "response", "chat_template": format_}
        assert [line.endswith(said) for line in caplog.messages].count(True) == 1  # once, of both parts
    with pytest.raises(UserError, match=r"expected a tokenizer with a chat template"):
        examples(PAIRS, tmp_path, plain, chat_template=True, **how)
    with pytest.raises(UserError, match=r"data\.chat_template: expected null or true for conversations"):
        examples(AS_TURNS, tmp_path, chat, chat_template=False, **how)
    _, data = examples([{"text": "It is old."}], tmp_path, chat, **how)
    assert data.prompt_format == {"kind": "text", "chat_template": False}


@pytest.mark.parametrize("chat", [CHAT, None])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_a_response_is_generated_from_is_what_it_was_learned_after(tmp_path, chat, architecture):
    """Token by token: a blank at a prompt's end would else be read in one way and learned in another."""
    own = tokenizer(architecture, chat)
    learned, _ = examples(PAIRS, tmp_path, own, cls=TextDataModule)
    predicted, data = examples(PAIRS, tmp_path, own, "predict", cls=TextDataModule)
    for row, prompt, (asked, response) in zip(learned, predicted, ASKED, strict=True):
        n_before = next(k for k, label in enumerate(row["labels"]) if label != -100)
        assert prompt.prompt_ids == row["input_ids"][:n_before]
        assert own.decode(row["input_ids"][n_before:], skip_special_tokens=True).strip() == response.strip()
        assert (prompt.prompt, prompt.target) == (asked, response.strip())
    batch = data.collate(predicted)
    assert batch["end_tokens"] == ([own.eos_token_id] if chat else [])
    assert batch["decoding"]["max_new_tokens"] == 256
    assert batch["prompt_mask"].sum(-1).tolist() == [len(row.prompt_ids) for row in predicted]


def test_rows_without_a_response_are_predicted_and_not_learned(tmp_path):
    own = tokenizer(chat=CHAT)
    rows = [{"prompt": "Old?"}, {"prompt": "Old?", "response": None}, {"messages": MESSAGES[:4]}, {"messages": MESSAGES}]
    rows += [{"text": "It was "}]
    predicted = [row for one in rows for row in examples([one], tmp_path, own, "predict", cls=TextDataModule)[0]]
    targets = [None, None, None, "No, נו 🏠", None]
    prompts = ["Old?", "Old?", MESSAGES[:4], MESSAGES[:4], "It was "]
    assert [(row.prompt, row.target) for row in predicted] == list(zip(prompts, targets, strict=True))
    assert own.decode(predicted[2].prompt_ids).endswith("Yes.</s>\n[user]\nOld?</s>\n[assistant]\n")
    assert own.decode(predicted[4].prompt_ids) == "<s>It was"
    for row, message in [
        (rows[0], r"data\.columns: expected .* among the columns prompt, received none"),
        (rows[1], r"row 1: expected text in the field 'response', received None"),
        ({"prompt": "Old?", "response": ""}, r"row 1: expected a response that adds tokens to its prompt, received ''"),
        (rows[2], r"row 1: expected the assistant's turn as the last one, .* received the user's"),
    ]:
        for stage in ("fit", "test"):
            with pytest.raises(UserError, match=message):
                examples([row], tmp_path, own, stage, cls=TextDataModule)


@pytest.mark.parametrize("stop", ["END", ["END"], ("END",)])
def test_one_text_alone_is_one_stop(stop):
    assert TextDataModule("a/b", stop=stop).decoding.stop == ("END",)


@pytest.mark.parametrize("chat", [CHAT, None])
def test_a_long_prompt_loses_its_beginning_and_a_response_nothing(tmp_path, chat):
    own = tokenizer(chat=chat)
    own.model_max_length = 64
    long = "The capital of the country is the largest town. " * 9
    rows = [{"prompt": long, "response": "It is."}]
    for asked, room in (
        ({"max_length": 40, "max_new_tokens": 8}, 40),
        ({"max_new_tokens": 30}, 34),
        ({"max_new_tokens": 64}, 32),
    ):
        (row,), _ = examples(rows, tmp_path, own, "predict", cls=TextDataModule, **asked)
        assert len(row.prompt_ids) == room
        assert long.rstrip()[-20:] in own.decode(row.prompt_ids)
    (row,), _ = examples(rows, tmp_path, own, cls=TextDataModule, max_length=30)
    assert own.decode([label for label in row["labels"] if label != -100]).strip() == "It is.</s>"
    with pytest.raises(UserError, match=r"row 1: expected a response of fewer than 30 tokens"):
        examples([{"prompt": "It", "response": long}], tmp_path, own, cls=TextDataModule, max_length=30)


def test_a_long_text_loses_its_beginning_and_keeps_its_option(tmp_path):
    long = {"text": "The river is long. " * 5264, "label": 0, "messages": [MESSAGES[1], {"role": "assistant", "content": "No"}]}
    assert len(long["text"]) > 100_000
    asked = {"prompt": "{text}Is it?", "max_length": 30}
    (row,), _ = examples([long], tmp_path, options=[" no", " it is one of the longest"], **asked)
    for place in row.prefix_of:
        assert len(row.prefixes[place]) == 29
        assert row.prefixes[place][0] == 0
    assert [tokenizer().decode(ids) for ids in row.option_ids] == [" no", " it is one of the longest"]
    (row,), _ = examples([long], tmp_path, tokenizer(chat=CHAT), options=["a", "b"], apply_chat_template=True, **asked)
    assert tokenizer().decode(row.prefixes[0] + row.option_ids[0][-1:]).endswith("long. Is it?</s>\n[assistant]\na")
    assert len(row) == 29
    (row,), _ = examples([long], tmp_path, answer="text", prompt="Which?", max_length=10**6)
    assert row.example.references == (long["text"],)


@pytest.mark.parametrize("text", ["", "🏠👩‍👩‍👧", "שלום עולם", "\u202eRTL\u202c\x00\ufeff", "{label} {{x}} {"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_any_text_comes_through_as_it_is(tmp_path, text, architecture):
    own = tokenizer(architecture)
    row = {"text": text, "label": 1, "all": ["no", f"{text}!"]}
    (row,), data = examples([row], tmp_path, own, prompt="A {text} ", options="all")
    assert row.example.prompt == f"A {text} "
    written = own.decode(row.prefixes[row.prefix_of[1]] + row.option_ids[1][-1:], skip_special_tokens=True)
    assert written == f"A {text} {text}!"
    assert data.collate([row])["answer"].tolist() == [1]


def test_a_tokenizer_without_padding_or_beginning_of_sentence(tmp_path):
    own = Pretrained(tiny.folder(tmp_path / "model", "gpt2")).tokenizer()
    assert own.pad_token_id == 1
    own.bos_token = None
    rows = [ROW | {"text": "The river is long. " * 9}, ROW | {"text": "It"}]
    encoded, data = examples(rows, tmp_path, own, prompt="{text}", max_length=9, **FIXED)
    batch = data.collate(encoded)
    assert batch["input_ids"].shape[1] == max(map(len, encoded)) == 8
    assert ((batch["input_ids"] == 1) == (batch["attention_mask"] == 0)).all()
    assert (batch["attention_mask"] == 0).any()
    with pytest.raises(UserError, match=r"row 1: expected a prompt of at least one token, received ''"):
        examples([ROW], tmp_path, own, prompt="{empty}", **FIXED)


USER, ASSISTANT = {"role": "user", "content": "Old?"}, {"role": "assistant", "content": "No"}
CONFIG = """
seed_everything: 0
model:
  class_path: COLACausalLM
  init_args: {model_name: model, target_modules: [q_proj, v_proj], rank: 2}
data:
  class_path: TemplateDataModule
  init_args:
    source: rows
    prompt: "{by.name}'s {thing} is {size} {{m}}. Is it big?\\n"
    options: ["Yes", "No", Perhaps]
    label: verdict
    batch_size: 4
    train_size: 12
    val_size: 4
chain: {every_n_epochs: 1}
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    tiny.folder("model", "opt")
    Path("rows").mkdir()
    verdicts = ["Yes", "No", "Perhaps"]
    rows = [{"by": {"name": "Al"}, "thing": "mat", "size": k, "verdict": verdicts[k % 3]} for k in range(16)]
    for split in ("train", "validation", "test"):
        Path("rows", f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("config.yaml").write_text(CONFIG)


def predictions(capfd, *arguments):
    """The rows that are predicted after fit and test."""
    assert main(["fit", "--config", "config.yaml", *arguments]) == 0, capfd.readouterr().err
    last = ["--config", "runs/version_0/config.yaml", "--ckpt_path", "runs/version_0/checkpoints/last.ckpt"]
    for subcommand in ("test", "predict"):
        assert main([subcommand, *last]) == 0, capfd.readouterr().err
    (path,) = Path("runs").rglob("predictions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()], capfd.readouterr().out


@pytest.mark.usefixtures("_folder")
def test_a_task_in_yaml_is_fitted_tested_and_predicted(capfd):
    rows, out = predictions(capfd, "--data.metric", "f1")
    assert "accuracy" not in out
    tables = [csv.DictReader(path.read_text().splitlines()) for path in Path("runs").rglob("metrics.csv")]
    measured = [row for table in tables for row in table if row.get("test_f1")]
    expected = f1_score([row["target"] for row in rows], [row["prediction"] for row in rows], average="macro")
    assert [float(row["test_f1"]) for row in measured] == pytest.approx([expected])
    assert [row["prompt"] for row in rows] == [f"Al's mat is {k} {{m}}. Is it big?\n" for k in range(16)]
    assert [row["target"] for row in rows] == [k % 3 for k in range(16)]
    assert {tuple(row["options"]) for row in rows} == {("Yes", "No", "Perhaps")}


@pytest.mark.usefixtures("_folder")
def test_so_is_one_whose_answer_is_written(capfd):
    Path("config.yaml").write_text(CONFIG.replace('options: ["Yes", "No", Perhaps]', "answer: verdict"))
    rows, out = predictions(capfd, "--data.metric", "exact_match")
    assert "test_exact_match" in out
    assert "val_loss" in out
    assert "val_exact_match" not in out
    assert "f1" not in out
    assert [row["target"] for row in rows] == [[["Yes", "No", "Perhaps"][k % 3]] for k in range(16)]
    assert all(isinstance(row["prediction"], str) for row in rows)


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("asked", ['options: ["Yes", "No", Perhaps]', "options: kinds", "answer: verdict"])
def test_rows_without_their_target_are_predicted_with_null_in_its_place(capfd, asked):
    """In one batch with rows that have it."""
    rows = [json.loads(line) for line in Path("rows", "train.jsonl").read_text().splitlines()]
    kinds = ["Yes", "No", "Perhaps"]
    Path("all.jsonl").write_text("".join(json.dumps(row | {"kinds": kinds}) + "\n" for row in rows * 2))
    for row in rows[::2]:
        del row["verdict"]
    rows[1]["verdict"] = None
    Path("new.json").write_text(json.dumps([row | {"kinds": kinds} for row in rows]))
    config = CONFIG.replace('options: ["Yes", "No", Perhaps]', asked).replace("source: rows", "source: all.jsonl")
    Path("config.yaml").write_text(config)
    assert main(["fit", "--config", "config.yaml"]) == 0
    run = ["--config", "runs/version_0/config.yaml", "--ckpt_path", "runs/version_0/checkpoints/last.ckpt"]
    assert main(["predict", *run, "--data.source", "new.json"]) == 0
    (path,) = Path("runs").rglob("predictions.jsonl")
    predicted = [json.loads(line) for line in path.read_text().splitlines()]
    places = {None: None} | ({name: [name] for name in kinds} if "answer" in asked else dict(zip(kinds, range(3), strict=True)))
    assert [row["target"] for row in predicted] == [places[row.get("verdict")] for row in rows]
    assert [row["index"] for row in predicted] == list(range(16))
    capfd.readouterr()
    for subcommand in ("fit", "test"):
        assert main([subcommand, "--config", "config.yaml", "--data.source", "new.json", "--data.train_size", "8"]) == 2
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: new.json, row ")
        assert "'verdict'" in last


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("options: [Yes, No]", "error: data.options: expected str, received 'True'"),  # YAML's own words for true and false
        ("options: [0, 1]", "error: data.options: expected str, received"),
        ("answr: verdict", "error: data: "),
        ("loss: both", "error: data.loss: expected Literal['options', 'answer'], received 'both'"),
    ],
)
def test_a_mistake_in_yaml_is_one_line(capfd, line, message):
    Path("config.yaml").write_text(CONFIG.replace('options: ["Yes", "No", Perhaps]', line))
    assert main(["fit", "--config", "config.yaml"]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(message)
    assert not Path("runs").exists()
