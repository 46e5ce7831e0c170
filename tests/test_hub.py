"""Data sets of the hub, trained on by their names alone, as the ones with these names, columns and splits would be.

What is loaded, and from where, is the libraries' own; the hub is a stand-in on this machine.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from tests import tiny
from tests.standin_hub import StandInHub

ROOT = Path(__file__).parent.parent
LABEL = datasets.ClassLabel(names=["neg", "pos"])


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Rows of each: every text names the split and the row that it is of.
def alpaca(split, k):
    instruction, given, output = f"Name film {split} {k}", f"It is {k}" if k % 2 else "", f"Film {split} {k}!"
    text = f"Below is an instruction. {instruction} {given} Response: {output}"
    return {"instruction": instruction, "input": given, "output": output, "text": text}


def dolly(split, k):
    row = {"instruction": f"Name film {split} {k}", "context": f"It is {k}" if k % 2 else "", "response": f"Film {split} {k}!"}
    return row | {"category": "closed_qa"}


def no_robots(split, k):
    first = f"Name film {split} {k}"
    messages = [{"role": "system", "content": "Be brief"}, *turns(first, f"Film {split} {k}!"), *turns("Again", f"Film {k}?")]
    return {"prompt": first, "prompt_id": f"id{k}", "messages": messages, "category": "Chat"}


def ultrachat(split, k):
    first = f"Name film {split} {k}"
    return {"prompt": first, "prompt_id": f"id{k}", "messages": turns(first, f"Film {split} {k}!")}


def gsm8k(split, k):
    return {"question": f"How many films {split} {k}?", "answer": f"There are {split} {k}\n#### {k}"}


def tldr(split, k):
    return {"prompt": f"POST: the film {split} {k}\n\nTL;DR:", "completion": f" Film {split} {k}!"}


def sharegpt(split, k):
    opening = [{"from": "system", "value": "Be brief"}] if k % 2 else []
    conversation = [{"from": "human", "value": f"Name film {split} {k}"}, {"from": "gpt", "value": f"Film {split} {k}!"}]
    return {"id": f"id{k}", "conversations": opening + conversation}


def imdb(split, k):
    return {
        "text": f"The film was {'great' if k % 2 else 'terrible'} {split} {k}",
        "label": -1 if split == "unsupervised" else k % 2,
    }


def xsum(split, k):
    return {"document": f"The film {split} {k} was long", "summary": f"Film {split} {k}!", "id": str(k)}


# Of sets in Parquet files: their rows, and their splits or, by subset, their subsets' splits.
PARQUET = {
    "tatsu-lab/alpaca": (alpaca, ["train"]),
    "HuggingFaceH4/no_robots": (no_robots, ["train", "test"]),
    "HuggingFaceH4/ultrachat_200k": (ultrachat, ["train_sft", "test_sft", "train_gen", "test_gen"]),
    "openai/gsm8k": (gsm8k, {"main": ["train", "test"], "socratic": ["train", "test"]}),
    "trl-lib/tldr": (tldr, ["train", "validation", "test"]),
    "stanfordnlp/imdb": (imdb, ["train", "test", "unsupervised"]),
    "EdinburghNLP/xsum": (xsum, ["train", "validation", "test"]),
}
SPLITS = {name: splits for name, (_, splits) in PARQUET.items()} | {
    "databricks/databricks-dolly-15k": ["train"],
    "owner/sharegpt": ["train"],
    "owner/revised": ["train"],
}
N_ROWS = 40  # of each split


def parquet_files(row, subsets, folder):
    """A data set's files as they are on the hub: a card that names each split's files, and these."""
    subsets = subsets if isinstance(subsets, dict) else {"default": subsets}
    files, configs = {}, []
    for (subset, splits), place in zip(subsets.items(), itertools.cycle(["data"] if len(subsets) == 1 else subsets)):
        for split in splits:
            rows = datasets.Dataset.from_list([row(split, k) for k in range(N_ROWS)])
            rows = rows.cast_column("label", LABEL) if "label" in rows.column_names else rows
            rows.to_parquet(folder / "rows.parquet")
            files[f"{place}/{split}-00000-of-00001.parquet"] = (folder / "rows.parquet").read_bytes()
        data_files = [{"split": split, "path": f"{place}/{split}-*"} for split in splits]
        configs.append({"config_name": subset, "data_files": data_files})
    card = f"---\n{json.dumps({'configs': configs})}\n---\n# A data set\n"  # JSON is YAML
    return {"README.md": card.encode()} | files


def json_lines(row, prefix="train"):
    return "".join(json.dumps(row(prefix, k)) + "\n" for k in range(N_ROWS)).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with StandInHub() as hub:
        tiny.folder(folder / "chat", max_position_embeddings=256)
        own = tiny.tokenizer()
        own.chat_template = tiny.CHAT
        own.save_pretrained(folder / "chat")
        hub.add("models", "owner/chat", folder / "chat")
        tiny.folder(folder / "body", "roberta", "AutoModel")
        hub.add("models", "owner/body", folder / "body")
        for name, (row, splits) in PARQUET.items():
            hub.add("datasets", name, parquet_files(row, splits, folder))
        hub.add("datasets", "databricks/databricks-dolly-15k", {"databricks-dolly-15k.jsonl": json_lines(dolly)})
        sharegpt_rows = json.dumps([sharegpt("train", k) for k in range(N_ROWS)])
        hub.add("datasets", "owner/sharegpt", {"sharegpt.json": sharegpt_rows.encode()})
        hub.old = hub.add("datasets", "owner/revised", {"train.jsonl": json_lines(tldr, "old")})
        hub.add("datasets", "owner/revised", {"train.jsonl": json_lines(tldr, "new")})
        yield hub


LOAD = """
import json, sys
import datasets, transformers

columns = {}
for name, subsets in json.loads(sys.argv[1]).items():
    for subset in subsets if isinstance(subsets, dict) else [None]:
        loaded = datasets.load_dataset(name, subset)
        columns[" ".join([name, *filter(None, [subset])])] = {split: [len(rows), rows[0]] for split, rows in loaded.items()}
columns["old"] = datasets.load_dataset("owner/revised", revision=sys.argv[2])["train"][0]
columns["labels"] = datasets.load_dataset("stanfordnlp/imdb", split="train").features["label"].names
model = transformers.AutoModelForCausalLM.from_pretrained("owner/chat")
tokenizer = transformers.AutoTokenizer.from_pretrained("owner/chat")
columns["model"] = [model.config.vocab_size, tokenizer.chat_template]
print(json.dumps(columns))
"""


def test_the_stand_in_hub_serves_what_the_libraries_load_by_name(hub, tmp_path):
    command = [sys.executable, "-c", LOAD, json.dumps(SPLITS), hub.old]
    done = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert loaded.pop("model") == [400, tiny.CHAT]
    assert loaded.pop("labels") == ["neg", "pos"]
    assert loaded.pop("old") == tldr("old", 0)
    assert loaded.pop("owner/revised") == {"train": [N_ROWS, tldr("new", 0)]}
    assert loaded.pop("owner/sharegpt") == {"train": [N_ROWS, sharegpt("train", 0)]}
    assert loaded.pop("databricks/databricks-dolly-15k") == {"train": [N_ROWS, dolly("train", 0)]}
    for name, (row, splits) in PARQUET.items():
        for subset, names in splits.items() if isinstance(splits, dict) else [(None, splits)]:
            assert loaded.pop(" ".join([name, *filter(None, [subset])])) == {split: [N_ROWS, row(split, 0)] for split in names}
    assert loaded == {}


# ---------------------------------------------------------------------- fit


def fit(source, *arguments, data="TextDataModule"):
    model = (
        ["COLASequenceClassifier", "owner/body"] if data == "TextClassificationDataModule" else ["COLACausalLM", "owner/chat"]
    )
    command = ["fit", "--model", model[0], "--model.model_name", model[1], "--data", data, "--data.source", source]
    trainer = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "runs"]
    trainer += ["--trainer.val_check_interval", "1", "--trainer.enable_progress_bar", "false"]
    return [*command, *arguments, *trainer, "--trainer.callbacks", "[{class_path: tests.hub_run.Texts}]"]


@pytest.fixture(scope="module")
def runs(hub, tmp_path_factory):
    """What each command did: its exit status, its streams, and the texts of its batches."""
    commands = {
        "alpaca": fit("tatsu-lab/alpaca"),
        "dolly": fit("databricks/databricks-dolly-15k"),
        "no_robots": fit("HuggingFaceH4/no_robots"),
        "ultrachat": fit("HuggingFaceH4/ultrachat_200k", "--data.train_split", "train_sft", "--data.val_split", "test_sft"),
        "ultrachat, no split": fit("HuggingFaceH4/ultrachat_200k"),
        "gsm8k": fit("openai/gsm8k", "--data.subset", "main"),
        "gsm8k, no subset": fit("openai/gsm8k"),
        "tldr": fit("trl-lib/tldr"),
        "sharegpt": fit("owner/sharegpt"),
        "imdb": fit("stanfordnlp/imdb", data="TextClassificationDataModule"),
        "xsum": fit("EdinburghNLP/xsum", "--data.columns", "{prompt: document, response: summary}"),
        "xsum, no columns": fit("EdinburghNLP/xsum"),
        "old": fit("owner/revised", "--data.revision", hub.old),
        "new": fit("owner/revised"),
        "whole": [
            "fit",
            "--model.model_name",
            "owner/chat",
            "--data.source",
            "tatsu-lab/alpaca",
            "--chain.every_n_epochs",
            "1",
        ],
        "streamed": fit("trl-lib/tldr", "--data.streaming", "true", "--data.val_size", "5"),
        "streamed, no validation": fit(
            "tatsu-lab/alpaca", "--data.streaming", "true", "--data.val_size", "5", "--data.test_size", "5"
        ),
    }
    folder = tmp_path_factory.mktemp("runs")
    (folder / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-m", "tests.hub_run", str(folder / "commands.json")]
    subprocess.run(command, cwd=ROOT, env=hub.environment(folder / "cache"), check=True)
    results = {}
    for name, (status, out, err) in json.loads((folder / "commands.json").read_text()).items():
        path = folder / name / "texts.jsonl"
        texts = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        results[name] = SimpleNamespace(status=status, out=out, err=err, texts=texts)
    return results


def trained(run, stage="train"):
    """The parts of a run's rows with a loss, without white space around them; the run has succeeded."""
    assert run.status == 0, run.err
    return [row["trained"].strip() for row in run.texts if row["stage"] == stage]


def is_said(run, *columns):
    """Whether one line of the log names all these columns."""
    return any(all(column in line for column in columns) for line in (run.out + run.err).splitlines())


def refusal(run):
    """The one line of a command that was refused."""
    assert run.status == 2, run.err
    lines = run.err.strip().splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    return lines[-1]


def assert_responses_of(run, row, fields, response, splits=("train", "train")):
    """The rows trained on are those of a split: their responses have the loss, after all of the other fields, in order.

    Args:
        run: the run.
        row: makes a row of a split.
        fields: the fields of the prompt.
        response: the field of the response.
        splits: those of the rows for training and for validation.
    """
    for stage, split in zip(("train", "validation"), splits, strict=True):
        rows = {one[response].strip(): one for one in (row(split, k) for k in range(N_ROWS))}
        found = [text for text in run.texts if text["stage"] == stage]
        assert found
        for text in found:
            one = rows[text["trained"].strip()]
            places = [text["text"].find(one[field].strip()) for field in [*fields, response] if one[field]]
            assert -1 not in places
            assert places == sorted(places)
            assert text["text"].count(one[response].strip()) == 1


def test_alpaca_is_instructions_with_their_inputs_and_its_whole_text_is_not_trained(runs):
    assert trained(runs["alpaca"])
    assert is_said(runs["alpaca"], "instruction", "input", "output")
    assert_responses_of(runs["alpaca"], alpaca, ["instruction", "input"], "output")
    assert not any("Below is" in text["text"] for text in runs["alpaca"].texts)


def test_dolly_is_instructions_with_their_contexts_from_a_file_without_a_card(runs):
    assert trained(runs["dolly"])
    assert is_said(runs["dolly"], "instruction", "context", "response")
    assert_responses_of(runs["dolly"], dolly, ["instruction"], "response")
    assert any("It is" in text["text"] for text in runs["dolly"].texts)


def test_a_conversation_wins_over_its_first_turn_beside_it(runs):
    found = trained(runs["no_robots"])
    assert is_said(runs["no_robots"], "messages")
    assert found
    assert all("Film train" in text["text"] and "Be brief" in text["text"] for text in runs["no_robots"].texts)
    assert any("?" in text for text in found)  # the answer to a later turn
    assert not any("Name film" in text for text in found)


def test_splits_of_other_names_are_named_by_the_user(runs):
    assert trained(runs["ultrachat"])
    assert is_said(runs["ultrachat"], "messages")
    for row in runs["ultrachat"].texts:
        assert f"Film {'train_sft' if row['stage'] == 'train' else 'test_sft'} " in row["trained"]
    assert all(split in refusal(runs["ultrachat, no split"]) for split in SPLITS["HuggingFaceH4/ultrachat_200k"])
    assert "data.train_split" in refusal(runs["ultrachat, no split"])


def test_a_subset_is_named_by_the_user(runs):
    assert trained(runs["gsm8k"])
    assert is_said(runs["gsm8k"], "question", "answer")
    assert_responses_of(runs["gsm8k"], gsm8k, ["question"], "answer")
    assert all(subset in refusal(runs["gsm8k, no subset"]) for subset in ("main", "socratic", "data.subset"))


def test_prompts_have_completions_in_sets_made_for_trl(runs):
    assert trained(runs["tldr"])
    assert is_said(runs["tldr"], "prompt", "completion")
    assert_responses_of(runs["tldr"], tldr, ["prompt"], "completion", ("train", "validation"))


def test_the_roles_of_sharegpt_are_those_of_a_chat_template(runs):
    found = trained(runs["sharegpt"])
    assert is_said(runs["sharegpt"], "conversations")
    assert found
    assert all(text.startswith("Film train ") for text in found)
    assert all("[user]\nName film" in text["text"] and "[assistant]\nFilm" in text["text"] for text in runs["sharegpt"].texts)
    assert {"[system]\nBe brief" in text["text"] for text in runs["sharegpt"].texts} == {True, False}


def test_labels_have_the_sets_names_and_rows_without_one_are_left_alone(runs):
    run = runs["imdb"]
    assert run.status == 0, run.err
    assert is_said(run, "text", "label")
    assert {row["stage"] for row in run.texts} == {"train", "validation"}
    for row in run.texts:  # those of validation are drawn from the same split
        assert "train" in row["text"]
        assert row["trained"] == ("pos" if "great" in row["text"] else "neg")


def test_columns_that_say_nothing_are_named_by_the_user(runs):
    line = refusal(runs["xsum, no columns"])
    assert all(re.search(rf"\b{column}\b", line) for column in ("document", "summary", "id"))
    assert "--data.columns" in line
    assert trained(runs["xsum"])
    assert_responses_of(runs["xsum"], xsum, ["document"], "summary", ("train", "validation"))


def test_a_revision_is_an_older_state_of_a_set(runs):
    for name in ("old", "new"):
        assert {text.split()[1] for text in trained(runs[name])} == {name}


def test_one_command_by_names_alone_is_a_chain_of_three_epochs(runs):
    run = runs["whole"]
    assert run.status == 0, run.err
    assert is_said(run, "trainer.max_epochs: 3")
    links = ["link 0 finished", "link 1 finished", "link 2 live at the end"]
    assert [is_said(run, link) for link in links] == [True] * 3


def test_a_data_set_is_streamed(runs):
    assert_responses_of(runs["streamed"], tldr, ["prompt"], "completion", ("train", "validation"))
    assert_responses_of(runs["streamed, no validation"], alpaca, ["instruction", "input"], "output")
    validated = trained(runs["streamed, no validation"], "validation")
    assert set(validated) == {alpaca("train", k)["output"] for k in range(5)}  # held out: the first rows
    assert not set(trained(runs["streamed, no validation"])) & {alpaca("train", k)["output"] for k in range(10)}
