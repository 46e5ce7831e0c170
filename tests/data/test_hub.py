"""Data sets of the hub, trained on by their names alone, as the ones with these names, columns and splits would be.

What is loaded, and from where, is the libraries' own; the hub is a stand-in on this machine.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from tests.helpers import tiny
from tests.helpers.standin_hub import StandInHub

ROOT = Path(__file__).parents[2]
N_ROWS = 40  # of each split


# Each makes of a split and a number a row, its texts in the order in which they are rendered, and what is trained as the last.
def columns(*names, **others):
    """Rows of a prompt, an input that is empty in every other row if it has a name, and a response."""

    def row(split, k):
        texts = [f"Name film {split} {k}", f"It is {k}" * (k % 2), f"Film {split} {k}!"]
        texts = texts if len(names) == 3 else texts[::2]
        return dict(zip(names, texts, strict=True)) | others, texts

    return row


def chat(split, k):
    """Rows of turns, every other one after a system prompt, and of the first of the user's turns."""
    texts = ["Be brief"] * (k % 2) + [f"Name film {split} {k}", f"Film {split} {k}!"]
    roles = ["system"] * (k % 2) + ["user", "assistant"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return {"messages": turns, "prompt": texts[-2], "prompt_id": f"id{k}"}, texts


def alpaca(split, k):
    """Of which a row has no response."""
    row, texts = columns("instruction", "input", "output", text="Below is an instruction.")(split, k)
    return row | ({"output": ""} if k == 3 else {}), texts


TLDR = columns("prompt", "completion")


@dataclass
class Set:
    """A data set: its rows, the columns that a fit names, its splits, and a user's arguments."""

    row: Callable
    printed: str
    splits: str
    arguments: dict[str, str] = field(default_factory=dict)
    subsets: str = "default"
    validation: str = "train"  # from which rows are drawn


SFT = {"train_split": "train_sft", "val_split": "test_sft"}
SETS = {
    "tatsu-lab/alpaca": Set(alpaca, "instruction input output", "train"),
    "HuggingFaceH4/ultrachat_200k": Set(chat, "messages", "train_sft test_sft train_gen", SFT, validation="test_sft"),
    "openai/gsm8k": Set(columns("question", "answer"), "question answer", "train test", {"subset": "main"}, "main socratic"),
    "trl-lib/tldr": Set(TLDR, "prompt completion", "train validation test", validation="validation"),
}


def files_of(made, folder):
    """A data set's files as they are on the hub: a card that names each split's files, and these."""
    files, configs = {}, []
    splits = made.splits.split()
    for subset in made.subsets.split():
        for split in splits:
            rows = datasets.Dataset.from_list([made.row(split, k)[0] for k in range(N_ROWS)])
            rows.to_parquet(folder / "rows.parquet")
            files[f"{subset}/{split}-00000-of-00001.parquet"] = (folder / "rows.parquet").read_bytes()
        data_files = [{"split": split, "path": f"{subset}/{split}-*"} for split in splits]
        configs.append({"config_name": subset, "data_files": data_files})
    card = f"---\n{json.dumps({'configs': configs})}\n---\n# A data set\n"  # JSON is YAML
    return {"README.md": card.encode()} | files


def file_alone(split):
    """A data set without a card."""
    return {"train.jsonl": "".join(json.dumps(TLDR(split, k)[0]) + "\n" for k in range(N_ROWS)).encode()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with StandInHub() as hub:
        tiny.folder(folder / "chat", max_position_embeddings=256)
        tiny.chat_tokenizer(tiny.CHAT).save_pretrained(folder / "chat")
        hub.add("models", "owner/chat", folder / "chat")
        for name, made in SETS.items():
            hub.add("datasets", name, files_of(made, folder))
        hub.old = hub.add("datasets", "owner/revised", file_alone("old"))
        hub.add("datasets", "owner/revised", file_alone("new"))
        yield hub


@pytest.fixture(scope="module")
def runs(hub, tmp_path_factory):
    """What each command did: its exit status, its log, and the texts of its batches."""
    each_epoch = ["--chain.every_n_epochs", "1"]
    streamed = {"source": "trl-lib/tldr", "streaming": True, "train_size": 16}
    held_out = {"streaming": True, "train_size": 8, "val_size": 5, "test_size": 5}
    commands = {name: {"source": name} | made.arguments for name, made in SETS.items()} | {
        "no split": {"source": "HuggingFaceH4/ultrachat_200k"},
        "no subset": {"source": "openai/gsm8k"},
        "old": {"source": "owner/revised", "revision": hub.old},
        "new": {"source": "owner/revised"},
        "streamed": streamed,
        "streamed, another seed": streamed | {"split_seed": 1},
        "streamed, no validation": {"source": "tatsu-lab/alpaca"} | held_out,
        "by names alone": ["fit", "--model.model_name", "owner/chat", "--data.source", "tatsu-lab/alpaca", *each_epoch],
    }
    commands = {name.replace("/", " "): command for name, command in commands.items()}
    folder = tmp_path_factory.mktemp("runs")
    (folder / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-m", "tests.helpers.hub_run", str(folder / "commands.json")]
    subprocess.run(command, cwd=ROOT, env=hub.environment(folder / "cache"), check=True)
    results = {}
    for name, status in json.loads((folder / "commands.json").read_text()).items():
        path = folder / name / "texts.jsonl"
        texts = tiny.read_rows(path) if path.exists() else []
        results[name] = SimpleNamespace(status=status, log=(folder / name / "log").read_text(), texts=texts)
    return results


def assert_trained(run, row, train="train", validation="train"):
    """The rows of the batches are those of a split, with all their texts in order, and the loss is on the last of these."""
    assert run.status == 0, run.log
    for stage, split in (("train", train), ("validation", validation)):
        expected = [texts for _, texts in (row(split, k) for k in range(N_ROWS))]
        found = [one for one in run.texts if one["stage"] == stage]
        assert found
        for one in found:
            assert any(
                one["trained"].strip() == texts[-1] and re.search(".*".join(map(re.escape, texts)), one["text"], re.DOTALL)
                for texts in expected
            ), one
            assert "Below" not in one["text"]


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_of_the_hub_is_trained_on_by_its_name(runs, name):
    run, made = runs[name.replace("/", " ")], SETS[name]
    assert_trained(run, made.row, made.arguments.get("train_split", "train"), made.validation)
    assert any(all(column in line for column in made.printed.split()) for line in run.log.splitlines())


def test_what_a_set_has_is_listed_where_the_user_must_choose(runs):
    for name, words in [
        ("no split", "data.train_split train_sft test_sft train_gen"),
        ("no subset", "data.subset main socratic"),
    ]:
        assert runs[name].status == 2, runs[name].log
        last = runs[name].log.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert [word for word in words.split() if not re.search(rf"(?<!\w){word}\b", last)] == []


def test_a_revision_is_an_older_state_of_a_set(runs):
    for name in ("old", "new"):
        assert_trained(runs[name], TLDR, name, name)


def test_one_command_by_names_alone_is_a_chain_of_three_epochs(runs):
    run = runs["by names alone"]
    assert run.status == 0, run.log
    for printed in ("using max_epochs 3", "link 0 finished", "link 1 finished", "link 2 live at the end"):
        assert printed in run.log


def test_some_rows_of_a_data_set_are_streamed_by_the_seed_and_some_of_them_held_out(runs):
    orders = []
    for name in ("streamed", "streamed, another seed"):
        assert_trained(runs[name], TLDR, "train", "validation")
        orders.append([row["text"] for row in runs[name].texts if row["stage"] == "train"])
    assert len(orders[0]) == len(orders[1]) == 16
    assert orders[0] != orders[1]
    run = runs["streamed, no validation"]
    assert_trained(run, alpaca)
    trained, validated = ({row["trained"].strip() for row in run.texts if row["stage"] == s} for s in ("train", "validation"))
    assert len(trained) in (7, 8)  # one row has no response
    assert len(validated) in (4, 5)
    assert not trained & validated
