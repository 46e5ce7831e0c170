"""Every config is complete: it parses, and it builds its model, at tiny size, and its data, and takes a step."""

import math
from pathlib import Path

import pytest

from cola_lightning.chain.schedule import KNOT_OPTIONS, ChainSchedule, RunLength
from cola_lightning.cli import main
from cola_lightning.cli.made_run import resolve
from tests.helpers import tiny
from tests.helpers.tiny import at_tiny_size

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs"
BENCHMARKS = [ROOT / "examples" / "digits.yaml", ROOT / "benchmarks" / "domain_shift.yaml"]
PATHS = [*sorted(FOLDER.glob("*.yaml")), *BENCHMARKS]


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_config_runs(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "english")))
    words = ["--config", str(path), "--trainer.fast_dev_run", "true"]
    assert main(["fit", *words, *at_tiny_size(path.stem, tmp_path)]) == 0, capfd.readouterr().err


def test_the_overlay_for_several_gpus_replaces_a_configs_strategy():
    config = resolve(["--config", str(FOLDER / "paper.yaml"), "--config", str(FOLDER / "overlays" / "multi_gpu.yaml")])
    assert (config["trainer"]["strategy"], config["trainer"]["devices"]) == ("ddp", "auto")


ONE_KNOT = ["--config", str(ROOT / "benchmarks" / "one_knot.yaml")]


def knots_of(config):
    """When the knots of a configuration fall in a run of four epochs of 20 steps."""
    options = {name: config["chain"][name] for name in (*KNOT_OPTIONS, "until", "knot", "share")}
    return ChainSchedule(**options).in_run(RunLength(lambda epoch: 20, max_epochs=4, max_steps=math.inf), 0.6).at_steps


@pytest.mark.parametrize(
    ("path", "words"), [(FOLDER / "smollm2.yaml", ["--chain.knots", "4"]), (BENCHMARKS[0], ["--config", "knots.yaml"])]
)
def test_other_knots_replace_a_configs_own(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("knots.yaml").write_text("chain: {knots: 4}")
    assert knots_of(resolve(["--config", str(path), *ONE_KNOT, *words])) == [12, 24, 36, 48]


def test_no_knots_of_one_kind_leave_a_configs_own(tmp_path):
    (tmp_path / "knots.yaml").write_text("chain: {knots: 4, until: 0.5}")
    words = ["--config", str(FOLDER / "quickstart.yaml"), "--config", str(tmp_path / "knots.yaml")]
    chain = resolve([*words, "--chain.at_epochs", "null"])["chain"]
    assert (chain["knots"], chain["until"], chain["every_n_train_steps"]) == (4, 0.5, None)


@pytest.mark.docs
def test_the_overlay_of_one_knot_replaces_a_configs_own_knots():
    config = resolve(["--config", str(FOLDER / "roberta_glue.yaml"), *ONE_KNOT])
    assert knots_of(config) == [20]
    assert config["model"]["init_args"]["schedule_scope"] == "run"
