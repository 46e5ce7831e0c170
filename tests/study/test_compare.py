"""``cola compare``: methods on one config, at equal numbers of optimizer steps."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback
from scipy import stats

from cola_lightning.cli import main
from cola_lightning.cli.command_line import as_words
from cola_lightning.cli.made_run import resolve
from cola_lightning.errors import UserError
from cola_lightning.runs.folder import claim
from cola_lightning.study import study
from cola_lightning.study.comparison import Comparison
from cola_lightning.study.methods import method
from cola_lightning.study.results import Result, at_best_rates, best_rates
from cola_lightning.study.table import summarize
from tests.helpers import forked
from tests.helpers.comparing import compare, config, known_config, made_up
from tests.helpers.tiny import draw, picture
from tests.helpers.toy import DIGITS, read_csv

ROOT = Path(__file__).parents[2]


def result(method="lora", seed=0, rate=1e-2, validation=1.0, test=None, **facts):
    facts = {"rank": 1, "links": 1, "steps": 10, "seconds": 1.0, "trainable_parameters": 5} | facts
    return Result(method, seed, rate, validation=validation, test=validation if test is None else test, **facts)


# ---------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("name", "given", "options"),
    [
        ("lora", config({"every_n_epochs": 5}, max_epochs=20), {"chain.every_n_epochs": None}),
        ("cola", config({"every_n_epochs": 5}, max_epochs=20), {}),
        ("cola-5", config({"every_n_epochs": 1, "ranks": [4, 2]}, max_epochs=20), {"chain.at_epochs": [4, 8, 12, 16]}),
        ("cola-5", config({"every_n_epochs": 1, "ranks": [4, 2]}, max_epochs=20), {"chain.ranks": None}),
        ("lora-sum-rank", config({"at_epochs": [3], "ranks": [4, 2]}, max_epochs=5), {"model.rank": 6, "model.alpha": 12}),
        ("lora-sum-rank", config({"at_steps": [7, 30]}, max_steps=20, max_epochs=-1), {"model.rank": 8, "model.alpha": 16}),
        ("lora-sum-rank", config({"every_n_epochs": 5}, max_epochs=20), {"model.rank": 16, "model.alpha": 32}),
        ("lora-sum-rank-5", config(max_steps=20), {"model.rank": 20, "model.alpha": 40}),
        ("full", config(), {"model.target_modules": None}),
    ],
)
def test_a_method_is_options_of_a_fit(name, given, options):
    assert options.items() <= method(name, given).items()


def test_a_chain_in_steps_is_compared_over_epochs_and_no_method_changes_a_runs_length():
    words = ["--config", str(ROOT / "configs" / "smollm2.yaml")]
    given = resolve(words)
    for name in ("relora", "lora-sum-rank-4"):
        found = method(name, given)
        mine = resolve([*words, *as_words(found)])
        assert mine["trainer"] == given["trainer"]
        if name == "relora":
            assert mine["chain"] == given["chain"]
    assert method("cola-3", config(max_steps=20))["chain.at_steps"] == [7, 13]  # links of equal length
    assert method("cola-2", config(max_epochs=5, max_steps=300))["chain.at_steps"] == [150]


# ---------------------------------------------------------------------- what is read off the results


def test_a_rate_is_chosen_on_validation_by_the_tuning_seeds_alone():
    results = [result(rate=1e-2, validation=3.0, test=0.0), result(rate=1e-1, validation=2.0, test=9.0)]
    results += [result(rate=1e-2, seed=1, validation=0.0)]
    assert best_rates(results, "min", [0]) == {"lora": 1e-1}
    assert best_rates(results, "max", [0]) == {"lora": 1e-2}
    assert best_rates(results, "min", [0, 1]) == {"lora": 1e-1}  # the seed that all rates have
    assert best_rates([*results, result(rate=1e-1, seed=1, validation=9.0)], "min", [0]) == {"lora": 1e-1}
    assert [r.seed for r in at_best_rates(results, "max", [0])["lora"]] == [0, 1]
    for mode in ("min", "max"):
        lost = result(rate=1.0, validation=None)
        assert best_rates([lost, result(rate=1e-2, validation=50.0)], mode, [0]) == {"lora": 1e-2}
        assert best_rates([lost], mode, [0]) == {"lora": 1.0}
    for value in (math.nan, math.inf):
        assert result(test=value).validation is result(validation=value).test is None


def test_a_lower_metric_is_better_where_its_name_or_the_user_says_so(tmp_path):
    def better(metric, mode=None):
        return Comparison(DIGITS, str(tmp_path), ["lora"], metric=metric, mode=mode).better

    assert (better("val_loss/dataloader_idx_1"), better("val_exact_match")) == ("min", "max")
    assert (better("val_loss", "max"), better("val_mse", "min")) == ("max", "min")
    with pytest.raises(UserError, match=r"^metric: .*--mode"):
        better("val_lossless_rate")  # no direction is guessed


def test_differences_to_lora_are_paired_by_seed_and_no_interval_is_made_up():
    def rows(**values):
        return summarize({name: [result(name, k, validation=v) for k, v in enumerate(given)] for name, given in values.items()})

    lora, cola = rows(lora=[1.0, 2.0, 4.0], cola=[0.9, 1.7, 3.4, 100.0])
    assert (lora.difference, lora.interval, len(lora.runs), len(cola.runs)) == (None, None, 3, 4)
    assert cola.difference == pytest.approx(sum([-0.1, -0.3, -0.6]) / 3)
    interval = stats.ttest_rel([0.9, 1.7, 3.4], [1.0, 2.0, 4.0]).confidence_interval(0.95)
    assert cola.interval == pytest.approx((interval.low, interval.high))
    one = rows(lora=[1.0], cola=[0.5])[1]
    assert (one.difference, one.interval, one.deviation) == (-0.5, None, None)
    alone, lost = rows(cola=[1.0], full=[None])
    assert (alone.difference, lost.test, lost.diverged) == (None, None, 1)


# ---------------------------------------------------------------------- a study whose runs are made up


class Runs:
    """Made-up runs: ``asked`` are their names, ``changes`` fields of some results, ``failing`` the names of those that fail."""

    def __init__(self):
        self.requested, self.configs, self.failing, self.changes, self.stop_at = [], [], set(), {}, None

    def __call__(self, config, folder, metric, key):
        if self.stop_at == len(self.requested):
            raise KeyboardInterrupt
        self.requested.append(folder.name)
        self.configs.append(config)
        if folder.name in self.failing:
            raise ZeroDivisionError
        return dataclasses.replace(made_up(config, folder, metric, key), **self.changes.get(folder.name, {}))


@pytest.fixture
def runs(monkeypatch):
    """Its configuration is resolved once for all tests."""
    made = Runs()
    monkeypatch.setattr(study, "measured", made)
    monkeypatch.setattr(study, "resolve", lambda words: known_config(*words))
    return made


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_study_leaves_lines_and_tables(tmp_path, runs, capsys):
    assert compare(tmp_path, "--learning_rates", "[1e-2, 2e-2]") == 0
    assert [(r["method"], r["learning_rate"], r["seed"]) for r in lines(tmp_path)] == [
        (name, rate, seed) for seed in (0, 1) for name in ("lora", "cola-2") for rate in (1e-2, 2e-2)
    ]
    table = (tmp_path / "table.md").read_text()
    assert "| lora | 1 | 1 | 0.01 | 2 |" in table
    assert "| cola-2 | 1 | 2 | 0.01 | 2 |" in table
    assert "+0.1000 [" in table
    assert "cola-2" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(runs.requested)


@pytest.mark.parametrize(("field", "values"), [("base", ["of this machine", "of another"]), ("steps", [10, 7])])
def test_runs_that_differ_in_more_than_their_method_are_said_to(tmp_path, runs, capsys, field, values):
    names = [f"{name}-lr0.02-seed2" for name in ("lora", "cola-2")]
    runs.changes = {name: {field: value} for name, value in zip(names, values, strict=True)}
    assert compare(tmp_path) == 0
    assert "The runs of" not in capsys.readouterr().out
    assert compare(tmp_path, seeds=3) == 0
    assert "The runs of seed 2 did not " in capsys.readouterr().out
    assert "The runs of seed 2 did not " in (tmp_path / "table.md").read_text()


def test_a_second_call_does_only_what_is_missing(tmp_path, runs):
    for _ in range(2):
        assert compare(tmp_path) == 0
        assert len(runs.requested) == 4
    assert compare(tmp_path, methods="[lora, cola-2, full]", seeds=3) == 0
    assert [name.split("-lr")[0] + name[-1] for name in runs.requested[4:]] == ["full0", "full1", "lora2", "cola-22", "full2"]
    assert compare(tmp_path, methods="[full]", seeds=1) == 0
    before = lines(tmp_path)
    assert len(before) == 9  # a smaller question forgets nothing
    shutil.rmtree(tmp_path / "runs")  # as in a clone
    assert compare(tmp_path) == 0
    assert len(runs.requested) == 9
    assert lines(tmp_path) == before


def test_seeds_that_compare_no_rates_run_at_the_best_alone_and_a_failed_run_stops_no_other_method(tmp_path, runs, capsys):
    words = ["--learning_rates", "{lora: [1e-2, 2e-2], cola-2: [3e-2]}", "--tuning_seeds", "1"]
    runs.failing = {"cola-2-lr0.03-seed0"}
    assert compare(tmp_path, *words, seeds=3) == 1
    assert runs.requested[:3] == ["lora-lr0.01-seed0", "lora-lr0.02-seed0", "cola-2-lr0.03-seed0"]
    assert runs.requested[3:] == ["lora-lr0.01-seed1", "lora-lr0.01-seed2"]
    printed = capsys.readouterr().out.replace("\n", "")
    assert "failed: cola-2-lr0.03-seed0" in printed
    assert "ZeroDivisionError" in printed
    runs.failing, runs.stop_at = set(), 6
    assert compare(tmp_path, *words, seeds=3) == 130  # Ctrl-C: the run in hand is lost
    assert len(lines(tmp_path)) == 5
    runs.stop_at = None
    assert compare(tmp_path, *words, seeds=3) == 0
    assert runs.requested[5:] == [f"cola-2-lr0.03-seed{seed}" for seed in range(3)]


def test_options_of_a_fit_and_seeds_of_splits_are_every_runs(tmp_path, runs):
    words = ["--also_seeded", "[data.split_seed]"]
    assert compare(tmp_path, *words, methods="[lora]", fit=["--trainer.max_epochs", "7"]) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_epochs"] == 7
    for seed, given in enumerate(runs.configs):
        assert (given["trainer"]["max_epochs"], given["seed_everything"]) == (7, seed)
        assert given["data"]["init_args"]["split_seed"] == seed


# ---------------------------------------------------------------------- a study is of one config


def test_another_config_or_metric_is_another_study(tmp_path, runs, capsys):
    assert compare(tmp_path) == 0
    for words in (["--metric", "val_accuracy"], ["--also_seeded", "[data.split_seed]"], ["--", "--model.rank", "2"]):
        assert compare(tmp_path, *words) == 2
        assert "Use another --output" in capsys.readouterr().err
    assert len(lines(tmp_path)) == len(runs.requested) == 4
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 50}\n")  # another program's
    assert compare(tmp_path) == 2
    assert (tmp_path / "config.yaml").read_text() == "trainer: {max_epochs: 50}\n"


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_the_rows_of_a_study_may_be_pictures_and_other_pictures_are_another_study(tmp_path, runs, capsys, kind):
    pictures, config = draw(tmp_path / "pictures", 1), tmp_path / "config.yaml"
    changed, source = pictures / "top" / "9.png", pictures
    if kind == "table":
        named = sorted(pictures.rglob("*.png"))
        source, changed = tmp_path / "rows.csv", named[0]
        source.write_text("image,label\n" + "".join(f"{path},{path.parent.name}\n" for path in named))
    config.write_text("trainer: {max_epochs: 1}\n")
    words = f"compare --config {config} --output {tmp_path / 'study'} --methods [lora] --seeds 1 --".split()
    words += f"--model COLAImageClassifier --model.model_name vit --data ImageDataModule --data.source {source}".split()
    assert main(words) == 0, capsys.readouterr().err
    picture("top", 9).save(changed)
    assert main(words) == 2
    assert "Use another --output" in capsys.readouterr().err


# ---------------------------------------------------------------------- several processes, and those that are killed


def test_a_run_of_another_process_is_left_to_it_while_that_lives(tmp_path, runs, monkeypatch):
    path = tmp_path / ".claims" / "lora-lr0.02-seed0"
    program = (
        f"from cola_lightning.runs.folder import claim, Path\nfile = claim(Path({str(path)!r}))\nprint('has it', flush=True)"
    )
    other = forked.Command("-c", f"{program}\nimport time\ntime.sleep(60)", log=tmp_path / "other.txt")
    while "has it" not in (tmp_path / "other.txt").read_text():
        time.sleep(0.01)
    assert claim(path) is None
    monkeypatch.setattr(study.time, "sleep", lambda _: (os.kill(other.pid, signal.SIGKILL), other.finish()))
    assert compare(tmp_path) == 0
    assert runs.requested[-1] == "lora-lr0.02-seed0"
    assert len(runs.requested) == 4


# ---------------------------------------------------------------------- runs that are run

SHORT = ["--trainer.max_epochs", "2", "--chain.every_n_epochs", "1"]


def test_a_run_is_the_fit_of_the_same_values(tmp_path):
    assert compare(tmp_path / "study", "--metric", "val_accuracy", methods="[cola, full]", seeds=1, fit=SHORT) == 0
    line, of_full = lines(tmp_path / "study")
    assert line["base"] == of_full["base"] is not None
    fit = ["--config", DIGITS, *SHORT, "--trainer.default_root_dir", str(tmp_path / "fit"), "--seed_everything", "0"]
    assert main(["fit", *fit]) == 0
    assert main(["test", *fit, "--ckpt_path", str(tmp_path / "fit/runs/version_0/checkpoints/last.ckpt")]) == 0
    folder = tmp_path / "study" / "runs" / "cola-lr0.02-seed0"
    of_fit = tmp_path / "fit/runs/version_0"
    fitted, tested, mine = (read_csv(path / "metrics.csv") for path in (of_fit, of_fit / "test/version_0", folder))
    val = [float(row["val_accuracy"]) for row in fitted if row.get("val_accuracy")]
    assert [value for _, value in line["curve"]] == pytest.approx(val, abs=0)
    assert line["validation"] == val[-1]
    assert line["test"] == float(tested[-1]["test_accuracy"]) == float(mine[-1]["test_accuracy"])
    assert (line["links"], line["rank"], line["knots"], line["steps"]) == (2, 1, [9], 18)
    assert (line["trainable_parameters"], of_full["links"]) == (330, 0)
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == 0
    assert not list(folder.rglob("*.ckpt"))


def test_the_weights_that_the_config_keeps_are_the_ones_that_are_measured(tmp_path):
    keeping = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_accuracy", "mode": "min"}}  # of the first epoch
    fit = [*SHORT, "--model.optimizer.lr", "0.1", "--trainer.callbacks+", json.dumps(keeping)]
    assert compare(tmp_path, "--metric", "val_accuracy", methods="[cola]", seeds=1, fit=fit) == 0
    (line,) = lines(tmp_path)
    (_, first), (_, second) = line["curve"]
    assert first < second
    assert (line["validation"], line["links"]) == (first, 2)


def test_what_cannot_be_measured_or_divided_is_refused_before_the_first_step(tmp_path, capsys):
    too_long, mistyped = ["--trainer.max_steps", "1000"], ["--metric", "val_acuracy", "--mode", "max"]
    for words, fit, message in (([], too_long, "trainer.max_steps: "), (mistyped, [], "metric: .*val_accuracy")):
        assert compare(tmp_path, *words, methods="[lora]", seeds=1, fit=[*SHORT, *fit]) == 2
        assert re.search(f"^error: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "results.jsonl").exists()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_run_that_diverges_has_a_line(tmp_path):
    diverging = [*SHORT, "--trainer.check_val_every_n_epoch", "9", "--model.optimizer.weight_decay", "3"]
    assert compare(tmp_path, "--learning_rates", "[1e6]", methods="[full]", seeds=1, fit=diverging) == 0
    (line,) = lines(tmp_path)
    assert (line["validation"], line["test"], line["links"]) == (None, None, 0)
    assert "diverged" in (tmp_path / "table.md").read_text()


class StopOnce(Callback):
    """Sends a signal to the process after ten steps of its run; once, for which it has a file."""

    def __init__(self, marker: str, number: int):
        self.marker, self.number = Path(marker), number

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 10 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), self.number)


COMMAND = """
import sys
from cola_lightning.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_study_that_is_stopped_or_killed_goes_on_with_its_run(tmp_path, number, status):
    stop = {"class_path": "tests.study.test_compare.StopOnce", "init_args": {"marker": "stopped", "number": int(number)}}

    def compared(folder, *fit):
        words = ["--config", DIGITS, "--output", folder, "--methods", "[cola]", "--seeds", "1", "--", *SHORT, *fit]
        return forked.run("-c", COMMAND, "compare", *words, "--trainer.callbacks+", json.dumps(stop), cwd=tmp_path)

    refused = compared("resumed", "--model.target_modules", "[nosuch]")
    assert refused.returncode == 2
    assert "error: model.target_modules: " in refused.stderr
    done = compared("resumed")  # with other options: there is no result yet that binds it
    assert done.returncode == status, done.stderr
    assert not list(tmp_path.rglob("result.json"))
    again = compared("resumed")
    assert ": goes on from resumed/runs/cola-lr0.02-seed0/checkpoints/last.ckpt" in again.stdout.replace("\n", "")
    assert [again.returncode, compared("whole").returncode] == [0, 0]
    ((mine,), (theirs,)) = (lines(tmp_path / folder) for folder in ("resumed", "whole"))
    assert mine | {"seconds": 0} == theirs | {"seconds": 0}
    resumed, whole = (tmp_path / folder / "runs" / "cola-lr0.02-seed0" for folder in ("resumed", "whole"))
    resumed, whole = (read_csv(run / "metrics.csv") for run in (resumed, whole))
    assert [row["train_loss"] for row in resumed] == [row["train_loss"] for row in whole]
