"""Every config is complete: it parses, and it builds its model and data."""

import sys
from pathlib import Path

import pytest
import yaml

from cola_lightning.cli import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def test_all_configs_are_here():
    assert [path.name for path in CONFIGS] == ["digits.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_short_and_says_what_it_is_for(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert f"cola fit --config configs/{path.name}" in header
    assert {"model", "data", "chain", "trainer", "seed_everything"} <= yaml.safe_load(path.read_text()).keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])
    assert main(["fit", "--config", str(path), "--trainer.fast_dev_run", "true"]) == 0
