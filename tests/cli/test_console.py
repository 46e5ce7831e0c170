"""What the command line prints: its help, its shipped configurations, and a fit's progress bar."""

import re
from pathlib import Path

import pytest
import yaml

from cola_lightning.cli import main
from cola_lightning.cli.help import EXAMPLES, MAIN_OPTIONS, SUBCOMMANDS, WIDTH
from cola_lightning.cli.made_run import resolve
from tests.helpers.toy import DIGITS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def messages(capfd, *words):
    assert main(list(words)) == 0
    return capfd.readouterr().out.splitlines()


def test_help_names_every_subcommand_and_what_people_set_with_its_default(capfd):
    lines = messages(capfd, "--help")
    assert max(map(len, lines)) <= WIDTH
    indented = [line.split() for line in lines if line.startswith("  ")]
    assert [words[0] for words in indented] == list(SUBCOMMANDS)
    for name in SUBCOMMANDS:
        lines = messages(capfd, name, "--help")
        assert lines[0].startswith(f"usage: cola {name}")
        assert f"  {EXAMPLES[name].splitlines()[0]}" in lines
        assert max(map(len, lines[: lines.index("options:")])) <= WIDTH  # what follows may be Lightning's
        assert not [line for line in lines if "(type:" in line or "<class" in line or "``" in line or line.count("efault:") > 1]
    lines = messages(capfd, "fit", "--help")
    main_options = lines[lines.index("main options:") + 1 : lines.index(SUBCOMMANDS["fit"])]
    assert [line.split("  ")[1] for line in main_options if line.startswith("  --")] == list(MAIN_OPTIONS)
    config = resolve(["--model.model_name=x", "--data.source=x"])
    for option, _, value in (option.removeprefix("--").partition(" ") for option in MAIN_OPTIONS):
        if value.isupper() or option == "trainer.max_epochs":  # no default; three where nothing limits the run
            continue
        found = config
        for name in option.split("."):
            found = found.get("init_args", found)[name]
        assert yaml.safe_load(value) == found or (option, found) == ("trainer.precision", None)
    assert config["trainer"]["gradient_clip_val"] == 1.0


def test_help_of_an_evaluation_shows_no_option_of_a_fit_and_help_of_a_class_is_plain_text(capfd):
    text = "\n".join(messages(capfd, "test", "--help"))
    assert "--ckpt_path" in text
    assert not re.search(r"--chain|--last|Knots|\.optimizer|lr_schedule|warmup|--model\.rank|max_steps|gradient_clip", text)
    text = "\n".join(messages(capfd, "fit", "--data.help=TextDataModule"))
    assert len(re.findall(r"^  --\w+\.\w+", text, re.MULTILINE)) > 20
    assert not re.search(r"``|:class:|\(type:", text)


def test_configs_lists_the_configs_and_copies_them_to_where_their_headers_expect_them(capfd):
    names = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    listed = [line for line in messages(capfd, "configs") if line[:1] not in ("", "`")]
    assert sorted(listed) == names
    messages(capfd, "configs", "smollm2.yaml", "overlays/fsdp2")
    for name in ("smollm2.yaml", "overlays/fsdp2.yaml"):
        assert (Path("configs") / name).read_bytes() == (CONFIGS / name).read_bytes()
    assert main(["configs", "smollm2"]) == 2  # it is there
    messages(capfd, "configs", "smollm2", "--overwrite")
    messages(capfd, "configs", "all", "--output", "elsewhere")
    assert len(list(Path("elsewhere").rglob("*.yaml"))) == len(names)


def test_a_log_in_a_file_has_a_line_now_and_then_and_says_where_a_run_goes_on(capfd, monkeypatch):
    monkeypatch.setattr("cola_lightning.callbacks.command.SECONDS", 0)
    fit = ["fit", "--config", DIGITS, "--trainer.limit_train_batches", "2"]
    lines = messages(capfd, *fit, "--trainer.max_epochs", "2")
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.partition(", train_loss")[0] for line in steps] == [
        f"step {k} of 4, link 0, epoch {(k - 1) // 2}" for k in (1, 2, 3, 4)
    ]
    lines = messages(capfd, *fit, "--trainer.max_epochs", "3", "--ckpt_path", "last")
    assert "resumed at step 4 of 6" in lines
    monkeypatch.setattr("cola_lightning.callbacks.command.SECONDS", 3600)
    lines = messages(capfd, *fit, "--trainer.max_epochs", "3")
    assert [line.split(",")[0] for line in lines if line.startswith("step ")] == ["step 1 of 6", "step 6 of 6"]
