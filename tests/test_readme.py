"""What README says is true: its example runs, its commands parse, its figures are the benchmark's."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from cola_lightning.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_the_example_is_short_and_runs(tmp_path, monkeypatch, capsys):
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert [link.rank for link in names["module"].chain.links] == [1, 1]
    assert "2 Sequential(" in capsys.readouterr().out


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
