"""What the command line prints: its help, its shipped configurations, and a fit's progress bar."""

import io
import re
from pathlib import Path

import pytest
import rich
import yaml
from rich.console import Console

from cola_lightning.callbacks.command import ChainProgressBar
from cola_lightning.cli import main
from cola_lightning.cli.help import EXAMPLES, MAIN_OPTIONS, SUBCOMMANDS, WIDTH
from cola_lightning.study.config import resolve_config
from tests.helpers.toy import ValidatedToy, batches, toy, trainer

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
    assert [words[0] for words in indented if words[0] != "cola"] == list(SUBCOMMANDS)
    assert {words[1] for words in indented if words[0] == "cola"} < SUBCOMMANDS.keys()  # of the examples
    for name in SUBCOMMANDS:
        lines = messages(capfd, name, "--help")
        assert lines[0].startswith(f"usage: cola {name}")
        assert f"  {EXAMPLES[name].splitlines()[0]}" in lines
        assert max(map(len, lines[: lines.index("options:")])) <= WIDTH  # what follows may be Lightning's
        assert not [line for line in lines if "(type:" in line or "<class" in line or "``" in line or line.count("efault:") > 1]
    lines = messages(capfd, "fit", "--help")
    main_options = lines[lines.index("main options:") + 1 : lines.index(SUBCOMMANDS["fit"])]
    assert [line.split("  ")[1] for line in main_options if line.startswith("  --")] == list(MAIN_OPTIONS)
    config = resolve_config(["--model.model_name=x", "--data.source=x"])
    for option, _, value in (option.removeprefix("--").partition(" ") for option in MAIN_OPTIONS):
        if value.isupper() or option == "trainer.max_epochs":  # no default; three where nothing limits the run
            continue
        found = config
        for name in option.split("."):
            found = found.get("init_args", found)[name]
        assert yaml.safe_load(value) == found or (option, found) == ("trainer.precision", None)
    clipping = " ".join("\n".join(lines).partition("--trainer.gradient_clip_val")[2].split())
    assert clipping.partition("--")[0].endswith("unscaled before. (default: 1.0) ")  # Lightning's text ends with its own
    assert config["trainer"]["gradient_clip_val"] == 1.0


def test_help_of_an_evaluation_shows_neither_knots_nor_learning_rates(capfd):
    text = "\n".join(messages(capfd, "test", "--help"))
    assert "--ckpt_path" in text
    assert not re.search(
        r"--chain|--last|Knots|model\.optimizer|lr_schedule|warmup|--model\.rank|max_steps|gradient_clip", text
    )


@pytest.mark.parametrize("option", ["--model.help=COLACausalLM", "--data.help=TextDataModule"])
def test_help_of_a_class_is_plain_text(option, capfd):
    text = "\n".join(messages(capfd, "fit", option))
    assert len(re.findall(r"^  --\w+\.\w+", text, re.MULTILINE)) > 20
    assert not re.search(r"``|:class:|\(type:", text)


def test_configs_lists_the_configs_and_copies_them_to_where_their_headers_expect_them(capfd):
    names = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    listed = [line.partition(": ")[0] for line in messages(capfd, "configs") if line[:1] not in ("", " ", "`")]
    assert sorted(listed) == names
    messages(capfd, "configs", "smollm2.yaml", "overlays/fsdp2")
    for name in ("smollm2.yaml", "overlays/fsdp2.yaml"):
        assert (Path("configs") / name).read_bytes() == (CONFIGS / name).read_bytes()
    assert main(["configs", "smollm2"]) == 2  # it is there
    messages(capfd, "configs", "smollm2", "--overwrite")
    messages(capfd, "configs", "all", "--output", "elsewhere")
    assert len(list(Path("elsewhere").rglob("*.yaml"))) == len(names)


class Recorder(ChainProgressBar):
    """Keeps which bars are shown after each refresh."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def refresh(self, hard=False):
        super().refresh(hard)
        self.shown.append([task.description.strip() for task in self.progress.tasks if task.visible])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")  # its order is fixed
def test_after_a_resume_the_bar_counts_batches_of_the_whole_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=io.StringIO(), width=WIDTH))
    counts = []

    class Counted(ChainProgressBar):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            counts.append((self.train_progress_bar.completed, self.train_progress_bar.total))

    limits = {"max_epochs": -1, "accumulate_grad_batches": 2, "enable_progress_bar": True}
    first = trainer(tmp_path, max_steps=2, **limits)
    module = toy()
    first.fit(module, batches())
    first.save_checkpoint(tmp_path / "run.ckpt")
    trainer(tmp_path, Counted(), max_steps=7, **limits).fit(module, batches(), ckpt_path=tmp_path / "run.ckpt")
    assert counts == [*((n, 10) for n in range(5, 11)), *((n, 4) for n in range(1, 5))]


@pytest.mark.parametrize(
    ("limit", "chain", "shown"),
    [
        ({"max_epochs": 2}, {"every_n_epochs": 1}, {"link 0, epoch 0/1", "link 1, epoch 1/1", "Validation"}),
        ({"max_steps": 15, "max_epochs": -1}, {}, {"link 0, epoch 0", "link 0, epoch 1", "Validation"}),
    ],
    ids=["epochs", "steps"],
)
def test_one_bar_is_shown_at_a_time_with_the_link_and_the_epoch(limit, chain, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=io.StringIO(), width=WIDTH))
    bar = Recorder()
    run = trainer(tmp_path, bar, chain=chain, enable_progress_bar=True, num_sanity_val_steps=0, val_check_interval=5, **limit)
    run.fit(toy(ValidatedToy), batches(), batches())
    assert {tuple(bars) for bars in bar.shown if len(bars) > 1} == set()
    names = [bars[0] for bars in bar.shown if bars]
    assert shown <= {*names}
    assert names[0] in names[names.index("Validation") :]  # again, after a validation in the first epoch
