"""``cola stages``: runs in a sequence, skipped, resumed and trained again as they must be."""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from lightning.pytorch import Callback
from scipy import stats

from cola_lightning import COLACausalLM, EpochDataModule, PromptDataModule, TextDataModule, UserError
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli import main
from cola_lightning.runs import folder
from cola_lightning.stages.matrix import Column, Difference, Matrix
from cola_lightning.stages.replay import Replay
from cola_lightning.stages.stages import Stages
from tests.helpers import forked, tiny
from tests.helpers.toy import assert_same_chain, read_csv

PAIRS = [
    {"prompt": f"Film {k}? ", "chosen": f"It was {('great', 'terrible')[k % 2]}.", "rejected": "It was."} for k in range(40)
]
STAGES = {
    "good": {"chain": {"knots": 1}},
    "pairs": {
        "model": {"class_path": "COLAPreferenceLM", "init_args": {"rank": 3, "alpha": 5}},  # above that of the last stage
        "data": {"class_path": "PreferenceDataModule", "init_args": {"source": "pairs", "val_size": 8, "test_size": 8}},
    },
    "flipped": {"data": {"init_args": {"source": "flipped"}}, "trainer": {"max_steps": 3}},
}


class KillOnce(Callback):
    """Kills the command in the fit of a stage, inside or at its end; once, for which it has a file."""

    def __init__(self, marker: str, name: str, when: str = "inside"):
        self.marker, self.name, self.when = Path(marker), name, when

    def _kill(self, module, when):
        if self.when == when and module.run.current.name == self.name and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 2:
            self._kill(module, "inside")

    def on_train_end(self, trainer, module):
        self._kill(module, "at the end")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the rows of three tasks, a model and a config of three stages, all of which the command has trained."""
    folder = tiny.make_language_folder(tmp_path_factory.mktemp("stages"))
    flipped = [row | {"label": 1 - row["label"]} for row in tiny.read_rows(folder / "rows" / "train.jsonl")]
    tiny.write_rows(folder / "flipped", flipped)
    tiny.write_rows(folder / "pairs", PAIRS)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"] |= {"max_epochs": 1}
    config["model"]["init_args"]["alpha"] = 4
    del config["chain"]
    with contextlib.chdir(folder):
        write(config | {"stages": STAGES})
        with open("printed.txt", "w") as printed, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            assert stages("--max_forgetting", "1e-9") == 3
    return folder


@pytest.fixture
def config(trained, tmp_path, monkeypatch):
    """The config, in a folder of its own with what it names and what was trained."""
    shutil.copytree(trained, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    return yaml.safe_load(Path("stages.yaml").read_text())


def stages(*words, output="out"):
    return main(["stages", "--config", "stages.yaml", "--output", output, *words])


def write(config):
    Path("stages.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def chain(name, output="out"):
    return read_chain(f"{output}/{name}")


def written(output="out"):
    """When each checkpoint and each measurement was written."""
    files = [*Path(output).rglob("last.ckpt"), *Path(output, "measured").iterdir()]
    return {path.relative_to(output): path.stat().st_mtime_ns for path in files}


def trained_in(printed):
    """The stages that a call has trained, by what it printed."""
    return re.findall(r"^stage (\w+) \(\d of \d\): training$", printed, re.MULTILINE)


def test_each_stage_begins_from_the_one_before_and_is_trained_once(config, capfd, monkeypatch):
    assert trained_in(Path("printed.txt").read_text()) == list(STAGES)
    assert [link.name for link in chain("flipped").links] == ["good", "good", "pairs", "flipped"]
    for name, n in {"good": 2, "pairs": 3}.items():
        assert_same_chain(chain("flipped").truncate(n), chain(name))
    assert [link.end_step for link in chain("flipped").links] == [4, 6, 6, 3]
    for name in STAGES:
        files = {path.name for path in Path("out", name).iterdir()}
        assert {"config.yaml", "metrics.csv", "checkpoints"} <= files
    assert main(["test", "--config", "out/pairs/config.yaml", "--ckpt_path", "out/flipped", "--links", "pairs"]) == 0
    assert Path("out/pairs/metrics.csv").exists()

    capfd.readouterr()
    Path("out").rename("moved")
    before = written("moved")
    assert stages("--max_forgetting", "9", output=str(Path("moved").absolute())) == 0
    out = capfd.readouterr().out
    assert out.count(": finished") == 3
    assert trained_in(out) == []
    assert "test " not in out  # nothing is measured again
    assert written("moved") == before
    Path("moved").rename("out")
    assert stages("--", "--data.num_workers", "1") == 0
    assert written() == before

    config["stages"]["pairs"]["trainer"] = {"max_steps": 4}
    write(config)
    monkeypatch.setattr(Stages, "_show", lambda *_, **__: 0)
    assert stages() == 0
    out = capfd.readouterr().out
    assert out.count("trainer.max_steps has changed (now 4, before -1), so it is trained again") == 1
    assert out.count("the stage before it has changed, so it is trained again") == 1
    assert trained_in(out) == ["pairs", "flipped"]
    assert [link.end_step for link in chain("flipped").links] == [4, 6, 4, 3]
    assert [link.end_step for link in chain("flipped.1").links] == [4, 6, 6, 3]  # kept


@pytest.mark.usefixtures("config")
def test_the_matrix_is_what_tests_of_the_last_checkpoint_give():
    printed, rows = Path("printed.txt").read_text(), read_csv("out/matrix.csv")
    assert [(row["links"], row["stage"]) for row in rows] == [("0", "base"), ("2", "good"), ("3", "pairs"), ("4", "flipped")]
    assert list(rows[0])[2:] == ["good loss", "good accuracy", "pairs loss", "flipped loss", "flipped accuracy"]
    for row in (rows[0], rows[2]):
        words = ["--config", "out/good/config.yaml", "--ckpt_path", "out/flipped", "--links", row["links"]]
        assert main(["test", *words]) == 0
        alone = read_csv(max(Path("out/flipped/test").rglob("metrics.csv")))[-1]  # of the last version
        assert [row[f"good {name}"] for name in ("loss", "accuracy")] == [
            alone[f"test_{name}"] for name in ("loss", "accuracy")
        ]
    for row in rows[:2]:  # the reference of the preferences is where their stage began
        assert float(row["pairs loss"]) == pytest.approx(0.693147, abs=1e-6)
    assert rows[2]["pairs loss"] != rows[0]["pairs loss"]
    tested = json.loads(Path("out/measured/matrix.json").read_text())["rows"]
    for name, states in tested.items():
        for state, row in zip(states, rows, strict=True):
            for metric, (values, weights) in state["row_values"].items():
                assert sum(values) / sum(weights) == pytest.approx(
                    float(row[f"{name} {metric.removeprefix('test_')}"]), abs=1e-6
                )
                assert len(values) == len(weights) == {"good": 10, "flipped": 10, "pairs": 8}[name]
    summaries = {(row["task"], row["metric"], row["summary"]): row for row in read_csv("out/summary.csv")}
    assert len(summaries) == 5 * 3 - 4  # no backward transfer of the last task, no forward transfer of the first, two metrics
    for row in summaries.values():  # a difference of the same predictions has no interval
        assert (row["low"] == "") == (float(row["value"]) == 0)
        assert not row["low"] or float(row["low"]) < float(row["value"]) < float(row["high"])
    forgotten = summaries["good", "loss", "forgetting"]
    assert float(forgotten["low"]) < float(forgotten["value"])
    margin = float(forgotten["high"]) - float(forgotten["value"])
    assert f"± {margin:.2g}" in printed
    assert "max_forgetting: " in printed


def test_forgetting_and_transfers_are_means_over_tasks_of_one_kind():
    columns = [
        Column("a", "loss", [3.0, 1.0, 2.0, 1.5], 1, "text"),
        Column("b", "loss", [4.0, 3.0, 1.0, 2.0], 2, "text"),
        Column("b", "accuracy", [0.25, 0.5, 1.0, 0.75], 2, "text"),
        Column("c", "loss", [0.7, 0.7, 0.7, 0.5], 3, "pairs"),
    ]
    summaries = [[one and one.value for one in column.summaries] for column in columns]
    assert summaries == [[0.5, 0.5, None], [1.0, 1.0, -1.0], [0.25, -0.25, 0.25], [0.0, None, 0.0]]
    (line,) = Matrix(["base", "a", "b", "c"], [0, 1, 2, 3], columns).averages
    assert line == "average loss of a, b: 1.75 at the end; forgetting 0.75, backward transfer +0.75, forward transfer -1"


def measured_column(task, states, n_rows, own, weights=1.0):
    """A task whose loss was measured on rows, in each state of the model."""
    random, weights = np.random.default_rng(n_rows), np.broadcast_to(weights, n_rows)
    difficulty = random.normal(size=n_rows)  # of a row, in every state
    rows = [np.array([(state + difficulty + 0.3 * random.normal(size=n_rows)) * weights, weights]) for state in states]
    return Column(task, "loss", [values.sum() / weights.sum() for values, _ in rows], own, rows=rows)


def test_an_interval_is_that_of_a_paired_t_test_and_of_a_ratio_of_sums():
    column = measured_column("a", [3.0, 1.0, 1.2, 1.4], 30, own=2)
    for one, before, after in zip(column.summaries, (1, 2, 0), (3, 3, 1), strict=True):
        expected = stats.ttest_rel(column.rows[after][0], column.rows[before][0]).confidence_interval(0.95)
        assert (one.value - one.margin, one.value + one.margin) == pytest.approx(tuple(expected))
    opposite = Column("a", "accuracy", [-one for one in column.values], 2, rows=[[-values, n] for values, n in column.rows])
    assert opposite.forgetting.text() == column.forgetting.text()

    random = np.random.default_rng(1)
    column = measured_column("a", [3.0, 2.0, 2.2], 40, own=1, weights=random.integers(1, 200, size=40))  # tokens
    drawn = np.array(column.rows)[:, :, random.integers(0, 40, size=(4000, 40))].sum(-1)  # a bootstrap of the ratio
    ratios = drawn[2, 0] / drawn[2, 1] - drawn[1, 0] / drawn[1, 1]
    found = column.backward_transfer
    assert found.margin == pytest.approx(stats.t.ppf(0.975, 39) * ratios.std(), rel=0.08)
    assert found.value == pytest.approx(column.values[2] - column.values[1])


def test_the_interval_of_an_average_is_welchs():
    columns = [measured_column(task, [3.0, 1.0, 1.2, 1.3], n_rows, own=1) for task, n_rows in {"a": 20, "b": 50}.items()]
    mean = Difference.mean([column.backward_transfer for column in columns])
    gaps = [column.rows[3][0] - column.rows[1][0] for column in columns]
    expected = stats.ttest_ind(gaps[0], -gaps[1], equal_var=False).confidence_interval(0.95)  # of their sum
    assert mean.margin == pytest.approx((expected.high - expected.low) / 4)
    (line,) = Matrix(["base", "a", "x", "b"], [0, 1, 2, 3], columns).averages
    assert f"backward transfer {mean.text('+')}, forward transfer -" in line
    assert Difference.mean([Difference(1.0), columns[0].forgetting]).margin is None  # one is of an F1, say


def test_a_change_of_what_a_result_depends_on_trains_again_and_keeps_the_earlier_run(config, capfd, monkeypatch):
    monkeypatch.setattr(Stages, "_show", lambda *_, **__: 0)
    del config["stages"]["pairs"]
    config["stages"]["flipped"]["data"] = {
        "class_path": "TextDataModule",
        "init_args": {
            "source": "texts/*.jsonl",
            "train_size": None,
            "test_size": 2,
            "val_size": 2,
            "chat_template": "chat.jinja",
        },
    }
    Path("texts").mkdir()
    for name in ("a", "b"):
        row = [
            {"messages": [{"role": "user", "content": f"{name} {k}"}, {"role": "assistant", "content": "It was."}]}
            for k in range(9)
        ]
        Path("texts", f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in row))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    Path("chat.jinja").write_text(template)
    write(config)

    def train(*words, output="out"):
        capfd.readouterr()
        assert stages(*words, output=output) == 0
        out = capfd.readouterr().out
        return trained_in(out), out

    assert train("--knot", "record")[0] == ["flipped"]
    assert [link.share for link in chain("flipped").links] == [1, 0, 1]
    last = Path("out/flipped/checkpoints/last.ckpt").read_bytes()
    shutil.copy("out/good/checkpoints/last.ckpt", "good.ckpt")

    # What matters to no result: the numbers of workers and devices, bars, how a path is written.
    same = ["--data.num_workers", "1", "--trainer.enable_progress_bar", "true", "--trainer.devices", "2"]
    same += ["--trainer.strategy", "auto"]
    monkeypatch.setattr("cola_lightning.stages.stages.join", lambda trainer: None)
    config["stages"]["flipped"]["data"]["init_args"]["source"] = f"{Path.cwd()}/texts/*.jsonl"
    write(config)
    assert train("--knot", "record", "--", *same, output=f"{Path.cwd()}/out")[0] == []
    # An option that the version that trained the stage did not have, or that this one has no more.
    record = json.loads(Path("out/good/run.json").read_text())
    del record["facts"]["model"]["init_args"]["dropout"], record["facts"]["trainer"]["detect_anomaly"]
    record["facts"]["chain"]["gone"] = False
    Path("out/good/run.json").write_text(json.dumps(record))
    assert train("--knot", "record")[0] == []

    def chat(text):
        Path("chat.jinja").write_text(text)

    changed = {  # what is done, and what the line says
        "data.source": lambda: shutil.copy("texts/a.jsonl", "texts/c.jsonl"),
        "data.chat_template": lambda: chat(template.replace("role }}", "role }}:")),
        "data.columns": lambda: config["stages"]["flipped"]["data"]["init_args"].update(columns={"messages": "messages"}),
        "knot": lambda: None,
        "is not the one that was written": lambda: Path("out/flipped/checkpoints/last.ckpt").write_bytes(last),
    }
    for number, (what, change) in enumerate(changed.items(), start=2):
        change()
        write(config)
        knot = "record" if number < 5 else "cola"
        names, out = train("--knot", knot)
        assert (names, what in out) == (["flipped"], True), out
        assert Path(f"out/flipped.{number}/checkpoints/last.ckpt").exists()
    assert train("--knot", knot)[0] == []
    assert Path("out/flipped.2/checkpoints/last.ckpt").read_bytes() == last
    assert Path("out/good/checkpoints/last.ckpt").read_bytes() == Path("good.ckpt").read_bytes()

    Path("out/flipped").rename("out/other")
    Path("out/other/run.json").unlink()  # as in a fit's folder
    config["stages"]["other"] = config["stages"].pop("flipped")
    write(config)
    names, out = train()
    assert (names, "its folder has another run" in out) == (["other"], True)
    assert chain("other.1")


def test_other_weights_of_the_model_are_another_model(config, capfd, monkeypatch):
    monkeypatch.setattr(Stages, "_show", lambda *_, **__: 0)
    shutil.copytree("model", "copy")
    config["model"]["init_args"]["model_name"] = "copy"
    write(config)
    assert stages() == 0
    assert trained_in(capfd.readouterr().out) == []  # the same contents
    tiny.folder("other", "opt", scale=2)
    shutil.copy("other/model.safetensors", "copy/model.safetensors")
    assert stages() == 0
    out = capfd.readouterr().out
    assert "what model.model_name contains has changed" in out
    assert trained_in(out) == list(STAGES)


def test_two_calls_at_once_are_one(config, capfd):
    claim = folder.claim(Path("out/.claim"))
    assert stages() == 2
    assert "another process is at work" in capfd.readouterr().err
    claim.close()
    assert stages() == 0


@pytest.mark.usefixtures("config")
def test_a_stage_that_cannot_be_measured_ends_with_a_status_and_a_warning_is_seen(capfd, monkeypatch):
    own = PromptDataModule.setup

    def setup(self, stage):
        warnings.warn("this is seen", UserWarning, stacklevel=1)
        own(self, stage)
        if stage == "test" and self.source == "flipped":
            raise UserError("data: these rows are gone")

    monkeypatch.setattr(PromptDataModule, "setup", setup)
    shutil.rmtree("out/measured")
    for _ in range(2):
        with pytest.warns(UserWarning, match="this is seen"):
            assert stages() == 1
        assert "stage flipped: cannot be measured (data: these rows are gone)" in capfd.readouterr().out
        assert list(read_csv("out/matrix.csv")[0])[2:] == ["good loss", "good accuracy", "pairs loss"]


@pytest.mark.usefixtures("config")
def test_stages_on_other_numbers_of_processes_are_refused(capfd):
    text = Path("stages.yaml").read_text()
    Path("stages.yaml").write_text(text.replace("max_steps: 3", "max_steps: 3\n      devices: 2"))
    assert stages(output="new") == 2
    assert "error: stages.flipped: trainer.devices" in capfd.readouterr().err


def test_a_disk_without_locks_is_refused(config, capfd, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    # In this package alone: datasets has locks of its own.
    monkeypatch.setattr(folder, "fcntl", SimpleNamespace(**vars(folder.fcntl) | {"flock": flock}))
    assert stages() == 2
    assert "error: output: cannot use 'out': its disk has no locks (No locks available)" in capfd.readouterr().err
    assert main(["fit", "--config", "out/good/config.yaml", "--trainer.default_root_dir", "alone"]) == 0  # without a claim


def test_a_record_that_is_cut_off_names_its_file(config, capfd):
    path = Path("out/good/run.json")
    path.write_text(path.read_text()[:50])
    assert stages() == 2
    assert "out/good/run.json' is damaged" in capfd.readouterr().err


def test_a_later_stage_trains_a_share_of_earlier_rows_again(config, capfd, monkeypatch):
    monkeypatch.setattr(Stages, "_show", lambda *_, **__: 0)
    config["stages"]["again"] = {}
    write(config)
    assert stages("--replay", "0.25") == 0
    out = capfd.readouterr().out
    assert "stage pairs: replays no rows of good (" in out
    assert trained_in(out) == ["flipped", "again"]
    logs = dict(zip(("flipped", "again"), re.split(": training\n", out)[1:], strict=True)) | {"good": "", "pairs": ""}
    found = {name: re.findall(r"replay: (\d+) of (\d+) training rows of (\w+)", log) for name, log in logs.items()}
    of_good, of_flipped = (("6", "24", name) for name in ("good", "flipped"))
    assert found == {"good": [], "pairs": [], "flipped": [of_good], "again": [of_good, of_flipped]}
    assert [link.end_step for link in chain("again").links if link.name in ("good", "again")] == [4, 24 // 4, 36 // 4]
    callback = yaml.safe_load(Path("out/again/config.yaml").read_text())["trainer"]["callbacks"][-1]
    assert callback["init_args"]["data"]["flipped"]["init_args"]["source"] == "flipped"


@pytest.mark.parametrize("packing", [False, True])
def test_replayed_rows_are_training_rows_of_any_data(tmp_path, packing):
    for name in ("old", "new"):
        tiny.write_rows(tmp_path / name, [{"text": f"{name} {k} " * (1 + k % 3)} for k in range(40)])
    module = COLACausalLM(tiny.folder(tmp_path / "model", "llama"), target_modules=["q_proj"], rank=2)
    run = SimpleNamespace(lightning_module=module, world_size=1, global_rank=0, training=False)
    old, new, alone = (
        TextDataModule(str(tmp_path / name), test_size=10, val_size=2, packing=packing, max_length=16)
        for name in ("old", "new", "old")
    )
    run.datamodule = new
    for data in (new, alone):
        data.trainer = run
        data.setup("fit")
    own = len(new.train)
    Replay(0.5, {"old": old}).setup(run, module, "fit")
    assert len(new.train) == own + round(len(alone.train) / 2)
    known = {str(row) for row in alone.train}
    assert all(str(new.train[k]) in known for k in range(own, len(new.train)))
    n_rows = sum(len(batch["labels"]) for batch in new.train_dataloader())
    assert n_rows == len(new.train)
    with pytest.raises(UserError, match=r"^replay: old and this stage must have one class of data"):
        Replay(0.5, {"old": Squares(2)}).setup(run, module, "fit")
    (squares := Squares(2)).setup("fit")
    Replay(0.25, {"old": Squares(2)}).setup(SimpleNamespace(datamodule=squares), None, "fit")
    assert squares.train[:8] == [(x, x**2) for x in range(8)]
    assert len(squares.train) == 10


class Squares(EpochDataModule):
    """Rows that are a list."""

    def setup(self, stage):
        self.train = [(x, x**2) for x in range(8)]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """Gives what two stages leave that nobody kills, by options of the command; it is made when it is first asked for."""

    @functools.cache
    def whole_run(*words):
        folder = tmp_path_factory.mktemp("whole") / "out"
        assert two_stages(trained, folder, words).finish().returncode == 0
        return Path(folder, "matrix.csv").read_text(), read_chain(folder / "flipped")

    return whole_run


def two_stages(trained, output, words, name="flipped", callbacks=()):
    """The command, in a process of its own, with two stages; the first is trained already unless it gets the callbacks."""
    config = yaml.safe_load((trained / "stages.yaml").read_text())
    del config["stages"]["pairs"]
    config["stages"][name].setdefault("trainer", {})["callbacks"] = list(callbacks)
    (trained / "two.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if name == "flipped" and not output.exists():
        shutil.copytree(trained / "out" / "good", output / "good")
    return forked.Command(
        "-m", "cola_lightning", "stages", "--config", "two.yaml", "--output", str(output), *words, cwd=trained
    )


@pytest.mark.parametrize(
    ("name", "when", "words"),
    [
        ("flipped", "inside", ["--replay", "0.3"]),
        pytest.param("good", "at the end", [], marks=pytest.mark.slow),  # between two stages
        pytest.param("good", "inside", [], marks=pytest.mark.slow),
        pytest.param("flipped", "inside", ["--knot", "half"], marks=pytest.mark.slow),
        pytest.param("flipped", "at the end", ["--knot", "record"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stages_that_were_killed_leave_what_others_do(trained, whole, tmp_path, name, when, words):
    given = {"marker": str(tmp_path / "killed"), "name": name, "when": when}
    stop = {"class_path": "tests.stages.test_stages_command.KillOnce", "init_args": given}
    killed = two_stages(trained, tmp_path / "out", words, name, [stop]).finish()
    assert killed.returncode == -9, killed.stderr
    (tmp_path / "out").rename(tmp_path / "moved")  # where it goes on all the same
    again = two_stages(trained, tmp_path / "moved", words, name, [stop]).finish()
    assert again.returncode == 0, again.stderr
    assert f"stage {name} (" in again.stdout.partition(": goes on from")[0]
    matrix, chain = whole(*words)
    assert (tmp_path / "moved" / "matrix.csv").read_text() == matrix
    assert_same_chain(read_chain(tmp_path / "moved" / "flipped"), chain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "nodes"),
    [
        (forked.as_torchrun, []),
        (forked.as_srun, []),
        (functools.partial(forked.as_srun, n_nodes=2), ["--trainer.num_nodes", "2", "--trainer.devices", "1"]),
    ],
    ids=["torchrun", "srun", "srun on two nodes"],
)
def test_two_processes_leave_the_matrix_of_one(config, launch, nodes):
    """With batches of half the size, started by torchrun or as srun does, killed and started again, and by Lightning."""
    config["stages"] = {name: config["stages"][name] for name in ("good", "pairs")}
    config["stages"]["again"] = {}
    write(config)
    assert stages("--replay", "0.25", output="one") == 0
    stop = {"class_path": "tests.stages.test_stages_command.KillOnce", "init_args": {"marker": "killed", "name": "again"}}
    config["stages"]["again"] = {"trainer": {"callbacks": [stop]}}
    write(config)

    def two(output):
        words = ["stages", "--config", "stages.yaml", "--output", output, "--replay", "0.25", "--", "--trainer.strategy", "ddp"]
        return ["-m", "cola_lightning", *words, "--trainer.devices", "2", "--data.batch_size", "2"]

    for statuses in ({-9, 1}, {0}):
        commands = [forked.Command(*two("two"), *nodes, env=one) for one in launch(2)]
        done = [command.finish() for command in commands]
        assert {one.returncode for one in done} <= statuses | {-6}, done[0].stderr
    assert "stage good (1 of 3): finished" in done[0].stdout
    assert ": goes on from" in done[0].stdout
    assert "finished" not in done[1].stdout  # the first process speaks
    (config["stages"]["again"]["trainer"]["callbacks"],) = [[]]
    write(config)
    alone = forked.run(*two("launched"))
    assert alone.returncode == 0, alone.stderr
    for output in ("two", "launched"):
        for file in ("matrix.csv", "summary.csv"):
            for mine, theirs in zip(*(read_csv(Path(one, file)) for one in (output, "one")), strict=True):
                assert mine.keys() == theirs.keys()
                for name, value in theirs.items():
                    is_number = re.fullmatch(r"[-+.e\d]+", value)
                    assert float(mine[name]) == pytest.approx(float(value), abs=1e-5) if is_number else mine[name] == value


NO_NAMES = ("base", "'null'", "~", "..", "../x", "a/b", "-x", "x" * 101)
# What is changed in the config, the options, and how the message begins.
MISTAKES = [
    (("  flipped:", "  good:"), [], "stages: .* got 'good'"),
    (("  flipped:", "  2:"), [], "stages: .* got '2'"),
    (("  flipped:", "  all:"), [], "stages: .* got 'all'"),
    *((("  flipped:", f"  {name}:"), [], "stages: .* got ") for name in NO_NAMES),
    (("source: flipped", "sauce: flipped"), [], r"stages\.flipped: .*'sauce'.*data\.source"),
    (("COLAPreferenceLM", "COLAPreferenceLM\n      rank: 3"), [], r"stages\.pairs: model\.rank: "),
    (("stages:", "stags:"), [], "stages: "),
    (("seed_everything: 0", "seed_everything: 0\nckpt_path: runs"), [], r"stages\.good: ckpt_path "),
    (("seed_everything: 0", "seed_everything: 0\nchain: {name: x}"), [], r"stages\.good: chain\.name "),
    (("rank: 3", "rank: 3\n        init_chain: out/good"), [], r"stages\.pairs: model\.init_chain "),
    (("seed_everything: 0", "seed_everything: ["), [], "config: "),
    (("", ""), ["--replay", "2"], "replay: must be a share"),
    (("", ""), ["--max_forgetting", "-1"], "max_forgetting: must be at least 0"),
    (("", ""), ["--fit_scales", "true", "--knot", "half"], "fit_scales: needs --knot cola"),
    (("", ""), ["--knot", "half"], r"stages\.pairs: model\.init_knot: with half"),
    # What a fit refuses once its rows are read, or its model is made.
    (("source: flipped", "source: flippd"), [], r"stages\.flipped: data\.source"),
    (("rank: 3", "rank: 0"), [], r"stages\.pairs: .*rank"),
    (("rank: 3", "rank: 3\n        target_modules: [k_proj]"), [], r"stages\.pairs: model\.target_modules"),
    (("rank: 3", "rank: 3\n        model_name: other"), [], r"stages\.pairs: base: the chain was trained on another base"),
    (("source: pairs", "source: pairs\n        columns: {prompt: nosuch}"), [], r"stages\.pairs: "),
    (("val_size: 8", "val_size: 0"), ["--fit_scales", "true"], r"stages\.pairs: --fit_scales needs validation rows"),
    (("test_size: 8", "test_size: 0"), ["--max_forgetting", "1"], r"stages\.pairs: --max_forgetting needs test rows"),
]


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize(
    "mistakes", [pytest.param(MISTAKES[::5], id="some"), pytest.param(MISTAKES, id="all", marks=pytest.mark.slow)]
)
def test_a_mistake_is_one_line_before_anything_is_trained_or_moved(capfd, mistakes):
    text, before = Path("stages.yaml").read_text(), written()
    tiny.folder("other", "opt", scale=2)
    for (old, new), words, message in mistakes:
        assert old in text
        Path("stages.yaml").write_text(text.replace(old, new))
        for output in ("out", "new") if "source: flippd" in new else ("new",):
            assert stages(*words, output=output) == (1 if "flippd" in new else 2), message  # 1: perhaps it is on the hub
            (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
            assert re.match(f"error: {message}", line), line
    assert not list(Path("new").rglob("*.ckpt"))
    assert written() == before


def test_a_stage_that_fails_leaves_the_matrix_of_the_stages_before_it(config, capfd):
    config["stages"]["flipped"]["trainer"]["callbacks"] = [{"class_path": "tests.stages.test_stages_command.Fail"}]
    write(config)
    with pytest.raises(ZeroDivisionError):
        stages()
    assert [row["stage"] for row in read_csv("out/matrix.csv")] == ["base", "good", "pairs"]
    assert chain("flipped.1")


class Fail(Callback):
    """Code of the user's that fails."""

    def on_train_batch_end(self, *args):
        raise ZeroDivisionError


def test_fitted_scales_are_the_best_by_validation_and_are_not_measured_again(config, capfd):
    del config["stages"]["flipped"]
    write(config)
    shutil.rmtree("out/flipped")
    assert stages("--fit_scales", "true") == 0
    printed = capfd.readouterr()
    assert trained_in(printed.out) == []
    assert printed.err.count("Loading weights: 100%") == 2  # one model for each class
    scale = yaml.safe_load(Path("out/scales.yaml").read_text())
    factors, first = [1.0, 0.5, 0.75, 1.25], {name: losses(name, "scales of good") for name in ("good", "pairs")}
    tried = {name: [first[name][factors.index(scale["good"])], *losses(name, "scales of pairs")] for name in first}
    for stage, of_stage in (("good", first), ("pairs", tried)):
        sums = [sum(of_stage[name][number] / first[name][0] for name in first) for number in range(4)]
        assert scale[stage] == factors[int(np.argmin(sums))]
    words = ["--ckpt_path", "out/pairs", "--scale", json.dumps(scale)]
    assert main(["validate", "--config", "out/good/config.yaml", *words]) == 0
    (path,) = Path("out/pairs/validate").rglob("metrics.csv")
    assert float(read_csv(path)[-1]["val_loss"]) == tried["good"][int(np.argmin(sums))]
    assert scale != {"good": 1.0, "pairs": 1.0}  # so that a table is shown
    assert "the same, scaled" in printed.out
    assert "cola export out/pairs --scale" in printed.out
    before = written()
    assert stages("--fit_scales", "true") == 0
    assert written() == before


def losses(name, what):
    """The validation losses of a task, for each of the factors that were tried."""
    return [row["val_loss"] for row in json.loads(Path("out", "measured", f"{what}.json").read_text())["rows"][name]]
