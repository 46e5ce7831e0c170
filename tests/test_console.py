"""What the command line prints: its help, its shipped configurations, a fit's lines and its progress bar."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rich
import yaml
from rich.console import Console

from cola_lightning.callbacks import ChainProgressBar
from cola_lightning.cli import main
from cola_lightning.cli.configs import FOLDER
from cola_lightning.cli.help import MAIN_OPTIONS, SUBCOMMANDS, WIDTH
from tests.toy import Toy, ValidatedToy, batches, toy, trainer

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS = str(CONFIGS / "digits.yaml")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
FAST = ["--trainer.max_epochs", "2", "--chain.every_n_epochs", "1"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def told(capfd, *words):
    assert main(list(words)) == 0
    return capfd.readouterr().out.splitlines()


def test_help_lists_every_subcommand_in_whole_sentences_at_80_columns(capfd):
    lines = told(capfd, "--help")
    assert max(map(len, lines)) <= WIDTH
    text = " ".join(" ".join(lines).split())
    for name, sentence in SUBCOMMANDS.items():
        assert f"{name} {sentence}" in text
        assert sentence.endswith(".")


def test_help_of_a_fit_begins_with_what_people_set_and_its_default(capfd):
    lines = told(capfd, "fit", "--help")
    assert [line.split("  ")[1] for line in lines[3 : 3 + len(MAIN_OPTIONS)]] == list(MAIN_OPTIONS)
    assert max(map(len, lines[: 3 + len(MAIN_OPTIONS)])) <= WIDTH
    config = yaml.safe_load("\n".join(told(capfd, "fit", "--model.model_name=x", "--data.source=x", "--print_config")))
    for option, _, value in (option.removeprefix("--").partition(" ") for option in MAIN_OPTIONS):
        if value.isupper() or option == "trainer.max_epochs":  # no default; three where nothing limits the run
            continue
        found = config
        for name in option.split("."):
            found = found.get("init_args", found)[name]
        assert yaml.safe_load(value) == found or (option, found) == ("trainer.precision", None)


def test_every_subcommand_has_help(capfd):
    for name in SUBCOMMANDS:
        assert told(capfd, name, "--help")[0].startswith(f"usage: cola {name}")


def test_without_a_subcommand_all_are_named(capfd):
    assert main([]) == 2
    line = capfd.readouterr().err
    assert line == f"error: cola: expected {', '.join(SUBCOMMANDS)}, received none (cola --help describes them)\n"


def test_configs_lists_what_runs_without_a_clone(capfd):
    lines = told(capfd, "configs")
    paths = [path for path in CONFIGS.rglob("*.yaml") if path.stem not in ("digits", "domain_shift")]
    assert FOLDER == CONFIGS
    assert len(paths) == 7
    names = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in paths)
    assert sorted(line.partition(": ")[0] for line in lines if not line.startswith(" ") and ": " in line) == names


@pytest.mark.parametrize("words", [["--help"], ["configs"]])
def test_a_reader_that_stops_reading_is_no_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)  # as of `cola configs | head -1`, later
    command = [sys.executable, "-m", "cola_lightning", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_another_broken_pipe_has_its_traceback():
    program = "from cola_lightning import __main__, cli\ndef main(): raise BrokenPipeError('of a logger')\n"
    program += "cli.main = main\n__main__.entry_point()"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "BrokenPipeError: of a logger" in done.stderr


def test_a_command_needs_no_output():
    command = f"{sys.executable} -m cola_lightning configs >&-"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_characters_that_the_output_cannot_encode_are_replaced():
    program = (
        "from cola_lightning.__main__ import entry_point\ntry: entry_point()\nexcept SystemExit: print('\u2713 caf\u00e9')"
    )
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", program, "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout.splitlines()[1:] == ["? caf\u00e9".encode("latin-1")]


def test_configs_copies_to_where_the_headers_commands_expect_them(capfd):
    told(capfd, "configs", "smollm2.yaml", "overlays/fsdp2")
    for name in ("smollm2.yaml", "overlays/fsdp2.yaml"):
        assert (Path("configs") / name).read_bytes() == (CONFIGS / name).read_bytes()
    assert main(["configs", "smollm2"]) == 2
    assert "'configs/smollm2.yaml', which --overwrite replaces" in capfd.readouterr().err
    told(capfd, "configs", "smollm2", "--overwrite")
    told(capfd, "configs", "all", "--output", "elsewhere")
    assert len(list(Path("elsewhere").rglob("*.yaml"))) == 7


def test_configs_names_the_nearest_of_an_unknown_one(capfd):
    assert main(["configs", "smolm"]) == 2
    assert capfd.readouterr().err.startswith("error: names: expected llama-2-7b, opt-1.3b,")


def test_a_fit_prints_what_is_of_use(capfd, caplog):
    lines = told(capfd, "fit", "--config", DIGITS, *FAST)
    text = "\n".join([*lines, caplog.text])  # Lightning logs its own lines
    assert "GPU available" in text
    assert "model: 330 of 9,300 parameters are trained (3.55%), link 0 of rank 1 and alpha 1 on 3 layers" in lines
    for noise in ("FLOPs", "v_num"):
        assert noise not in text
    assert "link 1, epoch 1/1" in text


def test_lightnings_summary_is_printed_where_it_is_asked_for(capfd):
    assert "Trainable params" in "\n".join(told(capfd, "fit", "--config", DIGITS, *FAST, "--trainer.enable_model_summary=true"))


class Recorder(ChainProgressBar):
    """Keeps which bars are shown after each refresh."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def refresh(self, hard=False):
        super().refresh(hard)
        self.shown.append([task.description for task in self.progress.tasks if task.visible])


@pytest.fixture
def bar(monkeypatch):
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=io.StringIO(), width=WIDTH))
    return Recorder()


def test_one_bar_is_shown_at_a_time(bar, tmp_path):
    run = trainer(tmp_path, bar, chain={"every_n_epochs": 1}, enable_progress_bar=True, max_epochs=2, num_sanity_val_steps=0)
    run.fit(toy(ValidatedToy), batches(), batches())
    assert {tuple(one) for one in bar.shown if len(one) > 1} == set()
    seen = {one[0] for one in bar.shown if one}
    assert {"link 0, epoch 0/1", "link 1, epoch 1/1", "Validation"} <= {name.strip() for name in seen}


def test_a_run_that_steps_limit_has_no_last_epoch(bar, tmp_path):
    trainer(tmp_path, bar, enable_progress_bar=True, max_steps=25, max_epochs=-1).fit(toy(Toy), batches())
    assert {one[0] for one in bar.shown if one} == {"link 0, epoch 0", "link 0, epoch 1", "link 0, epoch 2"}
