"""What README says is true: its example runs, its commands parse, its figures are the benchmark's."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

from cola_lightning.cli import main
from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_examples_are_short_and_run(tmp_path, monkeypatch, capsys):
    examples = blocks("python")
    assert len(examples) == 3
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
        links.append(len(names["module"].chain))
    assert links == [2, 1, 2]
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


def test_the_table_of_speed_is_the_benchmarks():
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "speed.jsonl").read_text().splitlines()]
    results = {(line["what"], line["length"]): line["ratio"] for line in lines}
    columns = ["seconds: cola / peft", "seconds: cola / floor", "peak_mib: cola / peft", "seconds: knot / cola"]
    for length in (64, 256):
        assert table_row(f"{length} tokens a row") == [f"{results[column, length]:.2f}" for column in columns]
    assert f"{results['seconds: 5 links / 1 link', 32]:.2f} times" in README


def test_the_commands_parse(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    commands = [line.split("cola ", 1)[1] for block in blocks("bash") for line in block.splitlines() if "cola " in line]
    assert len(commands) == 5
    for command in commands:
        command = command.replace("runs/version_0/config.yaml", "configs/digits.yaml")  # which a fit writes
        words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]
        assert main([*(word.replace("configs/", f"{ROOT}/configs/") for word in words), "--print_config"]) == 0
        assert not capsys.readouterr().err


def test_what_readme_names_exists():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
