"""Every config is complete: it parses, and it builds its model, at tiny size, and its data, and takes a step."""

import math
import sys
from pathlib import Path

import pytest
import yaml

from cola_lightning.chain.schedule import KNOT_OPTIONS, ChainSchedule, RunLength
from cola_lightning.cli import main
from cola_lightning.study.config import resolved
from tests import tiny

FOLDER = Path(__file__).parent.parent / "configs"
NAMES = ["digits", "domain_shift", "llama-2-7b", "opt-1.3b", "quickstart", "roberta_glue", "smollm2", "sst2_smollm2"]
ARCHITECTURES = {"opt-1.3b": "opt", "roberta_glue": "roberta"}


def at_tiny_size(name, folder):
    """What puts a tiny model and a few rows in the place of the config's own."""
    if name == "digits":
        return []
    if name == "domain_shift":
        return tiny.BYTE_GPT
    architecture = ARCHITECTURES.get(name, "llama")
    auto_class = "AutoModel" if name == "roberta_glue" else "AutoModelForCausalLM"
    model = tiny.folder(folder / "model", architecture, auto_class)
    changes = ["--model.model_name", model, "--model.gguf_file", "null", "--trainer.accelerator", "cpu"]
    if name == "quickstart":
        return [*changes, "--data.source", str(FOLDER / name)]
    rows = [{"sentence": "It was.", "sentence1": "It was.", "sentence2": "It.", "label": k % 2} for k in range(16)]
    tiny.write_rows(folder / "rows", rows)
    sizes = ["--data.subset", "null"] if name == "roberta_glue" else ["--data.train_size", "8", "--data.val_size", "8"]
    return [*changes, "--data.source", str(folder / "rows"), *sizes]


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.parametrize("name", NAMES)
def test_a_config_runs(name, tmp_path, monkeypatch, capfd):
    assert len(list(FOLDER.glob("*.yaml"))) == len(NAMES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])
    monkeypatch.setenv("COLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "english")))
    words = ["--config", str(FOLDER / f"{name}.yaml"), "--trainer.fast_dev_run", "true"]
    assert main(["fit", *words, *at_tiny_size(name, tmp_path)]) == 0, capfd.readouterr().err


def test_the_papers_configs_clip_gradients_as_its_trainer():
    for name in ("opt-1.3b", "llama-2-7b"):
        assert yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["trainer"]["gradient_clip_val"] == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_the_overlay_of_one_knot_replaces_a_configs_own_knots(name):
    config = resolved(["--config", str(FOLDER / f"{name}.yaml"), "--config", str(FOLDER / "overlays" / "one_knot.yaml")])
    run = RunLength(lambda epoch: 20, max_epochs=4, max_steps=math.inf)
    whens = {when: config["chain"][when] for when in (*KNOT_OPTIONS, "until")}
    assert ChainSchedule(**whens).in_run(run).at_steps == [20]
    assert config["model"]["init_args"]["schedule_scope"] == "run"
