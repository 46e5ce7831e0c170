"""What README says is true: its example runs, its commands parse, its figures are the benchmark's."""

import importlib
import json
import re
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

from cola_lightning import Chain
from cola_lightning.cli import main
from tests import tiny
from tests.test_configs import at_tiny_size

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_examples_are_short_and_run(tmp_path, monkeypatch, capsys):
    examples = blocks("python")
    assert len(examples) == 4
    assert len([line for line in examples[0].splitlines() if line]) <= 10  # "ten lines of Python"
    monkeypatch.chdir(tmp_path)
    model = tiny.folder(tmp_path / "model", "opt")
    (tmp_path / "my_rows").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "my_rows" / f"{split}.jsonl").write_text('{"prompt": "Is it old? ", "response": "Yes"}\n' * 8)
    links = []
    for example in examples:
        assert len(example.strip().splitlines()) <= 30
        names = {}
        exec(compile(example.replace("facebook/opt-125m", model), "README.md", "exec"), names)
        links.append(len(names["module" if "module" in names else "adapted"].chain))
    assert links == [2, 1, 2, 3]
    assert "2 Sequential(" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert type(merged) is OPTForCausalLM
    assert AutoTokenizer.from_pretrained("merged")("It")["input_ids"]


def test_the_table_is_the_benchmarks():
    results = [json.loads(line) for line in (ROOT / "benchmarks" / "digits.jsonl").read_text().splitlines()]
    methods = list(dict.fromkeys(result["method"] for result in results))
    header = next(line for line in README.splitlines() if line.startswith("| | LoRA |"))
    assert header.strip("| ").split(" | ") == methods
    row = next(line for line in README.splitlines() if line.startswith("| accuracy |"))
    accuracy = [[r["test_accuracy"] for r in results if r["method"] == method] for method in methods]
    assert {len(values) for values in accuracy} == {5}
    expected = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in accuracy]
    assert row.strip("| ").split(" | ")[1:] == expected


def table_row(start):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {start} |")]
    return row.strip("| ").split(" | ")[1:]


def test_the_table_of_sst2_is_the_benchmarks():
    results = [json.loads(line) for line in (ROOT / "benchmarks" / "sst2.jsonl").read_text().splitlines()]
    methods = list(dict.fromkeys(result["method"] for result in results))
    assert "| SST-2 | " + " | ".join(methods) + " |" in README
    for part in ("val", "test"):
        values = [[r[f"{part}_accuracy"] for r in results if r["method"] == method] for method in methods]
        assert len({len(value) for value in values}) == 1
        assert table_row(f"{part}_accuracy") == [" ".join(f"{x:.3f}" for x in value) for value in values]


def test_the_kills_are_the_benchmarks():
    kills = [json.loads(line) for line in (ROOT / "benchmarks" / "kills.jsonl").read_text().splitlines()]
    n_equal = sum(not kill["wrong"] for kill in kills)
    assert f"{n_equal} of {len(kills)} by `python benchmarks/kills.py`" in README
    assert {kill["setup"] for kill in kills} == {"digits", "llama"}


def test_the_table_of_speed_is_the_benchmarks():
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "speed.jsonl").read_text().splitlines()]
    results = {(line["what"], line["length"]): line["ratio"] for line in lines}
    columns = ["seconds: cola / peft", "seconds: cola / floor", "peak_mib: cola / peft", "seconds: knot / cola"]
    for length in (64, 256):
        assert table_row(f"{length} tokens a row") == [f"{results[column, length]:.2f}" for column in columns]
    assert f"{results['seconds: 5 links / 1 link', 32]:.2f} times" in README


def test_the_table_of_bases_is_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bases = importlib.import_module("bases")
    results = [json.loads(line) for line in (ROOT / "benchmarks" / "bases.jsonl").read_text().splitlines()]
    for row in bases.rows(results):
        assert f"| {' | '.join(row)} |" in README


@pytest.mark.parametrize("name", ["tasks", "prompts"])
def test_the_tables_of_tasks_and_of_their_costs_are_the_benchmarks(monkeypatch, name):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module(name)
    results = [json.loads(line) for line in (ROOT / "benchmarks" / f"{name}.jsonl").read_text().splitlines()]
    table = [f"| {' | '.join(row)} |" for row in benchmark.rows(results)]
    assert len(table) == {"tasks": 11, "prompts": 14}[name]
    assert [row for row in table if row not in README] == []


def test_the_table_of_domain_shift_is_the_benchmarks():
    from benchmarks import domain_shift

    table = [f"| {' | '.join(row)} |" for row in domain_shift.rows()]
    assert len(table) >= 4
    assert [row for row in table if row not in README] == []


def test_the_predictions_in_half_precision_are_the_benchmarks():
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "half.jsonl").read_text().splitlines()]
    same = {line["model"]: line["same"] for line in lines}
    for dtype in ("float32", "bfloat16"):
        assert table_row(f"in {dtype}") == [str(same[f"{model}, {dtype}"]) for model in ("module", "merged", "adapter")]
    assert max(line["largest_margin"] for line in lines) <= 0.125


def commands(block):
    """The words after each ``cola`` in a block."""
    return [shlex.split(line.split("cola ", 1)[1]) for line in block.splitlines() if "cola " in line]


def test_the_commands_parse(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("cola_lightning.study.study.Study", lambda asked, words: SimpleNamespace(run=lambda: 0))
    *others, _ = [found for block in blocks("bash") if (found := commands(block))]
    assert [len(found) for found in others] == [1, 4, 1, 2]
    for words in (words for found in others for words in found):
        words = [word.replace("runs/version_0/config.yaml", "configs/digits.yaml") for word in words]  # which a fit writes
        assert main(words if words[0] == "compare" else [*words, "--print_config"]) == 0
        assert not capsys.readouterr().err


def test_resume_roll_back_and_export_work_line_by_line(tmp_path, monkeypatch, capsys):
    """On a tiny model in place of the quickstart's, and with fewer steps."""
    monkeypatch.setattr(sys, "argv", ["cola"])
    monkeypatch.chdir(tmp_path)
    (lines,) = [commands(block) for block in blocks("bash") if "cola export" in block]
    assert len(lines) == 8
    small = ["--trainer.max_steps", "6", "--chain.every_n_train_steps", "2", "--trainer.val_check_interval", "2"]
    small += ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false"]
    quickstart = ["--config", str(ROOT / "configs" / "quickstart.yaml"), *at_tiny_size("quickstart", tmp_path), *small]
    assert main(["fit", *quickstart]) == 0
    capsys.readouterr()
    for words in lines:
        words = ["8" if word == "100" else word for word in words]
        place = words.index("--config") if "configs/quickstart.yaml" in words else None
        words = words if place is None else [*words[:place], *quickstart, *words[place + 2 :]]
        assert main(words) == 0, words
        out = capsys.readouterr().out
        assert ("loaded again" in out) is (words[0] == "export"), out
    assert torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    assert len(torch.load("runs/version_3/checkpoints/last.ckpt", weights_only=True)["cola"]["chain"]["links"]) == 2 + 2
    assert all(Path(path).exists() for path in ("chain.png", "merged/tokenizer.json", "adapter/adapter_config.json"))
    assert len(Chain.load("chain")) == 2


def test_what_readme_names_exists():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
