"""The command line as a user meets it: what it writes, what it says, and its exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from cola_lightning.cli import main
from tests import forked

DIGITS = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
pytestmark = [
    # Lightning's advice about folders that are used again.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

FAST = ["--trainer.max_epochs", "2", "--chain.every_n_epochs", "1", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice


def run(*args):
    return main(list(args))


@pytest.fixture
def fitted(capfd):
    assert run("fit", "--config", DIGITS, *FAST) == 0
    folder = Path("runs/version_0").absolute()
    return ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]


def test_fit_ties_knots_at_a_plateau(capfd):
    rule = "{every_n_epochs: null, patience: 1, monitor: val_accuracy, mode: max, min_delta: 0.02}"
    Path("chain.yaml").write_text(f"chain: {rule}\ntrainer: {{max_epochs: 8}}\n")
    assert run("fit", "--config", DIGITS, "--config", "chain.yaml", "--trainer.enable_progress_bar", "false") == 0
    state = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]["cola"]
    assert 0 < len(state["chain"]["description"]["links"]) < 8


def test_fit_says_how_to_go_on_and_that_works(fitted, capfd):
    out = capfd.readouterr().out
    assert "link 0 finished: steps 0 to 9, rank 1, update norm" in out
    (line,) = [line for line in out.splitlines() if line.startswith("use it: ")]
    command = line.removeprefix("use it: cola ").partition(" (")[0].split()
    assert command[0] == "test"
    assert command[1:] == fitted
    assert main(command) == 0
    assert "test_accuracy" in capfd.readouterr().out
    header = Path("runs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "val_accuracy", "link", "link_update_norm"} <= set(header)


def test_last_is_the_newest_run_in_the_folder(fitted, capfd):
    assert run("fit", "--config", DIGITS, *FAST, "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert "ckpt_path: " in capfd.readouterr().out
    assert torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 27
    assert run("fit", "--config", DIGITS, *FAST, "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert not Path("runs/version_2").exists()


def test_a_module_whose_constructor_takes_nothing_is_tested_and_takes_no_links(monkeypatch, capfd):
    Path("no_args.py").write_text(
        "from benchmarks.digits_model import COLADigits\n\nclass NoArgs(COLADigits):\n    def __init__(self):\n"
        "        super().__init__(rank=1, alpha=1, seed=0)\n"
    )
    monkeypatch.syspath_prepend(".")
    Path("config.yaml").write_text(
        "seed_everything: 0\nmodel: {class_path: no_args.NoArgs}\n"
        "data: {class_path: benchmarks.digits_model.DigitsDataModule}\n"
    )
    assert run("test", "--config", "config.yaml") == 0
    assert "test: without --ckpt_path, this is the base alone" in capfd.readouterr().out
    assert run("fit", "--config", "config.yaml", "--links", "2") == 2
    assert "error: links: " in capfd.readouterr().err
    assert run("compare", "--config", "config.yaml", "--output", "study", "--methods", "[lora]") == 2
    assert "error: model: expected a class that takes optimizer" in capfd.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["--trainer.default_root_dir", "~/x"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=~/x"],
        ["--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=~/x", "--trainer.logger.name="],
    ],
    ids=" ".join,
)
def test_a_run_in_the_users_home_is_in_one_folder_in_which_last_is_found(monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run("fit", "--config", DIGITS, *FAST, *given) == 0
    files = {path.name: path for path in Path().rglob("*.*") if path.is_file()}
    folder = files["last.ckpt"].parent.parent
    assert folder.is_relative_to("home/x")
    assert {name for name, path in files.items() if path.is_relative_to(folder)} == set(files)
    assert run("test", "--config", DIGITS, *given, "--ckpt_path", "last") == 0


def test_a_modules_own_hyperparameters_do_not_overrule_the_command_line(monkeypatch, capfd):
    Path("hpmod.py").write_text(
        "from benchmarks.digits_model import COLADigits\n\nclass Saving(COLADigits):\n    def __init__(self, **chain):\n"
        "        super().__init__(**chain)\n        self.save_hyperparameters(ignore=['optimizer'])\n"
    )
    monkeypatch.syspath_prepend(".")
    fit = ["fit", "--config", DIGITS, "--model", "hpmod.Saving", *FAST]
    assert run(*fit) == 0
    assert run(*fit, "--ckpt_path", "last", "--trainer.max_epochs", "3", "--model.optimizer.lr", "0.9") == 0
    assert "model.optimizer: from here on lr 0.02 -> 0.9" in capfd.readouterr().out


def test_predict_writes_a_row_for_each_input_in_order(fitted):
    assert run("predict", *fitted) == 0
    rows = [json.loads(line) for line in Path("runs/version_1/predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(270))
    assert {tuple(row) for row in rows} == {("index", "prediction", "target")}
    assert {row["target"] for row in rows} == {5, 6, 7, 8, 9}


def test_a_predict_that_is_stopped_leaves_its_rows_so_far(fitted, monkeypatch, capfd):
    Path("stop.py").write_text(
        "import os, signal\nfrom lightning.pytorch import Callback\n\nclass Stop(Callback):\n"
        "    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):\n"
        "        if batch_idx == 3:\n            os.kill(os.getpid(), signal.SIGINT)\n"
    )
    monkeypatch.syspath_prepend(".")
    given = ["--trainer.callbacks+=stop.Stop", "--data.batch_size", "20"]
    assert run("predict", *fitted, *given) == 130
    path = Path("runs/version_1/predictions.partial.jsonl")
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == list(range(60))
    assert str(path.absolute()) in capfd.readouterr().out
    assert not path.with_name("predictions.jsonl").exists()


def test_without_a_logger_everything_goes_to_the_root_folder():
    arguments = ["--trainer.logger", "false", "--trainer.default_root_dir", "out"]
    assert run("fit", "--config", DIGITS, *FAST, *arguments) == 0
    before = Path("out/config.yaml").read_text()
    assert run("predict", "--config", DIGITS, *arguments) == 0
    assert (Path("out") / "predictions.jsonl").exists()
    assert run("test", "--config", "out/config.yaml", "--ckpt_path", "out/checkpoints/last.ckpt", "--links", "1") == 0
    assert Path("out/config.yaml").read_text() == before
    assert run("fit", "--config", DIGITS, *FAST, *arguments, "--model.alpha", "3") == 0
    assert Path("out/config.yaml").read_text() != before


SHARED = """
import uuid

from lightning.pytorch.loggers import Logger


class Shared(Logger):
    \"\"\"As WandbLogger: one save_dir for all runs, and a version that is known once the experiment is.\"\"\"

    name = "project"
    version = None

    def __init__(self, save_dir: str):
        self._save_dir = save_dir

    @property
    def save_dir(self):
        return self._save_dir

    @property
    def experiment(self):
        self.version = self.version or uuid.uuid4().hex
        return object()

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass
"""


@pytest.mark.parametrize("given", [[], ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=best"]])
def test_runs_of_a_logger_that_gives_all_one_folder_keep_their_own_configuration(monkeypatch, capfd, given):
    Path("shared.py").write_text(SHARED)
    monkeypatch.syspath_prepend(".")
    logger = ["--trainer.logger", "shared.Shared", "--trainer.logger.save_dir", "all"]
    commands = []
    for rank in ("1", "2"):
        assert run("fit", "--config", DIGITS, *FAST, *logger, *given, "--model.rank", rank, "--chain.ranks", "null") == 0
        told = [line.partition(" (")[0] for line in capfd.readouterr().out.splitlines() if line.startswith("use it: ")]
        commands += [line.removeprefix("use it: cola ").split() for line in told]
    configs = [Path(words[words.index("--config") + 1]) for words in commands]
    assert [yaml.safe_load(path.read_text())["model"]["init_args"]["rank"] for path in configs] == [1, 2]
    assert {path.parent.parent for path in configs} == {Path("all/project")}
    assert all((path.parent / "checkpoints" / "last.ckpt").is_file() for path in configs)
    for words in commands:  # each run's own configuration fits its checkpoint
        assert main(words) == 0, capfd.readouterr().err
    assert main(["predict", *commands[0][1:]]) == 0
    predictions = list(Path().rglob("predictions.jsonl"))
    assert [path.parent.parent for path in predictions] == [Path("all/project")]
    assert predictions[0].parent not in [path.parent for path in configs]
    capfd.readouterr()
    assert run("test", "--config", str(configs[1]), "--ckpt_path", "last") == 0
    assert f"ckpt_path: {configs[1].parent / 'checkpoints' / 'last.ckpt'}" in capfd.readouterr().out


def test_without_a_checkpoint_it_is_told_what_is_measured(fitted, capfd):
    assert run("validate", *fitted[:2]) == 0
    assert "validate: without --ckpt_path, this is the base alone" in capfd.readouterr().out
    assert run("validate", *fitted) == 0
    assert "without --ckpt_path" not in capfd.readouterr().out


def test_a_resumed_runs_configuration_holds_no_checkpoint_of_the_run_before(fitted, capfd):
    assert run("fit", *fitted, "--trainer.max_epochs", "3") == 0
    state = torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert len(state["state_dict"]["cola"]["chain"]["description"]["links"]) == 2
    assert state["epoch"] == 2
    saved = yaml.safe_load(Path("runs/version_1/config.yaml").read_text())
    assert saved["ckpt_path"] is saved["links"] is None
    capfd.readouterr()
    assert run("test", "--config", "runs/version_1/config.yaml") == 0
    assert "test: without --ckpt_path" in capfd.readouterr().out


def test_a_fast_dev_run_writes_nothing():
    assert run("fit", "--config", DIGITS, "--trainer.fast_dev_run", "true") == 0
    assert not list(Path().rglob("*.*"))
    Path("predictions.jsonl").write_text("mine\n")
    assert run("predict", "--config", DIGITS, "--trainer.fast_dev_run", "true") == 0
    assert [path.read_text() for path in Path().rglob("*.*")] == ["mine\n"]


def printed_config(capfd, *words):
    assert run("fit", *words, "--print_config") == 0
    return yaml.safe_load(capfd.readouterr().out)


TEXTS = ["Question: {question}", "{question}", "{a}: {b}", "[x]", "- x", "# x", "5", "yes", "null", "", "'a'", "a\nb: \u2713"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_it_is_written_and_not_as_yaml(text, capfd):
    template = ["--model.model_name", "x", "--data", "TemplateDataModule", "--data.source", "x"]
    for given in ([f"--data.prompt={text}"], ["--data.prompt", text])[: 1 if text.startswith("-") else 2]:
        assert printed_config(capfd, *template, *given)["data"]["init_args"]["prompt"] == text


def test_what_is_no_text_is_read_as_yaml(capfd):
    given = ["--model.model_name=5", "--model.rank=2", "--model.target_modules=[a, 'b']", "--model.revision=null"]
    given += ["--model.init_chain", "a: b", "--model.optimizer.lr", "1e-2", "--data.source=x", "--data.train_size=0.5"]
    config = printed_config(capfd, *given)
    assert config["model"]["class_path"] == "cola_lightning.COLACausalLM"
    assert config["data"]["class_path"] == "cola_lightning.TextDataModule"
    expected = {"model_name": "5", "rank": 2, "target_modules": ["a", "b"], "revision": None, "init_chain": "a: b"}
    assert config["model"]["init_args"].items() >= expected.items()
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert config["data"]["init_args"]["train_size"] == 0.5


@pytest.mark.parametrize("place", ["--config", "-c", "words"])
def test_a_class_has_its_own_defaults_and_not_those_of_the_class_where_none_is_named(tmp_path, monkeypatch, capfd, place):
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text("data: {class_path: PromptDataModule, init_args: {task: RTE}}\n")
    words = ["--data=PromptDataModule", "--data.task", "RTE"] if place == "words" else [place, "task.yaml"]
    data = printed_config(capfd, *words)["data"]["init_args"]
    assert (data["max_length"], data["length_grouped"], data["test_split"]) == (2048, False, "validation")


@pytest.mark.parametrize(
    ("limit", "epochs"), [("", 3), ("max_epochs=1", 1), ("max_steps=2", None), ("max_time=00:00:00:01", None)]
)
def test_a_fit_without_a_limit_is_of_three_epochs(limit, epochs, capfd):
    parts = yaml.safe_load(Path(DIGITS).read_text()) | {"trainer": {"accelerator": "cpu", "limit_train_batches": 1}}
    Path("config.yaml").write_text(yaml.safe_dump(parts | {"chain": {}}))
    assert run("fit", "--config", "config.yaml", *([f"--trainer.{limit}"] if limit else [])) == 0
    assert yaml.safe_load(Path("runs/version_0/config.yaml").read_text())["trainer"]["max_epochs"] == epochs
    assert ("trainer.max_epochs: 3, for none of" in capfd.readouterr().out) == (not limit)


TEMPLATE = "data: {class_path: TemplateDataModule, init_args: {source: %s, prompt: '{a}', options: [%s]}}"
FILES = {
    "a_file": "",
    "broken.yaml": "model: [\n",
    "typo.yaml": "trainer:\n  max_epoch: 3\n",
    "beside.yaml": "model: {class_path: benchmarks.digits_model.COLADigits, init_args: {alpha: 2}, rank: 3}",
    "beside_alone.yaml": "model: {class_path: benchmarks.digits_model.COLADigits, rank: 3}",
    "beside_optimizer.yaml": "model: {init_args: {optimizer: {class_path: torch.optim.Adam, lr: 0.1}}}",
    "beside_logger.yaml": "trainer: {logger: {class_path: CSVLogger, save_dir: x}}",
    "rows.yaml": "data: rows.csv\n",
    "no.yaml": TEMPLATE % ("x", "no, yes"),
}
BAD = [
    ("--chain.every_n_epoch 5", "unrecognized arguments: --chain.every_n_epoch 5"),
    ("--model.rnak 3", ".*'rnak' is not accepted"),
    ("--model.rank two", "model.rank: expected int, received 'two'"),
    ("--model.rank 0", "model.rank: "),
    ("--model.rank null", "model.rank: expected int"),
    ("--model.optimizer Adamx", "model.optimizer: "),
    ("--model.optimizer null", "model.optimizer: "),
    ("--model.optimizer.lr x", "model.optimizer.lr: "),
    ("--model.lr_schedule flat", "model.lr_schedule: expected Literal"),
    ("--model.target_modules ['22']", "model.target_modules: .* the nearest that exist: 2"),
    ("--model Digitz", ".*Digitz"),
    ("--model torch.nn.Linear", ".*subclass of COLAModule"),
    ("--model mine.My", ".*'mine.My': No module named 'mine'"),
    ("--model.init_chain --model.rank 2", ".*expected one argument"),
    ("--chain.patience 3", "chain: .*every_n_epochs and patience"),
    ("--chain.ranks [1,2]", "chain.ranks: "),
    ("--model.lr_schedule linear --trainer.max_epochs -1", "model.lr_schedule: "),
    ("--trainer.callbacks+=LearningRateFinder", ".*received LearningRateFinder"),
    ("--trainer.callbacks+=LastCheckpoint", ".*more than one stateful callback"),
    ("--trainer.strategy fsdp2", ".*'fsdp2'"),
    ("--trainer.strategy fsdp --trainer.accelerator cpu", ".*requires a GPU accelerator"),
    ("--trainer.default_root_dir a_file/sub", ".*a_file is a file"),
    ("--trainer.logger CSVLogger --trainer.logger.save_dir a_file", ".*a_file"),
    ("--trainer.accelerator tpux", ".*tpux"),
    ("--trainer.precision 12", "trainer.precision: "),
    ("--trainer.logger Nope", "trainer.logger: "),
    ("--trainer.val_check_interval 1000", ".*val_check_interval"),
    ("--links 2", "links: "),
    ("--ckpt_path last", "ckpt_path: "),
    ("--seed_everything -4", "-4 is not in bounds"),
    ("--data.batch_size null", "data.batch_size: expected int"),
    ("--config beside.yaml", "model: "),
    ("--config beside_alone.yaml", "model: .*inside its init_args"),
    ("--config beside_optimizer.yaml", "model.optimizer: .*inside its init_args"),
    ("--config beside_logger.yaml", "trainer.logger: "),
    ("--config rows.yaml", "data: "),
    ("--config nope.yaml", ".*File does not exist"),
    ("--config broken.yaml", ".*Problems parsing config"),
    ("--config typo.yaml", ".*'trainer.max_epoch'"),
    ("test --ckpt_path nope.ckpt", "ckpt_path: .*'nope.ckpt'"),
    ("test --ckpt_path a_file", "ckpt_path: "),
    ("test --ckpt_path .", r"ckpt_path: .*'\.'"),
    ("alone fit --config no.yaml", "data.options: expected str, received 'False'"),
    ("alone fit", ".*the following arguments are required: model_name"),
    ("alone fit --model.model_name x", ".*the following arguments are required: source"),
    ("alone", "cola: expected .*received none"),
    ("alone fti", "cola: .*received 'fti'; the nearest that exist: fit"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(words, message, capfd):
    for name, text in FILES.items():
        Path(name).write_text(text)
    before = sorted(Path().rglob("*"))
    first, *rest = words.split() or [""]
    if first == "alone":
        command = rest
    else:
        command = [first, "--config", DIGITS, *rest] if first == "test" else ["fit", "--config", DIGITS, first, *rest]
    assert run(*command) == 2
    err = capfd.readouterr().err
    assert re.match(f"error: {message}", err.strip().splitlines()[-1]), err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before


def test_what_fails_while_running_is_status_1_with_its_traceback():
    program = "import benchmarks.digits_model as d; d.F.cross_entropy = lambda *a: a[0].sum() * float('nan')"
    program += "; d.pretrain = lambda model: None; from cola_lightning.__main__ import entry_point; entry_point()"
    done = forked.run("-c", program, "fit", "--config", DIGITS, *FAST)
    assert done.returncode == 1
    assert "the training loss is nan at step 0 (epoch 0), in link 0" in done.stderr.strip().splitlines()[-1]


OWN = """
from lightning.pytorch import Callback

from benchmarks.digits_model import COLADigits
from cola_lightning import UserError


class Opens(COLADigits):
    def training_step(self, batch, batch_idx):
        raise PermissionError(13, "not yours", "somewhere")


class Constructs(COLADigits):
    def __init__(self, rank: int = 1):
        raise TypeError("of its own")


class Refused(COLADigits):
    def __init__(self, rank: int = 1):
        super().__init__(rank=0)


class Handles(COLADigits):
    def __init__(self, rank: int = 1):
        try:
            super().__init__(rank=0)
        except UserError:
            {}["another"]


class Wraps(COLADigits):
    def training_step(self, batch, batch_idx):
        try:
            COLADigits(rank=0)
        except UserError as error:
            raise RuntimeError("another") from error


class Sets(Callback):
    @property
    def state_key(self):  # which the Trainer reads
        raise ValueError("of a callback")

    def state_dict(self):
        return {}
"""


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--model", "own_errors.Opens"], "PermissionError: [Errno 13] not yours: 'somewhere'"),
        (["--model", "own_errors.Constructs"], "TypeError: of its own"),
        (["--model", "own_errors.Handles"], "KeyError: 'another'"),
        (["--model", "own_errors.Wraps"], "RuntimeError: another"),
        (["--trainer.callbacks+=own_errors.Sets", "--trainer.callbacks+=own_errors.Sets"], "ValueError: of a callback"),
        (["--model", "own_broken.Any"], "ModuleNotFoundError: No module named 'nothing_such'"),
    ],
)
def test_an_error_of_ones_own_code_keeps_its_traceback(given, line):
    Path("own_errors.py").write_text(OWN)
    Path("own_broken.py").write_text("import nothing_such\n")
    done = forked.run("-m", "cola_lightning", "fit", "--config", DIGITS, *FAST, *given)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert any(one.startswith(line) for one in said), done.stderr
    assert any("own_errors.py" in one or "own_broken.py" in one for one in said)
    assert not any(one.startswith("error: ") for one in said)


def test_a_wrong_value_from_ones_own_class_is_one_line_and_a_failure_of_the_package_keeps_its_traceback(capfd, monkeypatch):
    Path("own_refused.py").write_text(OWN)
    monkeypatch.syspath_prepend(".")
    assert run("fit", "--config", DIGITS, *FAST, "--model", "own_refused.Refused") == 2
    assert capfd.readouterr().err.startswith("error: model.rank: ")
    Path("null.yaml").write_text("model: {init_args: {rank: null}}\n")
    with pytest.raises(ValueError, match="NoneType"):
        run("fit", "--config", DIGITS, "--config", "null.yaml")


@pytest.mark.parametrize(("code", "status", "said"), [("'no rows'", 1, "no rows"), (3, 3, ""), ("", 0, "")])
def test_own_code_may_exit(code, status, said, capfd, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    own = f"class Exits{status}(DigitsDataModule):\n    def setup(self, stage):\n        sys.exit({code})\n"
    Path(f"own_exit_{status}.py").write_text(f"import sys\nfrom benchmarks.digits_model import DigitsDataModule\n\n\n{own}")
    assert run("fit", "--config", DIGITS, *FAST, "--data", f"own_exit_{status}.Exits{status}") == status
    assert capfd.readouterr().err.endswith(said and f"{said}\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_its_checkpoints_stay(number, status):
    fit = ["fit", "--config", DIGITS, "--trainer.max_epochs", "100000"]
    process = forked.Command("-m", "cola_lightning", *fit, log=Path("log"))
    checkpoint = Path("runs/version_0/checkpoints/last.ckpt")
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    assert process.finish(timeout=60).returncode == status
    assert torch.load(checkpoint, weights_only=True)["state_dict"]["cola"]["format_version"] == 4
    assert not list(checkpoint.parent.glob("*.partial"))
    (command,) = [line for line in Path("log").read_text().splitlines() if line.startswith("resume: cola fit")]
    assert str(checkpoint.absolute()) in command


def test_a_second_ctrl_c_stops_at_once():
    """Also in the middle of a batch that never ends."""
    program = "import time, benchmarks.digits_model as d; d.pretrain = lambda model: None"
    program += "; d.F.cross_entropy = lambda *a: [print('in it', flush=True)] and [time.sleep(0.1) for _ in range(600)]"
    program += "; from cola_lightning.__main__ import entry_point; entry_point()"
    fit = ["fit", "--config", DIGITS, *FAST, "--trainer.num_sanity_val_steps", "0"]
    process = forked.Command("-c", program, *fit, log=(log := Path("log")))
    deadline = time.monotonic() + 60
    while "in it" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)  # an error if it had ended
    assert process.finish(timeout=5).returncode == 130
    assert not list(Path().rglob("*.ckpt"))


def imported_by(*words, before="pass"):
    """The packages that a command imports and another program does not."""
    program = f"{before}; import sys; names = lambda: {{name.partition('.')[0] for name in sys.modules}}; known = names()"
    program += f"; from cola_lightning.cli import main; print(main({list(words)}), *names() - known)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, *names = done.stdout.splitlines()[-1].split()
    assert status == "0"
    return set(names)


def test_help_of_a_fit_leaves_heavy_libraries_alone():
    added = imported_by("fit", "--help", before="import lightning.pytorch.cli")
    assert not added & {"transformers", "datasets", "peft", "matplotlib", "sklearn", "scipy"}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["configs"]], ids=" ".join)
def test_what_needs_no_model_is_answered_without_torch(words):
    assert not imported_by(*words) & {"torch", "lightning", "transformers"}


def test_a_users_own_module_beside_the_config_is_found():
    Path("mine.py").write_text("from benchmarks.digits_model import COLADigits\n\nclass Mine(COLADigits):\n    pass\n")
    done = forked.run("-m", "cola_lightning", "fit", "--config", DIGITS, "--model", "mine.Mine", *FAST)
    assert done.returncode == 0, done.stderr
    assert "link 1 live at the end" in done.stdout
