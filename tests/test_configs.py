"""Every config is complete: it parses, and it builds its model, at tiny size, and its data, and takes a step."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import transformers
import yaml

from cola_lightning.cli import main
from tests import tiny

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
OVERLAYS = sorted(FOLDER.glob("overlays/*.yaml"))
NAMES = ["digits", "domain_shift", "llama-2-7b", "opt-1.3b", "quickstart", "roberta_glue", "smollm2", "sst2_smollm2"]
ARCHITECTURES = {"opt-1.3b": "opt", "roberta_glue": "roberta"}


def test_all_configs_are_here():
    assert [path.stem for path in CONFIGS] == NAMES
    assert [path.stem for path in OVERLAYS] == ["fsdp2"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_short_and_says_what_it_is_for(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert f"cola fit --config configs/{path.name}" in header
    assert {"model", "data", "chain", "trainer", "seed_everything"} <= yaml.safe_load(path.read_text()).keys()


@pytest.mark.parametrize("name", ["opt-1.3b", "llama-2-7b"])
def test_the_papers_configs_clip_gradients_as_hugging_faces_trainer(name):
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    theirs = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    assert config["trainer"]["gradient_clip_val"] == theirs["max_grad_norm"] == 1.0
    assert config["trainer"].get("gradient_clip_algorithm", "norm") == "norm"


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_is_of_the_trainer_alone(path):
    text = path.read_text()
    assert f"--config configs/overlays/{path.name}" in text
    assert yaml.safe_load(text).keys() == {"trainer"}


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
    (folder / "rows").mkdir()
    rows = [{"sentence": "It was.", "sentence1": "It was.", "sentence2": "It.", "label": k % 2} for k in range(16)]
    for split in ("train", "validation", "test"):
        (folder / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    is_glue = name == "roberta_glue"
    sizes = ["--data.subset", "null"] if is_glue else ["--data.train_size", "8", "--data.val_size", "8"]
    return [*changes, "--data.source", str(folder / "rows"), *sizes]


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_runs(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])
    monkeypatch.setenv("COLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "english")))
    arguments = at_tiny_size(path.stem, tmp_path)
    status = main(["fit", "--config", str(path), "--trainer.fast_dev_run", "true", *arguments])
    assert status == 0, capfd.readouterr().err
