"""Data sets of the hub, trained on by their names alone, as the ones with these names, columns and splits would be.

What is loaded, and from where, is the libraries' own; the hub is a stand-in on this machine.
"""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import pytest
from transformers import AutoTokenizer

from cola_lightning import TextDataModule, UserError
from cola_lightning.cli import main
from cola_lightning.data.reading import load_splits
from tests.helpers import tiny
from tests.helpers.standin_hub import HUB

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


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with HUB, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after each stream, for Arrow's threads
        tiny.folder(folder / "chat", max_position_embeddings=256)
        tiny.chat_tokenizer(tiny.CHAT).save_pretrained(folder / "chat")
        HUB.add("models", "owner/chat", folder / "chat")
        for name, made in SETS.items():
            HUB.add("datasets", name, files_of(made, folder))
        HUB.old = HUB.add("datasets", "owner/revised", file_alone("old"))
        HUB.add("datasets", "owner/revised", file_alone("new"))
        yield HUB


def read(source, **arguments):
    """The rows of the first batches that a fit would get: ``stage``, the whole ``text``, the part of it that is ``trained``."""
    data = TextDataModule(source, **arguments)
    data.tokenizer = AutoTokenizer.from_pretrained("owner/chat")
    data.setup("fit")

    def decoded(ids):
        return data.tokenizer.decode(ids, skip_special_tokens=True)

    return [
        {"stage": stage, "text": decoded(ids[mask.bool()]), "trained": decoded(labels[labels != -100]).strip()}
        for stage, loader in (("train", data.train_dataloader()), ("validation", data.val_dataloader()))
        for batch in itertools.islice(loader, 2)
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


def assert_trained(rows, row, train="train", validation="train"):
    """They are those of a split, with all their texts in order, and the loss is on the last of these."""
    for stage, split in (("train", train), ("validation", validation)):
        expected = [texts for _, texts in (row(split, k) for k in range(N_ROWS))]
        found = [one for one in rows if one["stage"] == stage]
        assert found
        for one in found:
            assert any(
                one["trained"] == texts[-1] and re.search(".*".join(map(re.escape, texts)), one["text"], re.DOTALL)
                for texts in expected
            ), one
            assert "Below" not in one["text"]


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_of_the_hub_is_trained_on_by_its_name(name, caplog):
    made = SETS[name]
    with caplog.at_level("INFO"):
        rows = read(name, **made.arguments)
    assert_trained(rows, made.row, made.arguments.get("train_split", "train"), made.validation)
    assert any(all(column in line for column in made.printed.split()) for line in caplog.messages)


@pytest.mark.parametrize("name", [name for name, made in SETS.items() if made.arguments])
def test_what_a_set_has_is_listed_where_the_user_must_choose(name):
    option, *_ = SETS[name].arguments
    names = SETS[name].subsets if option == "subset" else SETS[name].splits
    with pytest.raises(UserError, match=rf"data\.{option}") as raised:
        read(name)
    assert {*names.split()} <= {*re.findall(r"\w+", str(raised.value))}


def test_a_revision_is_an_older_state_of_a_set(hub):
    for split, arguments in {"old": {"revision": hub.old}, "new": {}}.items():
        assert_trained(read("owner/revised", **arguments), TLDR, split, split)


def test_rows_that_one_revision_held_out_are_not_those_of_another(hub):
    old, new = (load_splits("owner/revised", revision=revision)["train"]() for revision in (hub.old, None))
    again = load_splits("owner/revised", revision=hub.old)["train"]()
    assert old.contents() == again.contents() != new.contents()


def test_one_command_by_names_alone_is_a_chain_of_three_epochs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["--model.model_name", "owner/chat", "--data.source", "tatsu-lab/alpaca", "--chain.every_n_epochs", "1"]
    assert main(["fit", *words]) == 0
    log = capfd.readouterr().out
    for printed in ("using max_epochs 3", "link 0 finished", "link 1 finished", "link 2 live at the end"):
        assert printed in log
