"""Language models from the command line: a run and what follows it."""

import contextlib
import shlex
import shutil
from pathlib import Path

import datasets
import pytest

from cola_lightning.cli import main
from tests.helpers import forked, tiny
from tests.helpers.forked import as_torchrun
from tests.helpers.tiny import LANGUAGE_CONFIG as CONFIG
from tests.helpers.tiny import make_language_folder
from tests.helpers.toy import read_csv

OF_OWN_DATA = f"""{CONFIG.partition("data:")[0]}
trainer: {{max_epochs: 2, accelerator: cpu, enable_progress_bar: false}}
data:
  class_path: TemplateDataModule
  init_args: {{prompt: "{{text}} It was", options: [" bad", " good"]}}
chain: {{every_n_epochs: 1}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of the config, and what that printed."""
    folder = make_language_folder(tmp_path_factory.mktemp("trained"))
    with contextlib.chdir(folder), open("printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        assert main(["fit", "--config", "config.yaml"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _folder(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")


def predicted():
    """The rows of the only file of predictions, which then goes."""
    (path,) = Path("runs").rglob("predictions.jsonl")
    rows = tiny.read_rows(path)
    path.unlink()
    return rows


# Lightning's advice about folders that are used again.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_fit_tells_where_it_began_and_each_link_and_predict_writes_scores():
    lines = Path("printed.txt").read_text().splitlines()
    (before,) = [line for line in lines if line.startswith("before training: ")]
    assert "val_accuracy 0.5" in before
    links = [line for line in lines if line.startswith("link ")]
    assert [line.partition(":")[0] for line in links] == ["link 0 finished", "link 1 live at the end"]
    assert all("val_accuracy" in line and "val_loss" in line for line in links)
    (command,) = [line for line in lines if line.startswith("use it: cola test ")]
    arguments = command.removeprefix("use it: cola test ").partition(" (")[0].split()
    for subcommand in ("validate", "test", "predict"):
        assert main([subcommand, *arguments]) == 0
    rows = predicted()
    assert [row["index"] for row in rows] == list(range(10))
    assert set(rows[0]) == {"index", "prediction", "target", "option", "prompt", "options", "scores", "sentence", "label"}
    for row in rows:
        assert row["target"] == ("great" if "great" in row["prompt"] else "terrible")
        assert row["label"] == int("great" in row["sentence"])
        assert row["prompt"].startswith(row["sentence"].strip())
        assert row["prediction"] == row["options"][row["option"]].strip()
        assert row["options"] == [" terrible", " great"]
        assert row["scores"][row["option"]] == max(row["scores"])
        assert all(score < 0 for score in row["scores"])


@pytest.mark.parametrize(
    ("source", "splits", "command", "refused", "field"),
    [
        (["own/train.jsonl"], ["train"], "predict", "test", "data.test_size"),
        (["own", "--data.val_size", "0"], ["train", "test"], "test", "validate", "data.val_size"),
    ],
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_the_command_at_the_end_of_a_fit_works_whichever_rows_there_are(source, splits, command, refused, field, capfd):
    tiny.write_rows(Path("own"), [{"text": f"Film {k}?", "label": k % 2} for k in range(12)], splits)
    Path("own.yaml").write_text(OF_OWN_DATA)
    assert main(["fit", "--config", "own.yaml", "--data.source", *source]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert ["val_loss" in line for line in lines if line.startswith("link ")] == [refused != "validate"] * 2
    (use,) = [shlex.split(line)[3:] for line in lines if line.startswith("use it: cola ")]
    assert use[0] == command
    assert main(use) == 0
    capfd.readouterr()
    assert main([refused, *use[1:]]) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert field in error


def test_two_processes_are_one():
    """With batches of half the size; what they predict comes back once a row, in order."""
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    predict = ["predict", "--config", "runs/version_1/config.yaml", "--ckpt_path", "runs/version_1"]
    for words in (["fit", "--config", "config.yaml", *two, "--data.batch_size", "2"], predict):
        started = [forked.Command("-m", "cola_lightning", *words, env=own) for own in as_torchrun(2)]
        for process in started:
            done = process.finish(timeout=240)
            assert done.returncode == 0, done.stderr
    rows = predicted()
    assert main([*predict, "--trainer.strategy", "auto", "--trainer.devices", "1"]) == 0
    assert [row["index"] for row in rows] == list(range(10))
    for row, alone in zip(rows, predicted(), strict=True):
        assert row.pop("scores") == pytest.approx(alone.pop("scores"), abs=1e-5)
        assert row == alone
    losses = []
    for path in sorted(Path("runs").rglob("metrics.csv")):
        losses.append([float(row["val_loss"]) for row in read_csv(path) if row["val_loss"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_hub_that_is_needed_and_not_reached_is_no_mistake(monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # as the variable of this name does
    assert main(["fit", "--config", "config.yaml", "--data.source", "no-such-owner/no-such-name"]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: data.source: ")


@tiny.needs_smollm2
@pytest.mark.slow
def test_the_quickstart_gets_from_chance_to_90_percent(capfd):
    config = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    assert main(["fit", "--config", config, "--data.source", str(tiny.REVIEWS)]) == 0
    messages = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("before", "link"))]
    accuracies = [float(line.rpartition("val_accuracy ")[2]) for line in messages if "val_accuracy" in line]
    assert len(accuracies) == 4
    assert accuracies[0] < 0.7
    assert accuracies[-1] >= 0.9
