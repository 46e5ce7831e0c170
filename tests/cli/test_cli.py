"""The command line as a user meets it: what it writes, what it says, and its exit status. Mistakes: test_refusals.py."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from cola_lightning.callbacks.chain_of_lora import ChainOfLoRA
from cola_lightning.chain.checkpoint import StoredState
from cola_lightning.cli import main
from cola_lightning.cli.made_run import resolve
from cola_lightning.errors import causes
from examples.digits import COLADigits
from tests.helpers import forked, tiny
from tests.helpers.toy import DIGITS, FAST, LAST, read_csv, wait_for

pytestmark = [
    # Lightning's advice about folders that are used again.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(".")


def run(*words):
    return main(list(words))


def fit(*words):
    return run("fit", "--config", DIGITS, *FAST, *words)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder with the run of ``fit()``, and what that printed."""
    folder = tmp_path_factory.mktemp("first")
    with contextlib.chdir(folder), open("printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        assert fit() == 0
    return folder


@pytest.fixture
def printed(first_run, tmp_path):
    """What the fit said whose run is in the current folder."""
    shutil.copytree(first_run / "runs", tmp_path / "runs")
    return (first_run / "printed.txt").read_text()


def messages(capfd, start):
    """The rest of the one line that begins so."""
    (line,) = [line.removeprefix(start) for line in capfd.readouterr().out.splitlines() if line.startswith(start)]
    return line


def state_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)


def checkpoint_of(version):
    return ["--config", f"runs/version_{version}/config.yaml", "--ckpt_path", f"runs/version_{version}/checkpoints/last.ckpt"]


# ---------------------------------------------------------------------- a run and what follows it


def test_a_fit_is_tested_validated_and_predicted_by_the_commands_that_it_names(printed, capfd):
    assert "  model: link 0 of rank 1 and alpha 1 on 3 of 3 layers: 330 parameters\n" in printed
    assert "  resume: exact, from every checkpoint\n" in printed
    assert "link 0 finished: steps 0 to 9, rank 1, update norm" in printed
    command = next(line for line in printed.splitlines() if line.startswith("use it: cola "))
    assert run(*command.partition(" (")[0].split()[3:]) == 0
    assert "test_accuracy" in capfd.readouterr().out
    assert "test_accuracy" in Path("runs/version_0/test/version_0/metrics.csv").read_text()
    header = Path("runs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "val_accuracy", "link", "link_update_norm"} <= set(header)
    assert list(logged(0, "val_loss")) == [8, 17, 26]
    assert run("validate", *checkpoint_of(0)) == 0
    assert "no --ckpt_path" not in capfd.readouterr().out
    assert run("validate", *checkpoint_of(0)[:2]) == 0
    assert "validate: no --ckpt_path given; using the base" in capfd.readouterr().out
    assert run("predict", *checkpoint_of(0)) == 0
    (path,) = Path("runs/version_0").rglob("predictions.jsonl")
    rows = tiny.read_rows(path)
    assert [row["index"] for row in rows] == list(range(270))
    assert {tuple(row) for row in rows} == {("index", "prediction", "target")}
    assert {row["target"] for row in rows} == {5, 6, 7, 8, 9}


@pytest.mark.usefixtures("printed")
def test_the_newest_run_of_the_same_options_is_resumed_and_its_configuration_holds_no_checkpoint(capfd):
    Path("config.yaml").write_text("- a file of the user's\n")
    further = ["--ckpt_path", "last", "--trainer.max_epochs", "4"]
    assert run("test", "--config", DIGITS, *FAST) == 0  # version_1, of the base
    for version, rank in {2: 1, 3: 2}.items():  # as runs that were killed before their first checkpoint
        shutil.copytree("runs/version_0", f"runs/version_{version}", ignore=shutil.ignore_patterns("checkpoints"))
        config = Path(f"runs/version_{version}/config.yaml")
        config.write_text(config.read_text().replace("rank: 1\n", f"rank: {rank}\n"))
    capfd.readouterr()
    assert fit(*further) == 0
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("ckpt_path: ")] == [
        f"ckpt_path: the newer run {Path('runs/version_2').absolute()} has no checkpoint",
        f"ckpt_path: {Path(LAST).absolute()}",
    ]
    resumed = checkpoint_of(4)
    assert state_of(resumed[-1])["global_step"] == 36
    assert len(StoredState.of(state_of(resumed[-1])["state_dict"]).chain) == 3
    saved = yaml.safe_load(Path(resumed[1]).read_text())
    assert saved["ckpt_path"] is saved["links"] is None


class Impatient(Callback):
    """Resumes the run while it is running."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            Path("statuses").write_text(f"{[fit('--ckpt_path', path) for path in ('last', 'runs/version_0')]}")


def test_a_run_that_is_still_running_is_not_resumed_beside_itself(capfd):
    assert fit("--trainer.callbacks+=tests.cli.test_cli.Impatient") == 0
    assert Path("statuses").read_text() == "[2, 2]"
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.partition(" is still")[0] for line in errors] == ["error: ckpt_path: the run in runs/version_0"] * 2
    assert [path.name for path in Path("runs").iterdir()] == ["version_0"]
    assert fit("--ckpt_path", "runs/version_0", "--trainer.max_epochs", "4") == 0  # once it has ended


def test_a_hook_of_ours_that_lightning_cannot_call_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(ChainOfLoRA, "setup", lambda self, trainer: None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stage'"):
        fit("--trainer.max_epochs", "1")


def test_one_process_of_a_launcher_logs(monkeypatch, capfd):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert fit("--trainer.max_epochs", "1") == 0
    assert "before the first step" not in capfd.readouterr().out


class Saving(COLADigits):
    """Its arguments are Lightning's hyperparameters, too."""

    def __init__(self, **chain):
        super().__init__(**chain)
        self.save_hyperparameters(ignore=["optimizer"])


def test_a_modules_own_hyperparameters_do_not_overrule_the_command_line(capfd):
    further = ["--ckpt_path", LAST, "--trainer.max_epochs", "2", "--model.optimizer.lr", "0.9", "--model.dropout", "0.3"]
    for words in (["--trainer.max_epochs", "1"], further):
        assert fit("--model", f"{__name__}.Saving", *words) == 0
    assert "model.optimizer: continuing with lr 0.02 -> 0.9" in capfd.readouterr().out
    assert yaml.safe_load(Path("runs/version_1/config.yaml").read_text())["model"]["init_args"]["dropout"] == 0.3


def test_a_run_in_the_users_home_is_in_one_folder_in_which_last_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = ["--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=~/x", "--trainer.logger.name="]
    assert fit(*given) == 0
    files = {path.name: path for path in Path().rglob("*.*") if path.is_file()}
    folder = files["last.ckpt"].parent.parent
    assert folder.is_relative_to("home/x")
    assert {name for name, path in files.items() if path.is_relative_to(folder)} == set(files)
    assert run("test", "--config", DIGITS, *FAST, *given, "--ckpt_path", "last") == 0


def logged(version, name):
    rows = read_csv(f"runs/version_{version}/metrics.csv")
    return {int(row["step"]): float(row[name]) for row in rows if row[name]}


def test_a_short_fit_is_logged_and_validates_at_its_end_and_resumes_exactly(capfd):
    short = ["--trainer.log_every_n_steps", "null", "--chain.every_n_epochs", "null", "--trainer.max_epochs", "-1"]
    assert fit(*short, "--trainer.max_steps", "12") == 0  # nine are an epoch
    assert list(logged(0, "train_loss")) == [11]
    assert list(logged(0, "val_loss")) == [8, 11]
    capfd.readouterr()
    assert run("inspect", LAST, "--json") == 0
    assert json.loads(capfd.readouterr().out)[0]["metrics"]["val_loss"] == pytest.approx(logged(0, "val_loss")[11])
    assert fit(*short, "--trainer.max_steps", "15", "--ckpt_path", LAST) == 0
    assert fit(*short, "--trainer.max_steps", "15") == 0
    resumed, whole = (state_of(checkpoint_of(version)[-1])["state_dict"] for version in (1, 2))
    assert logged(1, "val_loss")[14] == logged(2, "val_loss")[14]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items() if "lora_" in name)


def test_the_last_validation_is_not_made_twice_nor_left_out_by_epochs_without_one():
    assert fit("--trainer.check_val_every_n_epoch", "2", "--trainer.log_every_n_steps", "5") == 0
    assert list(logged(0, "val_loss")) == [17, 26]
    assert list(logged(0, "train_loss")) == [4, 9, 14, 19, 24, 26]


def test_without_a_logger_everything_goes_to_the_root_folder():
    arguments = ["--trainer.logger", "false", "--trainer.default_root_dir", "out"]
    assert fit(*arguments) == 0
    before = Path("out/config.yaml").read_text()
    assert run("predict", "--config", DIGITS, *arguments) == 0
    assert Path("out/predictions.jsonl").exists()
    assert run("test", "--config", "out/config.yaml", "--ckpt_path", "out/checkpoints/last.ckpt", "--links", "1") == 0
    assert Path("out/config.yaml").read_text() == before
    assert fit(*arguments, "--model.alpha", "3", "--trainer.max_epochs", "1") == 0
    assert Path("out/config.yaml").read_text() != before


SHARED = """
import uuid

from lightning.pytorch.loggers.logger import DummyLogger


class Shared(DummyLogger):  # as WandbLogger: one save_dir for all runs, and a version that is known once the experiment is
    name = "project"
    version = save_dir = None

    def __init__(self, save_dir: str):
        super().__init__()
        self.save_dir = save_dir

    @property
    def experiment(self):
        self.version = self.version or uuid.uuid4().hex
        return super().experiment
"""


def test_runs_of_a_logger_that_gives_all_one_folder_keep_their_own_configuration(capfd):
    Path("shared.py").write_text(SHARED)
    logger = ["--trainer.logger=shared.Shared", "--trainer.logger.save_dir=all"]
    logger += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=best"]
    commands, folders = [], []
    for rank in ("1", "2"):
        assert fit(*logger, "--model.rank", rank, "--chain.ranks", "null") == 0
        commands.append(messages(capfd, "use it: cola ").partition(" (")[0].split())
        folders.append(Path(commands[-1][commands[-1].index("--config") + 1]).parent)
        assert yaml.safe_load((folders[-1] / "config.yaml").read_text())["model"]["init_args"]["rank"] == int(rank)
        assert (folders[-1] / "checkpoints" / "last.ckpt").is_file()
    assert run(*commands[0]) == 0  # its own configuration fits its checkpoint
    assert {folder.parent for folder in folders} == {Path("all/project")}
    capfd.readouterr()
    assert run("test", "--config", str(folders[1] / "config.yaml"), "--ckpt_path", "last") == 0
    assert messages(capfd, "ckpt_path: ") == str(folders[1] / "checkpoints" / "last.ckpt")


def test_a_fit_that_goes_on_in_its_own_folder_and_a_test_there_keep_the_metrics_so_far(capfd):
    """As the runs of a study, whose logger writes into the run's folder itself."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "mine", "name": "", "version": ""}}
    assert fit("--trainer.logger", json.dumps(logger)) == 0
    of_fit = read_csv("mine/metrics.csv")
    again = ["--config", "mine/config.yaml", "--ckpt_path", "mine"]
    assert run("fit", *again, "--trainer.max_epochs", "4") == 0
    assert run("test", *again) == 0
    rows = [{name: value for name, value in row.items() if value} for row in read_csv("mine/metrics.csv")]
    assert rows[: len(of_fit)] == [{name: value for name, value in row.items() if value} for row in of_fit]
    assert {int(row["step"]) for row in rows if "val_loss" in row} == {8, 17, 26, 35}
    assert "test_accuracy" in rows[-1]
    capfd.readouterr()
    assert run("inspect", "mine") == 0
    assert "continued" not in capfd.readouterr().err


def test_a_fast_dev_run_writes_nothing():
    Path("predictions.jsonl").write_text("mine\n")
    for subcommand in ("fit", "predict"):
        assert run(subcommand, "--config", DIGITS, "--trainer.fast_dev_run", "true") == 0
    assert [path.read_text() for path in Path().rglob("*.*")] == ["mine\n"]


# ---------------------------------------------------------------------- links, and a disk that is full


@pytest.mark.usefixtures("printed")
def test_inspect_tells_the_same_of_a_checkpoint_and_of_its_chain_from_which_a_run_begins(capsys):
    assert run("export", LAST, "--format", "chain", "--output", "chain") == 0
    capsys.readouterr()
    messages = []
    for path in (LAST, "chain"):
        assert run("inspect", path, "--json") == 0
        messages.append(json.loads(capsys.readouterr().out))
    assert messages[0] == messages[1]
    assert [(link["rank"], link["steps"], link["total_rank"]) for link in messages[0]] == [(1, 9, 1), (1, 9, 2), (1, 9, 3)]
    assert all("val_accuracy" in link["metrics"] for link in messages[0])
    assert run("inspect", "chain", "--links", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.lstrip()[:1] in "0123456789" and line.strip()]) == 2

    assert fit("--model.init_chain", "chain", "--links", "1") == 0
    assert len(StoredState.of(state_of(checkpoint_of(1)[-1])["state_dict"]).chain) == 1 + 2
    shutil.rmtree("chain")  # the checkpoint holds it
    assert run("test", *checkpoint_of(1)) == 0
    assert run("fit", *checkpoint_of(1), "--trainer.max_epochs", "4") == 0


@pytest.mark.usefixtures("printed")
def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_the_last_checkpoint_loads():
    """A limit on the size of files, which the checkpoint outgrows: each link adds to it."""
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({Path(LAST).stat().st_size + 500}, resource.RLIM_INFINITY))
from cola_lightning.__main__ import entry_point
try:
    entry_point()
finally:  # what coverage writes of this process when it ends is none of the run's files
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    words = ["fit", "--config", DIGITS, *FAST, "--trainer.max_epochs", "9", "--trainer.default_root_dir", "full"]
    done = forked.run("-c", program, *words)
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, last.partition("/")[0]) == (1, "error: full"), done.stderr
    assert "Traceback" not in done.stderr
    (checkpoint,) = Path("full").rglob("last.ckpt")
    assert state_of(checkpoint)["epoch"] == 2
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert run("test", "--config", DIGITS, "--ckpt_path", str(checkpoint)) == 0


# ---------------------------------------------------------------------- how options are read


@pytest.mark.parametrize("texts", [["a\nb: \u2713", "null", "[x]"], ["{question}", "- a", ""]])
def test_a_text_is_read_as_it_is_written_and_not_as_yaml(texts):
    words = [f"--model.model_name={texts[0]}", "--data=TemplateDataModule", "--data.source=x", f"--data.label={texts[2]}"]
    words += [f"--data.prompt={texts[1]}"] if texts[1].startswith("-") else ["--data.prompt", texts[1]]
    model, data = (resolve(words)[name]["init_args"] for name in ("model", "data"))
    assert [model["model_name"], data["prompt"], data["label"]] == texts


def test_what_is_no_text_is_read_as_yaml():
    words = ["--model.model_name=5", "--model.rank=2", "--model.target_modules=[a, 'b']", "--model.revision=null"]
    words += ["--model.init_chain", "a: b", "--model.optimizer.lr", "1e-2", "--data.source=[x, y]", "--data.train_size=0.5"]
    config = resolve(words)
    assert config["model"]["class_path"] == "cola_lightning.COLACausalLM"
    assert config["data"]["class_path"] == "cola_lightning.TextDataModule"
    expected = {"model_name": "5", "rank": 2, "target_modules": ["a", "b"], "revision": None, "init_chain": "a: b"}
    assert config["model"]["init_args"].items() >= expected.items()
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert (config["data"]["init_args"]["source"], config["data"]["init_args"]["train_size"]) == (["x", "y"], 0.5)


def test_a_class_has_its_own_defaults_and_not_those_of_the_class_where_none_is_named():
    Path("task.yaml").write_text("data: {class_path: PromptDataModule, init_args: {task: RTE}}\n")
    for words in (["-c", "task.yaml"], ["--data=PromptDataModule", "--data.task", "RTE"]):
        data = resolve([*words, "--model.model_name", "x"])["data"]["init_args"]
        assert (data["max_length"], data["length_grouped"], data["test_split"]) == (2048, False, "validation")


def test_the_data_follows_from_the_model_unless_a_class_is_named():
    model = "model: {class_path: COLAPreferenceLM, init_args: {model_name: x}}\n"
    Path("pairs.yaml").write_text(model + "data: {init_args: {source: y}}\n")
    Path("rows.yaml").write_text("data: {class_path: TextDataModule}\n")
    given = ["--data.source=y", "--model.model_name=x"]
    for words, data in {
        ("--model=COLAImageClassifier", *given): "ImageDataModule",
        ("--model.class_path", "cola_lightning.COLASequenceClassifier", *given): "TextClassificationDataModule",
        ("--config", "pairs.yaml"): "PreferenceDataModule",
        ("-c=pairs.yaml", "--model=COLACausalLM"): "TextDataModule",
        ("--config", "pairs.yaml", "--config", "rows.yaml"): "TextDataModule",
        ("--data", "TemplateDataModule", "--data.prompt={a}", "--model", "COLAPreferenceLM", *given): "TemplateDataModule",
    }.items():
        config = resolve(words)["data"]
        assert (config["class_path"], config["init_args"]["source"]) == (f"cola_lightning.{data}", "y")


@pytest.mark.parametrize(("limit", "epochs"), [("", 3), ("max_time=00:00:01:00", None)])
def test_a_fit_without_a_limit_is_of_three_epochs(limit, epochs):
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss", "stopping_threshold": 1e9}}  # after an epoch
    trainer = {"accelerator": "cpu", "limit_train_batches": 1, "callbacks": [stop]}
    Path("config.yaml").write_text(yaml.safe_dump(yaml.safe_load(Path(DIGITS).read_text()) | {"trainer": trainer, "chain": {}}))
    assert run("fit", "--config", "config.yaml", *([f"--trainer.{limit}"] if limit else [])) == 0
    assert yaml.safe_load(Path("runs/version_0/config.yaml").read_text())["trainer"]["max_epochs"] == epochs


# ---------------------------------------------------------------------- what fails, and what is stopped


class Opens(COLADigits):
    def training_step(self, batch, batch_idx):
        raise PermissionError(13, "not yours", "somewhere")


class Constructs(COLADigits):
    def __init__(self, rank: int = 1):
        raise TypeError("of its own")


class Refused(COLADigits):
    def __init__(self, rank: int = 1):
        super().__init__(rank=0)


def test_an_error_of_ones_own_code_keeps_its_traceback_and_a_wrong_value_is_one_line(capfd):
    for name, kind in {"Opens": PermissionError, "Constructs": TypeError}.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011
            fit("--model", f"{__name__}.{name}")
        assert kind in map(type, causes(caught.value))
    capfd.readouterr()
    assert fit("--model", f"{__name__}.Refused") == 2
    assert capfd.readouterr().err.startswith("error: model.rank ")


def test_an_interrupted_run_of_a_module_in_the_users_folder_says_how_to_go_on():
    """SIGINT is sent in test_kills.py."""
    Path("mine.py").write_text("from examples.digits import COLADigits\n\nclass Mine(COLADigits):\n    pass\n")
    endless = ["fit", "--config", DIGITS, "--model", "mine.Mine", "--trainer.max_epochs", "100000"]
    process = forked.Command("-m", "cola_lightning", *endless, log=Path("log"))
    wait_for(Path(LAST).exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.finish(timeout=60).returncode == 143
    assert state_of(LAST)["global_step"] >= 1
    assert not list(Path("runs").rglob("*.partial"))
    (command,) = [line for line in Path("log").read_text().splitlines() if line.startswith("resume: cola fit")]
    assert command.endswith("--config runs/version_0/config.yaml --ckpt_path runs/version_0")
