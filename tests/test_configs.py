"""Every config is complete: it parses, and it builds its model, at tiny size, and its data, and takes a step."""

import math
from pathlib import Path

import pytest

from cola_lightning.chain.schedule import KNOT_OPTIONS, ChainSchedule, RunLength
from cola_lightning.cli import main
from cola_lightning.study.config import resolve_config
from tests import tiny
from tests.tiny import at_tiny_size

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs"
BENCHMARKS = [ROOT / "benchmarks" / f"{name}.yaml" for name in ("digits", "domain_shift")]
NAMES = [
    "classification",
    "image_classification",
    "paper",
    "preference",
    "qlora_8b",
    "quickstart",
    "roberta_glue",
    "sft_chat",
    "sft_instructions",
    "smollm2",
]
PATHS = [*(FOLDER / f"{name}.yaml" for name in NAMES), *BENCHMARKS]


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_config_runs(path, tmp_path, monkeypatch, capfd):
    assert len(list(FOLDER.glob("*.yaml"))) == len(NAMES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "english")))
    words = ["--config", str(path), "--trainer.fast_dev_run", "true"]
    assert main(["fit", *words, *at_tiny_size(path.stem, tmp_path)]) == 0, capfd.readouterr().err


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_config_fits_a_screen_and_says_what_it_needs(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert any(line.startswith(f"#   cola fit --config {path.relative_to(ROOT)}") for line in lines)


def test_the_overlay_for_several_gpus_replaces_a_configs_strategy():
    config = resolve_config(["--config", str(FOLDER / "paper.yaml"), "--config", str(FOLDER / "overlays" / "multi_gpu.yaml")])
    assert (config["trainer"]["strategy"], config["trainer"]["devices"]) == ("ddp", "auto")


@pytest.mark.parametrize("path", [BENCHMARKS[0], FOLDER / "smollm2.yaml", FOLDER / "roberta_glue.yaml"])
def test_the_overlay_of_one_knot_replaces_a_configs_own_knots(path):
    config = resolve_config(["--config", str(path), "--config", str(FOLDER / "overlays" / "one_knot.yaml")])
    run = RunLength(lambda epoch: 20, max_epochs=4, max_steps=math.inf)
    whens = {when: config["chain"][when] for when in (*KNOT_OPTIONS, "until")}
    assert ChainSchedule(**whens).in_run(run).at_steps == [20]
    assert config["model"]["init_args"]["schedule_scope"] == "run"
