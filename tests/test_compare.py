"""``cola compare``: methods on one config, at equal numbers of optimizer steps."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import yaml
from matplotlib.figure import Figure
from optuna.trial import TrialState
from scipy import stats
from sqlalchemy.exc import OperationalError

from benchmarks import paper_table
from cola_lightning.cli import main
from cola_lightning.errors import UserError
from cola_lightning.study import process, study
from cola_lightning.study.comparison import Comparison
from cola_lightning.study.config import as_words, check_same, resolved
from cola_lightning.study.figures import mean_curve, plot_curves
from cola_lightning.study.methods import METHODS, method
from cola_lightning.study.results import Result, Run, at_best_rates, best_rates, read, write
from cola_lightning.study.run import _peak_memory
from cola_lightning.study.table import summarize
from cola_lightning.study.trials import Trials
from cola_lightning.writing import atomic_file
from tests import forked

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")


def result(method="lora", seed=0, rate=1e-2, validation=1.0, test=None, **facts):
    facts = {"rank": 1, "links": 1, "steps": 10, "seconds": 1.0, "peak_memory": 9.0, "trainable_parameters": 5} | facts
    return Result(method, seed, rate, validation=validation, test=validation if test is None else test, **facts)


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


def test_the_largest_rank_of_a_chain_is_known_without_its_number_of_links():
    assert method("cola", config({"at_steps": [5, 9], "ranks": [1, 3, 2]}, max_epochs=2)).rank == 3


def test_links_of_equal_length_end_with_the_run():
    assert method("cola-3", config(max_steps=20)).options["chain.at_steps"] == [7, 13]
    assert method("cola-2", config(max_epochs=5)).options["chain.at_epochs"] == [2]
    assert method("cola-2", config(max_epochs=5, max_steps=300)).options["chain.at_steps"] == [150]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_fit_that_parses(name):
    options = method(name, resolved(["--config", DIGITS])).options
    changed = resolved(["--config", DIGITS, *as_words(options)])
    assert changed["trainer"]["max_epochs"] == 50


# ---------------------------------------------------------------------- what is read off the results


def test_a_rate_is_chosen_on_validation_by_the_tuning_seeds_alone():
    results = [result(rate=1e-2, validation=3.0, test=0.0), result(rate=1e-1, validation=2.0, test=9.0)]
    results += [result(rate=1e-2, seed=1, validation=0.0)]
    assert best_rates(results, "min", [0]) == {"lora": 1e-1}
    assert best_rates(results, "max", [0]) == {"lora": 1e-2}
    assert best_rates(results, "min", [0, 1]) == {"lora": 1e-1}  # the seed that all rates have
    assert [r.seed for r in at_best_rates(results, "max", [0])["lora"]] == [0, 1]


@pytest.mark.parametrize(
    ("metric", "mode", "better"),
    [
        ("val_loss", None, "min"),
        ("val_perplexity", None, "min"),
        ("val_accuracy", None, "max"),
        ("val_f1", None, "max"),
        ("val_exact_match", None, "max"),
        ("val_matthews_corrcoef", None, "max"),
        ("val_loss", "max", "max"),
        ("val_loss/dataloader_idx_1", None, "min"),
        ("val_mse", "min", "min"),
    ],
)
def test_a_lower_metric_is_better_where_its_name_or_the_user_says_so(tmp_path, metric, mode, better):
    assert Comparison(DIGITS, str(tmp_path), ["lora"], metric=metric, mode=mode).better == better


@pytest.mark.parametrize("name", ["mse", "error", "wer", "nll", "bpb", "lossless_rate", "acuracy"])
def test_no_direction_is_guessed_for_another_metric(tmp_path, name):
    with pytest.raises(UserError, match=f"mode: expected min or max .* received none for val_{name}"):
        Comparison(DIGITS, str(tmp_path), ["lora"], metric=f"val_{name}")


def test_a_rate_at_which_a_run_diverged_is_not_chosen():
    lost = result(rate=1.0, validation=None)
    assert lost.test is None
    for mode in ("min", "max"):
        assert best_rates([lost, result(rate=1e-2, validation=50.0)], mode, [0]) == {"lora": 1e-2}
        assert best_rates([lost], mode, [0]) == {"lora": 1.0}


def test_differences_to_lora_are_paired_by_seed():
    values = {"lora": [1.0, 2.0, 4.0], "cola": [0.9, 1.7, 3.4, 100.0]}
    by_method = {name: [result(name, seed, validation=v) for seed, v in enumerate(given)] for name, given in values.items()}
    lora, cola = summarize(by_method)
    assert (lora.difference, lora.low, lora.seeds) == (None, None, 3)
    differences = [-0.1, -0.3, -0.6]
    mean, error = sum(differences) / 3, stats.sem(differences)
    assert cola.difference == pytest.approx(mean)
    assert (cola.low, cola.high) == pytest.approx(stats.t.interval(0.95, 2, mean, error))
    assert cola.seeds == 4


def test_no_interval_is_made_up():
    one = summarize({"lora": [result()], "cola": [result("cola", validation=0.5)]})[1]
    assert (one.difference, one.low, one.deviation) == (-0.5, None, None)
    alone, lost = summarize({"cola": [result("cola")], "full": [result("full", validation=None, links=0)]})
    assert alone.difference is None
    assert (lost.test, lost.diverged) == (None, 1)
    same = {name: [result(name, seed) for seed in (0, 1)] for name in ("lora", "cola")}
    assert summarize(same)[1].low == 0


def test_results_are_read_as_they_were_written(tmp_path):
    results = [result(curve=[[5, 0.25]], knots=[5]), result("full", validation=None, rank=None, links=0, curve=[], knots=[])]
    write(results, tmp_path / "results.jsonl")
    assert read(tmp_path / "results.jsonl") == results
    assert read(tmp_path / "none.jsonl") == []
    for line in (b'{"method": "lora"}', b"\xe4", b"5"):
        (tmp_path / "results.jsonl").write_bytes(line + b"\n")
        with pytest.raises(UserError, match=r"output: expected a run's result in .*results\.jsonl, line 1, received"):
            read(tmp_path / "results.jsonl")


def test_several_processes_write_one_file(tmp_path):
    with atomic_file(tmp_path / "file", is_shared=True) as mine:
        other = "import sys, pathlib\nfrom cola_lightning.writing import atomic_file\n"
        other += "with atomic_file(pathlib.Path(sys.argv[1]), is_shared=True) as path: path.write_text('theirs')"
        forked.run("-c", other, tmp_path / "file", check=True)
        assert (tmp_path / "file").read_text() == "theirs"
        mine.write_text("mine")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_mean_curve_has_the_steps_that_all_seeds_have():
    results = [result(curve=[[5, 1.0], [10, 2.0]]), result(seed=1, curve=[[5, 3.0]]), result(seed=2, validation=None)]
    assert mean_curve(results) == {5: 2.0}


def test_a_metric_that_is_measured_once_is_seen():
    axes = Figure().add_subplot()
    once, twice = result(curve=[[10, 0.5]]), result("cola-2", curve=[[5, 0.4], [10, 0.5]])
    plot_curves(axes, {"lora": [once], "cola-2": [twice]})
    lines = [line for line in axes.get_lines() if len(line.get_xdata())]
    assert [(line.get_xdata().tolist(), line.get_marker()) for line in lines] == [([10], "D"), ([5, 10], "None")]


def test_a_method_with_a_name_has_one_color_in_every_figure():
    names = {"lora": "LoRA", "cola-2": "2 links", "cola-4": "4 links"}
    of_four = result("cola-4", curve=[[5, 0.4], [10, 0.5]])
    colors = []
    for others in ({"lora": [of_four], "cola-2": [of_four]}, {}):
        axes = Figure().add_subplot()
        plot_curves(axes, others | {"cola-4": [of_four]}, names=names)
        lines, labels = axes.get_legend_handles_labels()
        colors.append(lines[labels.index("4 links")].get_color())
    assert colors[0] == colors[1]


# ---------------------------------------------------------------------- a study whose runs are made up


class Runs:
    """In the place of processes: each run takes no time, and its metric follows from its options."""

    def __init__(self, monkeypatch):
        self.asked, self.refusing, self.stop_at, self.bases, self.steps = [], set(), None, {}, {}
        monkeypatch.setattr(process, "execute", self)

    def __call__(self, words, metric, folder, tell, tell_every):
        given = dict(zip(words[::2], words[1::2], strict=True))
        rate, seed = float(given["--model.optimizer.lr"]), int(given["--seed_everything"])
        assert folder.name.endswith(f"-lr{rate}-seed{seed}")
        assert given["--trainer.default_root_dir"] == str(folder)
        if self.stop_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append(folder.name)
        if folder.name in self.refusing:
            return None
        tell(0.5)
        value = rate + seed / 1000 + len(json.loads(given.get("--chain.at_epochs", "null")) or ()) / 10
        curve = [[5, 2 * value], [10, value]]
        facts = {"seconds": 1.0, "peak_memory": 9.0, "trainable_parameters": 5, "curve": curve}
        facts |= {"steps": self.steps.get(folder.name, 10), "base": self.bases.get(folder.name)}
        return facts | {"validation": value, "test": value}


@pytest.fixture
def drawn_runs(monkeypatch):
    return Runs(monkeypatch)


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
        (name, rate, seed) for seed in (0, 1) for rate in (1e-2, 2e-2) for name in ("lora", "cola-2")
    ]
    fields = {"method", "seed", "learning_rate", "rank", "links", "validation", "test", "seconds", "peak_memory"}
    assert fields < lines(tmp_path)[0].keys()
    with (tmp_path / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["method"], row["links"], row["learning_rate"]) for row in table] == [
        ("lora", "1", "0.01"),
        ("cola-2", "2", "0.01"),
    ]
    assert float(table[1]["difference"]) == pytest.approx(0.1)
    assert "| cola-2 | 1 | 2 | 0.01 | 2 |" in (tmp_path / "table.md").read_text()
    for name in ("curves.png", "points.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "cola-2" in capsys.readouterr().out


def test_a_difference_across_two_bases_is_said_to_be_one(tmp_path, runs, capsys):
    runs.bases = {f"{name}-lr0.02-seed{seed}": f"{seed}" for name in ("lora", "cola-2") for seed in (0, 1)}
    assert compare(tmp_path) == 0
    assert [line["base"] for line in lines(tmp_path)] == ["0", "0", "1", "1"]
    warning = "The runs of seed 2 did not begin from the same weights: a difference there is not the method's alone."
    assert warning not in capsys.readouterr().out + (tmp_path / "table.md").read_text()
    runs.bases = {"lora-lr0.02-seed2": "2", "cola-2-lr0.02-seed2": "of another machine"}
    assert compare(tmp_path, seeds=3) == 0
    assert warning in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "table.md").read_text().endswith(f"\n\n{warning}\n")


def test_runs_of_unequal_length_are_said_to_be(tmp_path, runs, capsys):
    assert compare(tmp_path) == 0
    assert "optimizer steps" not in capsys.readouterr().out.replace("\n", " ") + (tmp_path / "table.md").read_text()
    runs.steps = {"cola-2-lr0.02-seed2": 7}
    assert compare(tmp_path, seeds=3) == 0
    warning = "The runs of seed 2 did not take the same number of optimizer steps, as where an EarlyStopping or "
    warning += "trainer.max_time ends them."
    assert warning in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "table.md").read_text().endswith(f"\n\n{warning}\n")


def test_a_database_that_is_lost_while_a_run_is_executed_loses_no_result(tmp_path, runs, monkeypatch, capsys):
    database, words = tmp_path / "study.db", ["--storage", f"sqlite:///{tmp_path}/study.db"]
    whole = []

    def losing(words, metric, folder, tell, tell_every):
        facts = runs(words, metric, folder, tell, tell_every)
        whole.append(database.read_bytes())
        database.write_bytes(b"no database" * 1000)
        tell(0.9)
        return facts

    monkeypatch.setattr(process, "execute", losing)
    monkeypatch.setattr(study, "ALIVE_EVERY", -1.0)
    assert compare(tmp_path / "study", *words, seeds=1) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: storage: the database no longer answers (")
    assert [line["method"] for line in lines(tmp_path / "study")] == ["lora"]
    database.write_bytes(whole[0])
    monkeypatch.setattr(process, "execute", runs)
    assert compare(tmp_path / "study", *words, seeds=1) == 0
    assert runs.asked == ["lora-lr0.02-seed0", "cola-2-lr0.02-seed0"]


def test_a_database_that_is_lost_before_the_first_run_is_told_of_in_one_line(tmp_path, runs, monkeypatch, capsys):
    describe = study.as_text

    def losing(config):
        (tmp_path / "study.db").write_bytes(b"no database" * 1000)
        return describe(config)

    monkeypatch.setattr(study, "as_text", losing)
    assert compare(tmp_path / "study", "--storage", f"sqlite:///{tmp_path}/study.db") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: storage: the database no longer answers (")
    assert runs.asked == []


def test_a_second_call_does_only_what_is_missing(tmp_path, runs):
    assert compare(tmp_path) == 0
    first = list(runs.asked)
    assert compare(tmp_path) == 0
    assert runs.asked == first
    assert compare(tmp_path, methods="[lora, cola-2, full]", seeds=3) == 0
    assert [name.split("-lr")[0] + name[-1] for name in runs.asked[4:]] == ["full0", "full1", "lora2", "cola-22", "full2"]
    assert compare(tmp_path, methods="[full]", seeds=1) == 0
    assert len(lines(tmp_path)) == 9  # a smaller question forgets nothing


def test_lines_alone_are_enough_to_go_on(tmp_path, runs):
    assert compare(tmp_path) == 0
    (tmp_path / "study.journal").unlink()
    before = lines(tmp_path)
    assert compare(tmp_path) == 0
    assert len(runs.asked) == 4
    assert lines(tmp_path) == before


def test_seeds_that_compare_no_rates_run_at_the_best_alone(tmp_path, runs):
    rates = "{lora: [1e-2, 2e-2], cola-2: [3e-2]}"
    assert compare(tmp_path, "--learning_rates", rates, "--tuning_seeds", "1", seeds=3) == 0
    assert runs.asked[:3] == ["lora-lr0.01-seed0", "cola-2-lr0.03-seed0", "lora-lr0.02-seed0"]
    assert runs.asked[3:] == [f"{name}-seed{seed}" for seed in (1, 2) for name in ("lora-lr0.01", "cola-2-lr0.03")]


def test_ctrl_c_loses_the_run_in_hand_alone(tmp_path, runs):
    runs.stop_at = 2
    assert compare(tmp_path) == 130
    assert len(lines(tmp_path)) == 2
    runs.stop_at = None
    assert compare(tmp_path) == 0
    assert len(runs.asked) == len(set(runs.asked)) == 4


def test_a_run_that_fails_stops_no_other_and_is_done_again(tmp_path, runs, capsys):
    runs.refusing = {"lora-lr0.02-seed0"}
    assert compare(tmp_path) == 1
    assert len(lines(tmp_path)) == 3
    assert "failed: lora, learning rate 0.02, seed 0" in capsys.readouterr().out
    runs.refusing = set()
    assert compare(tmp_path) == 0
    assert runs.asked[-1] == "lora-lr0.02-seed0"
    assert len(lines(tmp_path)) == 4


def test_a_run_that_fails_is_reported_before_the_next_begins(tmp_path, runs, monkeypatch, caplog):
    def execute(*given):
        said.append(caplog.text)
        return runs(*given)

    said = []
    monkeypatch.setattr(process, "execute", execute)
    runs.refusing = {"cola-2-lr0.02-seed0"}
    assert compare(tmp_path) == 1
    assert [text.count("failed: cola-2, learning rate 0.02, seed 0: ") for text in said] == [0, 0, 1, 1]


def test_a_run_that_is_finished_is_reported_before_the_next_begins(tmp_path, runs, monkeypatch, caplog):
    def execute(*given):
        said.append([message for message in caplog.messages if message.startswith("finished: ")])
        return runs(*given)

    said = []
    monkeypatch.setattr(process, "execute", execute)
    with caplog.at_level("INFO"):
        assert compare(tmp_path) == 0
    first = lines(tmp_path)[0]
    scores = f"val_loss {first['validation']:.4f}, on test {first['test']:.4f}"
    assert [len(messages) for messages in said] == [0, 1, 2, 3]
    assert said[1] == [f"finished: lora, learning rate 0.02, seed 0: {scores}"]


def test_a_run_is_done_whenever_another_process_gives_it_up(tmp_path, runs, monkeypatch):
    claim, given_up = Trials.claim, []

    def overtaken(self, wanted):
        if given_up:
            return claim(self, wanted)
        given_up.append(claim(self, wanted)[0])
        self.fail(given_up[0])
        return None

    monkeypatch.setattr(Trials, "claim", overtaken)
    monkeypatch.setattr(study, "WAIT", 0.0)
    assert compare(tmp_path, methods="[lora]", seeds=1) == 0
    assert len(lines(tmp_path)) == 1


def test_options_after_the_dashes_are_every_runs(tmp_path, runs):
    assert compare(tmp_path, methods="[lora]", seeds=1, fit=["--trainer.max_epochs", "7"]) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_epochs"] == 7


def test_splits_may_follow_the_seeds(tmp_path, runs, monkeypatch):
    seen = []

    def do(words, *arguments):
        seen.append(resolved(words)["data"]["init_args"]["split_seed"])
        return runs(words, *arguments)

    monkeypatch.setattr(process, "execute", do)
    compare(tmp_path, "--also_seeded", "[data.split_seed]", methods="[lora]", seeds=3)
    assert seen == [0, 1, 2]
    assert compare(tmp_path, methods="[lora]", seeds=3) == 2  # and no other


def test_a_study_may_be_in_the_users_home(tmp_path, runs, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(Path(DIGITS).read_text())
    words = ["--config", "~/mine.yaml", "--output=~/study", "--storage=~/mine.journal", "--methods=[lora]", "--seeds=1"]
    assert main(["compare", *words]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.journal", "mine.yaml", "study"]


def test_a_database_is_a_storage_too(tmp_path, runs):
    storage = ["--storage", f"sqlite:///{tmp_path}/study.db", "--study_name", "digits"]
    assert compare(tmp_path / "study", *storage, methods="[lora]") == 0
    assert compare(tmp_path / "study", *storage, methods="[lora]") == 0
    assert len(runs.asked) == 2
    assert not (tmp_path / "study" / "study.journal").exists()


def test_processes_that_create_a_databases_tables_at_once_open_it(tmp_path, monkeypatch):
    asked, open_database = [], optuna.storages.RDBStorage

    def overtaken(url):
        asked.append(url)
        if len(asked) == 1:
            raise OperationalError("CREATE TABLE studies", {}, Exception("table studies already exists"))
        return open_database(url)

    monkeypatch.setattr("cola_lightning.study.storage.RDBStorage", overtaken)
    assert Trials(f"sqlite:///{tmp_path}/study.db", "study", "val_loss", "min").results() == []
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("words", "changed", "message"),
    [
        (["--seeds", "0"], {}, "error: seeds: expected a whole number of at least 1, received 0"),
        (["--seeds", "two"], {}, "error: seeds: expected int, received 'two'"),
        (["--seds", "2"], {}, "--seds"),
        ([], {"fit": ["--model.seed", "3"]}, "error: model.seed: expected null"),
        ([], {"fit": ["--model.rang", "2"]}, "error: "),
        ([], {"fit": ["--help"]}, "--help', which prints something else than a run's config"),
        (
            [],
            {"fit": ["--model.help", "benchmarks.digits_model.COLADigits"]},
            "error: cola fit: expected options of a run, received '--config ",
        ),
        ([], {"fit": ["--model.optimizer", "null"]}, "error: model.optimizer: "),
        (
            [],
            {"fit": ["--model.optimizer", "transformers.Adafactor", "--model.optimizer.lr", "null"]},
            "error: model.optimizer: expected a class and its lr, ",
        ),
        (["--also_seeded", "[data.split_sed]"], {}, "Option 'split_sed' is not accepted"),
        (["--storage", "nosuchbase://here"], {}, "error: storage: expected a file, or the URL of a database that answers"),
    ],
    ids=str,
)
def test_what_is_written_wrong_is_one_line_and_status_2(tmp_path, runs, capsys, words, changed, message):
    status = compare(tmp_path, *words, **changed)
    error = capsys.readouterr().err.strip()
    assert (status, runs.asked) == (2, [])
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error


def test_a_full_disk_is_one_line(tmp_path, runs, monkeypatch, capsys):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(optuna.storages.journal.JournalFileBackend, "append_logs", fails)
    assert compare(tmp_path) == 1
    assert "study.journal could not be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["file", "file/study"])
def test_an_output_that_is_a_file_or_in_one_is_refused(tmp_path, runs, capsys, output):
    (tmp_path / "file").touch()
    assert compare(tmp_path / output) == 2
    assert capsys.readouterr().err.startswith("error: output: expected a folder that can be written, received ")


@pytest.mark.parametrize("text", ["mine: 1  # a comment\n", "trainer: {max_epochs: 1}\n", "[", "\xff"])
def test_a_config_in_the_output_that_is_no_studys_is_not_replaced(tmp_path, runs, capsys, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="latin-1")
    assert compare(tmp_path) == 2
    assert path.read_text(encoding="latin-1") == text
    assert capsys.readouterr().err.startswith("error: output: expected a folder without a config.yaml of another kind, ")
    path.unlink()
    assert compare(tmp_path) == 0


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (["--model.rank", "null"], "model.rank: expected int, received 'None'"),
        (["--ckpt_path", "last"], "ckpt_path: expected null, as each run of a study begins anew, received 'last'"),
    ],
)
def test_what_a_run_would_refuse_or_pass_over_is_refused_before_any(tmp_path, runs, capsys, fit, message):
    assert compare(tmp_path, methods="[lora, cola-2, lora-sum-rank]", fit=fit) == 2
    assert capsys.readouterr().err.strip() == f"error: {message}"
    assert list(tmp_path.iterdir()) == runs.asked == []


def test_what_a_refused_command_asked_for_binds_no_later_one(tmp_path, runs, monkeypatch):
    def refuses(*_):
        raise UserError("model.rank: a run refuses it")

    with monkeypatch.context() as patch:
        patch.setattr(process, "execute", refuses)
        assert compare(tmp_path, "--metric", "val_los", "--mode", "min", fit=["--model.rank", "2000"]) == 2
    assert compare(tmp_path) == 0
    assert len(lines(tmp_path)) == 4
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["model"]["init_args"]["rank"], config["metric"], config["mode"]) == (1, "val_loss", "min")


def test_one_storage_does_not_mix_two_configs(tmp_path, runs, capsys):
    storage = ["--storage", f"sqlite:///{tmp_path}/study.db"]
    assert compare(tmp_path / "one" / "digits", *storage) == 0
    assert compare(tmp_path / "two" / "digits", *storage, fit=["--model.rank", "2"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "error: config: expected model.init_args.rank: 1, as in the study 'digits', received 2; a different"
    )
    assert compare(tmp_path / "two" / "digits", *storage, "--study_name", "two", fit=["--model.rank", "2"]) == 0
    assert len(runs.asked) == 8


def test_commands_that_begin_at_once_do_not_mix_two_configs(tmp_path, runs, monkeypatch, capsys):
    settle = study.Study._settle_config

    def settle_and_be_overtaken(self):
        mine = settle(self)
        self.trials.config = mine.replace("rank: 1\n", "rank: 2\n")
        return mine

    monkeypatch.setattr(study.Study, "_settle_config", settle_and_be_overtaken)
    assert compare(tmp_path) == 2
    assert "error: config: expected model.init_args.rank: 2, as in the study " in capsys.readouterr().err
    assert runs.asked == []


def test_a_folder_of_a_former_version_says_its_metric_from_then_on(tmp_path, runs):
    assert compare(tmp_path) == 0
    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(("metric:", "mode:"))))
    assert compare(tmp_path) == 0
    assert yaml.safe_load(path.read_text())["metric"] == "val_loss"


def test_lines_of_one_metric_are_not_taken_for_anothers(tmp_path, runs, capsys):
    assert compare(tmp_path) == 0
    (tmp_path / "study.journal").unlink()
    assert compare(tmp_path, "--metric", "val_accuracy") == 2
    assert "error: config: expected metric: 'val_loss', as in " in capsys.readouterr().err
    assert len(lines(tmp_path)) == len(runs.asked) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_metric_that_is_not_finite_is_a_run_that_diverged(tmp_path, runs, monkeypatch, name, value):
    def diverges(words, *arguments):
        facts = runs(words, *arguments)
        return facts | {name: value} if "-seed0" in arguments[1].name and "cola" in arguments[1].name else facts

    monkeypatch.setattr(process, "execute", diverges)
    for _ in range(2):
        assert compare(tmp_path, seeds=3) == 0
    assert len(runs.asked) == 6
    lost = [(line["method"], line["seed"]) for line in lines(tmp_path) if line[name] is None]
    assert lost == [("cola-2", 0)]
    with (tmp_path / "table.csv").open() as file:
        assert [row["diverged"] for row in csv.DictReader(file)] == ["0", "1"]


def test_another_config_is_another_study(tmp_path, runs, capsys):
    assert compare(tmp_path) == 0
    assert compare(tmp_path, fit=["--model.rank", "2"]) == 2
    assert "config: expected model.init_args.rank: 1, as in" in capsys.readouterr().err
    assert compare(tmp_path, "--metric", "val_accuracy") == 2
    assert "metric, mode: expected val_loss and min, as in the study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("known", "mine", "message"),
    [
        ("callbacks: null", "callbacks: {class_path: C, init_args: {a: 1}}", "callbacks: None, as in"),
        ("callbacks: {class_path: C, init_args: {a: null}}", "callbacks: null", "callbacks: {'class_path': 'C', "),
        ("callbacks: {class_path: C, init_args: {a: null}}", "callbacks: {class_path: D}", "callbacks.class_path: 'C', as in"),
        ("callbacks: [{class_path: C}]", "callbacks: {class_path: C}", "callbacks: [{'class_path': 'C'}], as in"),
        ("how: {}", "how: {a: 1}", "how: {}, as in"),
        ("how: {a: 1}", "how: {a: 1, introduced_since: 2}\nintroduced_since: {a: 1}", None),
        ("how: {a: null, removed_since: null, off: false}", "how: {a: null}", None),
        ("how: {a: null, removed_since: true}", "how: {a: null}", "how.removed_since: True, as in"),
        ("how: {class_path: C}", "how: {class_path: C, dict_kwargs: {a: 1}}", "how.dict_kwargs: None, as in"),
        ("how: {class_path: C, dict_kwargs: {a: 1}}", "how: {class_path: C}", "how.dict_kwargs: {'a': 1}, as in"),
    ],
)
def test_a_value_in_place_of_another_is_another_config(known, mine, message):
    if message is None:
        check_same(mine, known, "it")
        return
    with pytest.raises(UserError) as caught:
        check_same(mine, known, "it")
    assert str(caught.value).startswith(f"config: expected {message}")


# ---------------------------------------------------------------------- trials that several processes take


def trials(tmp_path):
    return Trials(str(tmp_path / "study.journal"), "study", "val_loss", "min")


def test_two_processes_share_the_runs(tmp_path):
    mine, theirs = trials(tmp_path), trials(tmp_path)
    asked = [Run("lora", 0.01, seed) for seed in range(3)]
    mine.enqueue(asked)
    theirs.enqueue(asked)
    taken = [one.claim(asked)[1] for one in (mine, theirs, mine)]
    assert taken == asked
    assert all(trial.user_attrs["alive"][1] == os.getpid() for trial in mine.study.trials)
    assert mine.claim(asked) is None
    mine.enqueue(asked)
    assert theirs.claim(asked) is None
    assert mine.are_running()


def test_a_run_that_two_have_asked_for_at_once_is_done_once(tmp_path):
    mine, theirs = trials(tmp_path), trials(tmp_path)
    for one in (mine, theirs):  # as if neither had seen the other's
        one.study.enqueue_trial({"learning_rate": 0.01, "seed": 0}, user_attrs={"method": "lora"})
    asked = [Run("lora", 0.01, 0)]
    assert mine.claim(asked)[1] == asked[0]
    assert theirs.claim(asked) is None
    states = [trial.state for trial in mine.study.trials]
    assert states == [TrialState.RUNNING, TrialState.PRUNED]


def test_what_an_earlier_command_left_waiting_is_not_done_but_for_who_asks_for_it(tmp_path):
    mine, theirs, earlier, run = trials(tmp_path), trials(tmp_path), Run("rac", 0.01, 0), Run("lora", 0.01, 0)
    mine.enqueue([earlier, run])
    assert theirs.claim([run])[1] == run
    assert theirs.claim([run]) is None
    mine.enqueue([earlier])
    assert mine.claim([earlier])[1] == earlier


def test_the_age_of_a_lock_can_be_read(tmp_path, monkeypatch):
    seen, link = [], os.symlink

    def spy(target, path):
        link(target, path)
        seen.append(Path(path).stat().st_mtime if Path(path).exists() else None)

    monkeypatch.setattr(os, "symlink", spy)
    monkeypatch.chdir(tmp_path)
    Trials("studies/digits/study.journal", "digits", "val_loss", "min")
    assert seen
    assert None not in seen


@pytest.mark.parametrize("length", [1, 7, 120])
def test_half_a_line_at_a_journals_end_is_dropped(tmp_path, runs, length):
    assert compare(tmp_path, methods="[lora]") == 0
    journal = tmp_path / "study.journal"
    journal.write_bytes(journal.read_bytes()[:-length])
    for _ in range(2):
        assert compare(tmp_path, methods="[lora]", seeds=3) == 0
    assert [line["seed"] for line in lines(tmp_path)] == [0, 1, 2]
    assert len(runs.asked) == 3


def test_a_file_that_is_no_journal_keeps_its_text(tmp_path):
    (tmp_path / "mine.yaml").write_text("rank: 1")
    with pytest.raises(UserError, match=r"storage: expected a journal, received '.*mine\.yaml', which ends in 'rank: 1'"):
        Trials(str(tmp_path / "mine.yaml"), "study", "val_loss", "min")
    assert (tmp_path / "mine.yaml").read_text() == "rank: 1"


@pytest.mark.parametrize("alive", [["elsewhere", 1, 0.0], [None, 2**22 + 1, None]], ids=["silent", "gone"])
def test_a_run_whose_process_is_gone_is_done_again(tmp_path, alive):
    import socket

    mine, run = trials(tmp_path), Run("lora", 0.01, 0)
    mine.enqueue([run])
    trial, _ = mine.claim([run])
    assert alive[0] == "elsewhere" or not Path(f"/proc/{alive[1]}").exists()
    trial.set_user_attr("alive", [alive[0] or socket.gethostname(), alive[1], alive[2] or time.time() * (alive[0] is None)])
    assert not mine.are_running()
    theirs = trials(tmp_path)
    theirs.enqueue([run])
    assert theirs.claim([run])[1] == run


def test_a_run_of_another_machine_that_says_so_is_left_to_it(tmp_path):
    mine = trials(tmp_path)
    run = Run("lora", 0.01, 0)
    mine.enqueue([run])
    trial, _ = mine.claim([run])
    trial.set_user_attr("alive", ["elsewhere", 1, time.time()])
    mine.enqueue([run])
    assert mine.claim([run]) is None
    assert mine.are_running()


def test_a_run_that_diverged_is_done_and_the_worst(tmp_path):
    mine, run = trials(tmp_path), Run("lora", 0.01, 0)
    mine.enqueue([run])
    trial, _ = mine.claim([run])
    mine.finish(trial, result(validation=None))
    assert mine.study.trials[0].value == float("inf")
    mine.enqueue([run])
    assert mine.claim([run]) is None
    assert mine.results()[0].test is None


def test_a_run_that_is_being_claimed_is_seen_whole(tmp_path):
    mine, theirs, run = trials(tmp_path), trials(tmp_path), Run("lora", 0.01, 3)
    mine.enqueue([run])
    trial = mine.study.ask()
    trial.suggest_float("learning_rate", 1e-12, 1e6, log=True)  # its process stops here
    theirs.enqueue([run])
    assert theirs.are_running()
    trial.set_user_attr("alive", ["elsewhere", 1, 0.0])
    theirs.enqueue([run])
    assert theirs.claim([run])[1] == run


def test_the_result_of_a_run_that_was_given_up_counts(tmp_path):
    mine, theirs, run = trials(tmp_path), trials(tmp_path), Run("lora", 0.01, 0)
    mine.enqueue([run])
    trial, _ = mine.claim([run])
    trial.set_user_attr("alive", ["elsewhere", 1, 0.0])  # a machine that was suspended
    theirs.enqueue([run])
    mine.keep_alive(trial)
    mine.finish(trial, result(validation=0.5))
    mine.fail(trial)
    assert [found.validation for found in theirs.results()] == [0.5]
    again = trials(tmp_path)
    again.enqueue([run])
    assert [found.validation for found in again.results()] == [0.5]


def test_optunas_own_tools_see_the_study(tmp_path, runs):
    assert compare(tmp_path / "digits", methods="[lora]") == 0
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "digits" / "study.journal"))
    )
    found = optuna.load_study(study_name="digits", storage=storage)
    assert [trial.params for trial in found.trials] == [{"learning_rate": 0.02, "seed": seed} for seed in (0, 1)]
    assert {trial.state for trial in found.trials} == {TrialState.COMPLETE}


# ---------------------------------------------------------------------- runs that are run

SHORT = ["--trainer.max_epochs", "2", "--chain.every_n_epochs", "1"]


class ForkedRun:
    """In the place of a run's new process, which the test of a stopped study has: one that is forked."""

    def __init__(self, command, stdout, stderr, pass_fds):
        self.command, self.status = forked.Command(*command[1:], log=Path(stdout.name), pass_fds=pass_fds), None

    def wait(self):
        self.status = self.command.finish().returncode
        return self.status

    def poll(self):
        return self.status


@pytest.fixture
def forked_runs(monkeypatch):
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=ForkedRun, STDOUT=subprocess.STDOUT))


@pytest.mark.usefixtures("forked_runs")
def test_a_run_is_the_fit_of_the_same_values(tmp_path, monkeypatch, capsys):
    assert compare(tmp_path / "study", "--metric", "val_accuracy", methods="[cola, full]", seeds=1, fit=SHORT) == 0
    line, of_full = lines(tmp_path / "study")
    assert line["base"] == of_full["base"] is not None
    fit = ["--config", DIGITS, *SHORT, "--trainer.default_root_dir", str(tmp_path / "fit"), "--seed_everything", "0"]
    monkeypatch.setattr(sys, "argv", ["cola"])
    assert main(["fit", *fit]) == 0
    assert main(["test", *fit, "--ckpt_path", str(tmp_path / "fit/runs/version_0/checkpoints/last.ckpt")]) == 0
    logged = [list(csv.DictReader((tmp_path / f"fit/runs/version_{k}/metrics.csv").read_text().splitlines())) for k in (0, 1)]
    val = [float(row["val_accuracy"]) for row in logged[0] if row.get("val_accuracy")]
    assert [value for _, value in line["curve"]] == pytest.approx(val, abs=0)
    assert line["validation"] == val[-1]
    assert line["test"] == float(logged[1][-1]["test_accuracy"])
    assert (line["links"], line["rank"], line["knots"], line["steps"]) == (2, 1, [9], 18)
    assert line["trainable_parameters"] == 330
    assert line["seconds"] > 0
    assert line["peak_memory"] > 100
    folder = tmp_path / "study" / "runs" / "cola-lr0.02-seed0"
    assert (folder / "runs" / "version_0" / "config.yaml").exists()
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of one program alone is Linux's")
def test_a_runs_peak_memory_is_not_that_of_the_process_which_began_it(monkeypatch):
    of_both = SimpleNamespace(ru_maxrss=10**9)  # Linux retains the peak of what a process was before it became a new program
    monkeypatch.setattr("resource.getrusage", lambda _: of_both)
    assert 10 < _peak_memory() < 10**5


@pytest.mark.usefixtures("forked_runs")
def test_what_a_run_refuses_and_what_diverges(tmp_path, capsys):
    assert compare(tmp_path / "refused", methods="[lora]", fit=[*SHORT, "--model.target_modules", "[nosuch]"]) == 2
    assert "error: model.target_modules: expected the name of a module" in capsys.readouterr().err
    assert compare(tmp_path / "metric", "--metric", "val_acuracy", "--mode", "max", methods="[lora]", seeds=1, fit=SHORT) == 2
    said = capsys.readouterr()
    assert said.out.count("metric: a validation logged no val_acuracy; is val_accuracy meant?") == 1
    assert "error: metric: expected one of val_accuracy, val_loss, received val_acuracy" in said.err
    rates = ["--learning_rates", "[1e6]"]
    diverging = [*SHORT, "--trainer.check_val_every_n_epoch", "9", "--model.optimizer.weight_decay", "3"]
    assert compare(tmp_path / "diverged", *rates, methods="[full]", seeds=1, fit=diverging) == 0
    (line,) = lines(tmp_path / "diverged")
    assert (line["validation"], line["test"], line["links"]) == (None, None, 0)
    assert "diverged" in (tmp_path / "diverged" / "table.md").read_text()


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (["--trainer.limit_val_batches", "0"], "data: expected rows and a validation_step for validation, as methods are"),
        (["--trainer.limit_test_batches", "0"], "data: expected rows and a test_step for test, as methods are compared"),
        (["--trainer.max_steps", "1000"], "trainer.max_steps: expected at most 18, where trainer.max_epochs: 2 ends a run"),
    ],
)
@pytest.mark.usefixtures("forked_runs")
def test_what_could_not_be_measured_or_divided_is_refused_before_a_run_is_done(tmp_path, capsys, fit, message):
    assert compare(tmp_path, methods="[lora]", seeds=1, fit=[*SHORT, *fit]) == 2
    assert not list(tmp_path.rglob("*.ckpt"))
    assert f"error: {message}" in capsys.readouterr().err


def test_a_study_that_is_stopped_ends_its_run_and_goes_on(tmp_path):
    words = [
        "--config",
        DIGITS,
        "--output",
        str(tmp_path),
        "--methods",
        "[lora]",
        "--seeds",
        "1",
        "--",
        "--trainer.max_epochs",
        "3",
    ]
    command = ["-m", "cola_lightning", "compare", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    stopped = forked.Command(*command, env=environment, cwd=tmp_path)
    log = tmp_path / "runs" / "lora-lr0.02-seed0" / "log.txt"
    for _ in range(600):
        if log.exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(stopped.pid, signal.SIGTERM)
    done = stopped.finish(timeout=60)
    assert done.returncode == 143, done.stderr
    processes = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(p)]
    assert processes == []
    forked.run(*command, env=environment, cwd=tmp_path, timeout=120, check=True)
    assert len(lines(tmp_path)) == 1


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


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
