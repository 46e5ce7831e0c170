"""Every config is complete: it parses, and it builds its model, at tiny size, and its data, and takes a step."""

import math
from pathlib import Path

import pytest

from cola_lightning.chain.schedule import KNOT_OPTIONS, ChainSchedule, RunLength
from cola_lightning.cli import main
from cola_lightning.study.config import resolved
from tests import tiny

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs"
BENCHMARKS = [ROOT / "benchmarks" / f"{name}.yaml" for name in ("digits", "domain_shift")]
NAMES = ["classification", "paper", "qlora_8b", "quickstart", "roberta_glue", "sft_chat", "sft_instructions", "smollm2"]
PATHS = [*(FOLDER / f"{name}.yaml" for name in NAMES), *BENCHMARKS]
TURNS = {"messages": [{"role": "user", "content": "Is it old?"}, {"role": "assistant", "content": "Yes."}]}
FOR_NEWCOMERS = {"classification": {"text": "It was."}, "qlora_8b": TURNS, "sft_chat": TURNS}
FOR_NEWCOMERS |= {"sft_instructions": {"instruction": "Is it old?", "output": "Yes."}}  # a row that each is for
ARCHITECTURES = {"classification": "roberta", "paper": "opt", "roberta_glue": "roberta"}


def at_tiny_size(name, folder):
    """What puts a tiny model and a few rows in the place of the config's own."""
    if name == "digits":
        return []
    if name == "domain_shift":
        return tiny.BYTE_GPT
    architecture = ARCHITECTURES.get(name, "llama")
    auto_class = "AutoModel" if architecture == "roberta" else "AutoModelForCausalLM"
    model = tiny.folder(folder / "model", architecture, auto_class)
    changes = ["--model.model_name", model, "--trainer.accelerator", "cpu"]
    changes += [] if architecture == "roberta" else ["--model.gguf_file", "null"]
    if name == "quickstart":
        return [*changes, "--data.source", str(FOLDER / name)]
    if name in FOR_NEWCOMERS:
        if name != "classification":
            tiny.chat_tokenizer(tiny.CHAT).save_pretrained(model)
        rows = [FOR_NEWCOMERS[name] | ({"label": k % 2} if name == "classification" else {}) for k in range(16)]
        return [*changes, "--data.source", tiny.write_rows(folder / "rows", rows)]
    rows = [{"sentence": "It was.", "sentence1": "It was.", "sentence2": "It.", "label": k % 2} for k in range(16)]
    tiny.write_rows(folder / "rows", rows)
    sizes = ["--data.subset", "null"] if name == "roberta_glue" else ["--data.train_size", "8", "--data.val_size", "8"]
    return [*changes, "--data.source", str(folder / "rows"), *sizes]


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
    config = resolved(["--config", str(FOLDER / "paper.yaml"), "--config", str(FOLDER / "overlays" / "multi_gpu.yaml")])
    assert (config["trainer"]["strategy"], config["trainer"]["devices"]) == ("ddp", "auto")


@pytest.mark.parametrize("path", [BENCHMARKS[0], FOLDER / "smollm2.yaml", FOLDER / "roberta_glue.yaml"])
def test_the_overlay_of_one_knot_replaces_a_configs_own_knots(path):
    config = resolved(["--config", str(path), "--config", str(FOLDER / "overlays" / "one_knot.yaml")])
    run = RunLength(lambda epoch: 20, max_epochs=4, max_steps=math.inf)
    whens = {when: config["chain"][when] for when in (*KNOT_OPTIONS, "until")}
    assert ChainSchedule(**whens).in_run(run).at_steps == [20]
    assert config["model"]["init_args"]["schedule_scope"] == "run"
