"""``cola compare``: methods on one config, at equal numbers of optimizer steps."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from scipy import stats

from benchmarks import paper_table
from cola_lightning.cli import main
from cola_lightning.errors import UserError
from cola_lightning.study import study
from cola_lightning.study.command import Comparison
from cola_lightning.study.config import as_words, check_same, resolved
from cola_lightning.study.figures import mean_curve, plot_curves
from cola_lightning.study.methods import METHODS, method
from cola_lightning.study.results import Result, at_best_rates, best_rates, read, write
from cola_lightning.study.run import run
from cola_lightning.study.table import summarize
from tests import forked

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")


def result(method="lora", seed=0, rate=1e-2, validation=1.0, test=None, **facts):
    facts = {"rank": 1, "links": 1, "steps": 10, "seconds": 1.0, "peak_memory": 9.0, "trainable_parameters": 5} | facts
    return Result(method, seed, rate, validation=validation, test=validation if test is None else test, **facts)


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# ---------------------------------------------------------------------- methods


def config(chain=None, rank=4, **trainer):
    whens = dict.fromkeys(("every_n_epochs", "every_n_train_steps", "at_epochs", "at_steps", "ranks", "alphas"))
    return {
        "model": {"init_args": {"rank": rank, "alpha": 8.0}},
        "chain": whens | (chain or {}),
        "trainer": {"max_epochs": None, "max_steps": -1} | trainer,
    }


@pytest.mark.parametrize(
    ("name", "given", "links", "rank"),
    [
        ("lora", config({"every_n_epochs": 5}, max_epochs=20), 1, 4),
        ("cola", config({"every_n_epochs": 5}, max_epochs=20), 4, 4),
        ("cola", config({"every_n_train_steps": 6}, max_steps=20), 4, 4),
        ("cola", config({"at_steps": [7, 30]}, max_steps=20, max_epochs=-1), 2, 4),
        ("cola", config({"at_epochs": [3], "ranks": [4, 2]}, max_epochs=5), 2, 4),
        ("cola-5", config(max_steps=20), 5, 4),
        ("cola-5", config({"every_n_epochs": 1, "ranks": [4, 2]}, max_epochs=20), 5, 4),
        ("cola-1", config(max_epochs=20), 1, 4),
        ("lora-sum-rank", config({"at_epochs": [3], "ranks": [4, 2]}, max_epochs=5), 1, 6),
        ("lora-sum-rank-5", config(max_steps=20), 1, 20),
        ("full", config(), 0, None),
    ],
)
def test_a_method_is_options_of_a_fit(name, given, links, rank):
    found = method(name, given)
    assert (found.name, found.links, found.rank) == (name, links, rank)
    if name.startswith("lora-sum-rank"):
        assert found.options["model.alpha"] / found.options["model.rank"] == 8 / 4
    if name == "full":
        assert found.options["model.target_modules"] is None


@pytest.mark.parametrize("name", [*(name for name in METHODS if name != "lora-sum-rank"), "lora-sum-rank-4"])
@pytest.mark.parametrize(
    "fit", [[], ["--chain.every_n_train_steps", "null", "--chain.every_n_epochs", "2", "--trainer.max_steps", "9"]]
)
def test_a_chain_in_steps_is_compared_over_epochs_and_the_reverse(name, fit):
    words = ["--config", str(ROOT / "configs" / "smollm2.yaml"), *fit]
    given = resolved(words)
    found = method(name, given)
    mine = resolved([*words, *as_words(found.options)])
    assert mine["trainer"] == given["trainer"]
    if name in ("cola", "rac", "relora"):
        assert (found.rank, found.links) == (8, 1)  # as many as are known before the run
        assert mine["chain"] == given["chain"]


def test_links_of_equal_length_end_with_the_run():
    assert method("cola-3", config(max_steps=20)).options["chain.at_steps"] == [7, 13]
    assert method("cola-2", config(max_epochs=5)).options["chain.at_epochs"] == [2]
    assert method("cola-2", config(max_epochs=5, max_steps=300)).options["chain.at_steps"] == [150]


# ---------------------------------------------------------------------- what is read off the results


def test_a_rate_is_chosen_on_validation_by_the_tuning_seeds_alone():
    results = [result(rate=1e-2, validation=3.0, test=0.0), result(rate=1e-1, validation=2.0, test=9.0)]
    results += [result(rate=1e-2, seed=1, validation=0.0)]
    assert best_rates(results, "min", [0]) == {"lora": 1e-1}
    assert best_rates(results, "max", [0]) == {"lora": 1e-2}
    assert best_rates(results, "min", [0, 1]) == {"lora": 1e-1}  # the seed that all rates have
    assert [r.seed for r in at_best_rates(results, "max", [0])["lora"]] == [0, 1]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_rate_at_which_a_run_diverged_is_not_chosen(mode):
    lost = result(rate=1.0, validation=None)
    assert lost.test is None
    assert best_rates([lost, result(rate=1e-2, validation=50.0)], mode, [0]) == {"lora": 1e-2}
    assert best_rates([lost], mode, [0]) == {"lora": 1.0}


def test_a_lower_metric_is_better_where_its_name_or_the_user_says_so(tmp_path):
    def better(metric, mode=None):
        return Comparison(DIGITS, str(tmp_path), ["lora"], metric=metric, mode=mode).better

    assert {better(name) for name in ("val_loss", "val_perplexity", "val_loss/dataloader_idx_1")} == {"min"}
    assert {better(name) for name in ("val_accuracy", "val_f1", "val_exact_match", "val_matthews_corrcoef")} == {"max"}
    assert (better("val_loss", "max"), better("val_mse", "min")) == ("max", "min")
    for name in ("mse", "error", "wer", "lossless_rate", "acuracy"):  # no direction is guessed
        with pytest.raises(UserError, match=f"mode: expected min or max .* received none for val_{name}"):
            better(f"val_{name}")


def test_differences_to_lora_are_paired_by_seed_and_no_interval_is_made_up():
    def rows(**values):
        return summarize({name: [result(name, k, validation=v) for k, v in enumerate(given)] for name, given in values.items()})

    lora, cola = rows(lora=[1.0, 2.0, 4.0], cola=[0.9, 1.7, 3.4, 100.0])
    assert (lora.difference, lora.low, lora.seeds, cola.seeds) == (None, None, 3, 4)
    assert cola.difference == pytest.approx(sum([-0.1, -0.3, -0.6]) / 3)
    interval = stats.ttest_rel([0.9, 1.7, 3.4], [1.0, 2.0, 4.0]).confidence_interval(0.95)
    assert (cola.low, cola.high) == pytest.approx((interval.low, interval.high))
    one = rows(lora=[1.0], cola=[0.5])[1]
    assert (one.difference, one.low, one.deviation) == (-0.5, None, None)
    alone, lost = rows(cola=[1.0], full=[None])
    assert (alone.difference, lost.test, lost.diverged) == (None, None, 1)
    assert rows(lora=[1.0, 1.0], cola=[1.0, 1.0])[1].low == 0


COMMITTED = sorted(ROOT.glob("benchmarks/*/*/table.csv"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_table_of_a_committed_study_follows_from_its_lines(path):
    results, chosen = sorted(read(path.with_name("results.jsonl")), key=lambda one: one.seed), {}
    for row in (rows := table(path)):
        of_rate = [one for one in results if (one.method, one.learning_rate) == (row["method"], float(row["learning_rate"]))]
        chosen[row["method"]] = of_rate[: int(row["seeds"])]
    for row, mine in zip(rows, summarize(chosen), strict=True):
        for name in ("validation", "test", "deviation", "difference", "low", "high", "seconds"):
            assert getattr(mine, name) == (pytest.approx(float(row[name])) if row[name] else None), name
    assert len(COMMITTED) >= 20


def test_curves_are_means_over_seeds_and_one_validation_is_seen():
    results = [result(curve=[[5, 1.0], [10, 2.0]]), result(seed=1, curve=[[5, 3.0]]), result(seed=2, validation=None)]
    assert mean_curve(results) == {5: 2.0}
    axes = Figure().add_subplot()
    once, twice = result(curve=[[10, 0.5]]), result("cola-2", curve=[[5, 0.4], [10, 0.6]], knots=[7.5])
    plot_curves(axes, {"lora": [once], "cola-2": [twice], "full": [result("full", curve=[[10, 0.3]])]})
    lone, curve, knots, full = [line for line in axes.get_lines() if len(line.get_xdata())]
    assert (lone.get_xdata().tolist(), lone.get_marker()) == ([10], "D")
    assert curve.get_xdata().tolist() == [5, 10]
    assert knots.get_xydata().tolist() == [[7.5, 0.5]]
    assert list(full.get_ydata()) == [0.3, 0.3]


# ---------------------------------------------------------------------- a study whose runs are made up


def made_up(claim, asked):
    """In the place of a run's process: it takes no time, and its metric follows from its options."""
    given = dict(zip(asked["words"][::2], asked["words"][1::2], strict=True))
    value = asked["result"]["learning_rate"] + asked["result"]["seed"] / 1000
    value += len(json.loads(given.get("--chain.at_epochs", "null")) or ()) / 10
    facts = {"steps": 10, "seconds": 1.0, "peak_memory": 9.0, "trainable_parameters": 5, "curve": [[5, 2 * value], [10, value]]}
    write([Result(**asked["result"], **facts, validation=value, test=value)], claim.parent / "result.json")
    return True


class Runs:
    """Made-up runs: ``asked`` are their names, ``changes`` fields of some results, ``failing`` the names of those that fail."""

    def __init__(self):
        self.asked, self.words, self.failing, self.changes, self.stop_at = [], [], set(), {}, None

    def __call__(self, claim, asked):
        name = claim.parent.name
        if self.stop_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append(name)
        self.words.append(asked["words"])
        if name in self.failing:
            return False
        made_up(claim, asked)
        path = claim.parent / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | self.changes.get(name, {})))
        return True


@pytest.fixture
def drawn_runs(monkeypatch):
    made = Runs()
    monkeypatch.setattr(study, "execute", made)
    return made


@pytest.fixture
def runs(drawn_runs, monkeypatch):
    """Without the figures, which take longer than all else."""
    for draw in ("draw_curves", "draw_points"):
        monkeypatch.setattr(study, draw, lambda *_: None)
    return drawn_runs


def compare(folder, *words, methods="[lora, cola-2]", seeds=2, fit=()):
    given = ["--config", DIGITS, "--output", str(folder), "--methods", methods, "--seeds", str(seeds), *words]
    return main(["compare", *given, *(["--", *fit] if fit else ())])


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_study_leaves_lines_tables_and_figures(tmp_path, drawn_runs, capsys):
    assert compare(tmp_path, "--learning_rates", "[1e-2, 2e-2]") == 0
    assert [(r["method"], r["learning_rate"], r["seed"]) for r in lines(tmp_path)] == [
        (name, rate, seed) for seed in (0, 1) for name in ("lora", "cola-2") for rate in (1e-2, 2e-2)
    ]
    lora, cola = table(tmp_path / "table.csv")
    assert (lora["method"], lora["links"], lora["learning_rate"]) == ("lora", "1", "0.01")
    assert (cola["method"], cola["links"], cola["learning_rate"]) == ("cola-2", "2", "0.01")
    assert float(cola["difference"]) == pytest.approx(0.1)
    assert "| cola-2 | 1 | 2 | 0.01 | 2 |" in (tmp_path / "table.md").read_text()
    for name in ("curves.png", "points.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "cola-2" in capsys.readouterr().out
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert sorted(names) == sorted(drawn_runs.asked)
    assert not list(tmp_path.rglob("claim*"))


@pytest.mark.parametrize(("field", "values"), [("base", ["of this machine", "of another"]), ("steps", [10, 7])])
def test_runs_that_differ_in_more_than_their_method_are_said_to(tmp_path, runs, capsys, field, values):
    names = [f"{name}-lr0.02-seed2" for name in ("lora", "cola-2")]
    runs.changes = {name: {field: value} for name, value in zip(names, values, strict=True)}
    assert compare(tmp_path) == 0
    assert "The runs of" not in capsys.readouterr().out + (tmp_path / "table.md").read_text()
    assert compare(tmp_path, seeds=3) == 0
    assert "The runs of seed 2 did not " in capsys.readouterr().out
    assert "The runs of seed 2 did not " in (tmp_path / "table.md").read_text()


def test_a_second_call_does_only_what_is_missing(tmp_path, runs):
    for _ in range(2):
        assert compare(tmp_path) == 0
        assert len(runs.asked) == 4
    assert compare(tmp_path, methods="[lora, cola-2, full]", seeds=3) == 0
    assert [name.split("-lr")[0] + name[-1] for name in runs.asked[4:]] == ["full0", "full1", "lora2", "cola-22", "full2"]
    assert compare(tmp_path, methods="[full]", seeds=1) == 0
    before = lines(tmp_path)
    assert len(before) == 9  # a smaller question forgets nothing
    shutil.rmtree(tmp_path / "runs")  # as in a clone
    assert compare(tmp_path) == 0
    assert len(runs.asked) == 9
    assert lines(tmp_path) == before


def test_seeds_that_compare_no_rates_run_at_the_best_alone_and_a_failed_run_stops_no_other_method(tmp_path, runs, capsys):
    rates = "{lora: [1e-2, 2e-2], cola-2: [3e-2]}"
    runs.failing = {"cola-2-lr0.03-seed0"}
    assert compare(tmp_path, "--learning_rates", rates, "--tuning_seeds", "1", seeds=3) == 1
    assert runs.asked[:3] == ["lora-lr0.01-seed0", "lora-lr0.02-seed0", "cola-2-lr0.03-seed0"]
    assert runs.asked[3:] == ["lora-lr0.01-seed1", "lora-lr0.01-seed2"]
    assert "cola-2-lr0.03-seed0/log.txt" in capsys.readouterr().out.replace("\n", "")
    runs.failing = set()
    assert compare(tmp_path, "--learning_rates", rates, "--tuning_seeds", "1", seeds=3) == 0
    assert runs.asked[5:] == [f"cola-2-lr0.03-seed{seed}" for seed in range(3)]


def test_ctrl_c_loses_the_run_in_hand_alone(tmp_path, runs):
    runs.stop_at = 2
    assert compare(tmp_path) == 130
    assert len(lines(tmp_path)) == 2
    runs.stop_at = None
    assert compare(tmp_path) == 0
    assert len(runs.asked) == len(set(runs.asked)) == 4


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_metric_that_is_not_finite_is_a_run_that_diverged(tmp_path, runs, name, value):
    runs.changes = {"cola-2-lr0.02-seed0": {name: value}}
    for _ in range(2):
        assert compare(tmp_path, seeds=3) == 0
    assert len(runs.asked) == 6
    assert [(line["method"], line["seed"]) for line in lines(tmp_path) if line[name] is None] == [("cola-2", 0)]
    assert [row["diverged"] for row in table(tmp_path / "table.csv")] == ["0", "1"]


def test_options_of_a_fit_and_seeds_of_splits_are_every_runs(tmp_path, runs):
    words = ["--also_seeded", "[data.split_seed]"]
    assert compare(tmp_path, *words, methods="[lora]", fit=["--trainer.max_epochs", "7"]) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_epochs"] == 7
    for seed, given in enumerate(map(resolved, runs.words)):
        assert (given["trainer"]["max_epochs"], given["seed_everything"]) == (7, seed)
        assert given["data"]["init_args"]["split_seed"] == seed


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["--seeds", "two"], {}),
        (["--seds", "2"], {}),
        (["--metric", "val_acuracy"], {}),
        (["--learning_rates", "{lora: [0.1]}"], {}),
        (["--also_seeded", "[data.split_sed]"], {}),
        ([], {"methods": "[lore]"}),
        ([], {"fit": ["--model.seed", "3"]}),
        ([], {"fit": ["--model.rang", "2"]}),
        ([], {"fit": ["--model.rank", "null"]}),
        ([], {"fit": ["--ckpt_path", "last"]}),
        ([], {"fit": ["--config", "nowhere.yaml"]}),
    ],
    ids=str,
)
def test_what_is_written_wrong_is_one_line_and_status_2(tmp_path, runs, capsys, words, changed):
    status = compare(tmp_path, *words, **changed)
    assert (status, runs.asked) == (2, [])
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_study_may_be_in_the_users_home(tmp_path, runs, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(DIGITS, tmp_path / "mine.yaml")
    assert main(["compare", "--config", "~/mine.yaml", "--output=~/study", "--methods=[lora]", "--seeds=1"]) == 0
    assert len(lines(tmp_path / "study")) == 1


# ---------------------------------------------------------------------- a study is of one config


def test_another_config_or_metric_is_another_study(tmp_path, runs, capsys):
    assert compare(tmp_path) == 0
    for words in (["--metric", "val_accuracy"], ["--also_seeded", "[data.split_seed]"], ["--", "--model.rank", "2"]):
        assert compare(tmp_path, *words) == 2
        assert "error: config: expected " in capsys.readouterr().err
    assert len(lines(tmp_path)) == len(runs.asked) == 4


def test_a_command_without_a_result_binds_no_later_one(tmp_path, runs, monkeypatch):
    def refuses(*_):
        raise UserError("model.rank: a run refuses it")

    with monkeypatch.context() as patch:
        patch.setattr(study, "execute", refuses)
        assert compare(tmp_path, "--metric", "val_los", "--mode", "min", fit=["--model.rank", "2000"]) == 2
    assert compare(tmp_path) == 0
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["model"]["init_args"]["rank"], config["metric"], config["mode"]) == (1, "val_loss", "min")


@pytest.mark.parametrize("text", ["mine: 1  # a comment\n", "trainer: {max_epochs: 50}\n", ""])
def test_a_config_in_the_output_that_is_no_studys_is_not_replaced(tmp_path, runs, capsys, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert compare(tmp_path) == 2
    assert path.read_text() == text
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("known", "mine", "differs"),
    [
        ("a: null", "a: {class_path: C, init_args: {b: 1}}", "a"),
        ("a: {class_path: C, init_args: {b: null}}", "a: null", "a"),
        ("a: {class_path: C, init_args: {b: null}}", "a: {class_path: D}", "a.class_path"),
        ("a: {b: 1}", "{a: {b: 1, introduced_since: 2}, introduced_since: {b: 1}}", None),
        ("a: {b: null, removed_since: null, off: false}", "a: {b: null}", None),
        ("a: {b: null, removed_since: true}", "a: {b: null}", "a.removed_since"),
        ("a: {class_path: C}", "a: {class_path: C, dict_kwargs: {b: 1}}", "a.dict_kwargs"),
    ],
)
def test_a_value_in_place_of_another_is_another_config(known, mine, differs):
    with pytest.raises(UserError, match=rf"^config: expected {differs}: ") if differs else contextlib.nullcontext():
        check_same(yaml.safe_load(mine), yaml.safe_load(known), "it")


# ---------------------------------------------------------------------- several processes, and those that are killed

SLOW = """
import sys, time
from pathlib import Path
from cola_lightning.study import study
sys.path.append("benchmarks")
from tests.test_compare import compare, made_up

output, hangs = Path(sys.argv[1]), sys.argv[2] == "hangs"

def execute(claim, asked):
    with (output / "asked.txt").open("a") as file:
        file.write(claim.parent.name + " ")
    time.sleep(60 if hangs and (output / "results.jsonl").exists() else 0.3)
    return made_up(claim, asked)

study.execute, study.WAIT = execute, 0.1
study.draw_curves = study.draw_points = lambda *_: None
sys.exit(compare(output))
"""


def wait_for(is_so, seconds=120):
    for _ in range(10 * seconds):
        if is_so():
            return
        time.sleep(0.1)
    pytest.fail("in vain")


def test_two_processes_share_the_runs(tmp_path):
    both = [forked.Command("-c", SLOW, tmp_path, "", cwd=ROOT) for _ in range(2)]
    for done in [one.finish(timeout=300) for one in both]:
        assert done.returncode == 0, done.stderr
        assert "cola-2" in done.stdout
    asked = (tmp_path / "asked.txt").read_text().split()
    assert len(asked) == len(set(asked)) == len(lines(tmp_path)) == 4


def test_a_run_whose_study_was_killed_is_run_again(tmp_path, runs):
    killed, asked = forked.Command("-c", SLOW, tmp_path, "hangs", cwd=ROOT), tmp_path / "asked.txt"
    wait_for(lambda: asked.exists() and len(asked.read_text().split()) == 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.finish()
    assert compare(tmp_path) == 0
    assert runs.asked[0] == asked.read_text().split()[1]
    assert len(lines(tmp_path)) == 4 == 1 + len(runs.asked)


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_run_of_another_machine_is_left_to_it_while_that_lives(tmp_path, runs, monkeypatch, is_alive):
    claim = tmp_path / "runs" / "lora-lr0.02-seed0" / "claim.1"
    claim.parent.mkdir(parents=True)
    claim.write_text("elsewhere 1")
    if not is_alive:
        os.utime(claim, (0, 0))

    def end_elsewhere(_):
        write([result(rate=0.02, validation=0.5)], claim.parent / "result.json")
        claim.unlink()

    monkeypatch.setattr(study.time, "sleep", end_elsewhere)
    assert compare(tmp_path) == 0
    assert len(runs.asked) == (3 if is_alive else 4)
    assert (lines(tmp_path)[-1 if is_alive else 0]["validation"] == 0.5) == is_alive


# ---------------------------------------------------------------------- runs that are run

SHORT = ["--trainer.max_epochs", "2", "--chain.every_n_epochs", "1"]


@pytest.fixture
def here(monkeypatch):
    """Runs are executed in this process, which has imported everything."""

    def execute(claim, asked):
        (claim.parent / "run.json").write_text(json.dumps(asked))
        return run(str(claim.parent)) == 0

    monkeypatch.setattr(study, "execute", execute)
    monkeypatch.setattr(sys, "argv", ["cola"])


@pytest.mark.usefixtures("here")
def test_a_run_is_the_fit_of_the_same_values(tmp_path):
    assert compare(tmp_path / "study", "--metric", "val_accuracy", methods="[cola, full]", seeds=1, fit=SHORT) == 0
    line, of_full = lines(tmp_path / "study")
    assert line["base"] == of_full["base"] is not None
    fit = ["--config", DIGITS, *SHORT, "--trainer.default_root_dir", str(tmp_path / "fit"), "--seed_everything", "0"]
    assert main(["fit", *fit]) == 0
    assert main(["test", *fit, "--ckpt_path", str(tmp_path / "fit/runs/version_0/checkpoints/last.ckpt")]) == 0
    folder = tmp_path / "study" / "runs" / "cola-lr0.02-seed0"
    logged = [tmp_path / f"fit/runs/version_{k}" for k in (0, 1)] + [folder]
    fitted, tested, mine = (table(path / "metrics.csv") for path in logged)
    val = [float(row["val_accuracy"]) for row in fitted if row.get("val_accuracy")]
    assert [value for _, value in line["curve"]] == pytest.approx(val, abs=0)
    assert line["validation"] == val[-1]
    assert line["test"] == float(tested[-1]["test_accuracy"]) == float(mine[-1]["test_accuracy"])
    assert (line["links"], line["rank"], line["knots"], line["steps"]) == (2, 1, [9], 18)
    assert (line["trainable_parameters"], of_full["links"]) == (330, 0)
    assert line["seconds"] > 0
    assert line["peak_memory"] > 100
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == 0
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("words", "fit", "message"),
    [
        ([], ["--trainer.limit_val_batches", "0"], "data: expected rows"),
        ([], ["--trainer.limit_test_batches", "0"], "data: expected rows"),
        ([], ["--trainer.max_steps", "1000"], "trainer.max_steps: expected at most 18"),
        (["--metric", "val_acuracy", "--mode", "max"], [], "metric: expected one of .*val_accuracy.* received val_acuracy"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_be_measured_or_divided_is_refused(tmp_path, capsys, words, fit, message):
    assert compare(tmp_path, *words, methods="[lora]", seeds=1, fit=[*SHORT, *fit]) == 2
    assert re.search(f"^error: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.usefixtures("here")
def test_a_run_that_diverges_has_a_line(tmp_path):
    diverging = [*SHORT, "--trainer.check_val_every_n_epoch", "9", "--model.optimizer.weight_decay", "3"]
    assert compare(tmp_path, "--learning_rates", "[1e6]", methods="[full]", seeds=1, fit=diverging) == 0
    (line,) = lines(tmp_path)
    assert (line["validation"], line["test"], line["links"]) == (None, None, 0)
    assert "diverged" in (tmp_path / "table.md").read_text()


def test_a_study_that_is_stopped_or_killed_ends_its_run_and_goes_on(tmp_path):
    words = ["--config", DIGITS, "--output", tmp_path, "--methods", "[lora]", "--seeds", "1", "--"]
    command = ["-m", "cola_lightning", "compare", *words, "--trainer.max_epochs"]

    def processes():
        found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return [path for path in found if str(tmp_path).encode() in path.read_bytes() and b"--run" in path.read_bytes()]

    metrics = tmp_path / "runs" / "lora-lr0.02-seed0" / "metrics.csv"
    for signal_, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        metrics.unlink(missing_ok=True)
        stopped = forked.Command(*command, "5000", env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
        wait_for(metrics.exists)
        assert processes()
        os.kill(stopped.pid, signal_)
        done = stopped.finish(timeout=60)
        assert done.returncode == status, done.stderr
        wait_for(lambda: not processes(), 20)
    (tmp_path / "config.yaml").unlink()  # which a killed study leaves
    done = forked.run(*command, "3", env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path)) == 1


def test_what_a_runs_process_refuses_ends_the_study(tmp_path, capsys):
    assert compare(tmp_path, methods="[lora]", fit=["--model.target_modules", "[nosuch]"]) == 2
    assert "error: model.target_modules: expected the name of a module" in capsys.readouterr().err


# ---------------------------------------------------------------------- the paper's table


@pytest.mark.parametrize("task", paper_table.TASKS)
def test_the_papers_table_asks_for_the_papers_numbers(task):
    words = paper_table.words(task)[1:]
    cut = words.index("--")
    given = dict(zip(words[:cut:2], words[1:cut:2], strict=True))
    asked = resolved(["--config", str(ROOT / "configs" / "smollm2.yaml"), *words[cut + 1 :]])
    model, data = asked["model"]["init_args"], asked["data"]["init_args"]
    assert (model["rank"], model["alpha"], model["target_modules"]) == (8, 16, ["q_proj", "v_proj"])
    assert (data["task"], data["batch_size"], data["train_size"], data["test_size"]) == (task, 8, None, None)
    assert (asked["trainer"]["max_epochs"], asked["chain"]["at_epochs"]) == (5, [3])
    assert (given["--seeds"], given["--metric"]) == ("3", "val_accuracy")
    assert given["--learning_rates"] == "[1e-3, 5e-4]"
    links = {name: method(name, asked).links for name in given["--methods"].strip("[]").split(", ")}
    assert links == {"lora": 1, "cola": 2}


def test_the_papers_table_runs_anew_in_another_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(paper_table, "run", asked.append)
    monkeypatch.setattr(paper_table, "FOLDER", paper_table.FOLDER)
    monkeypatch.setattr("sys.argv", ["paper_table.py", "--output", str(tmp_path), "COPA"])
    paper_table.main()
    (words,) = asked
    assert words[words.index("--output") + 1] == str(tmp_path / "copa")
