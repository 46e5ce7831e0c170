"""Kills a run, resumes it, and compares it with the same run that nobody killed.

Each run is a ``cola fit`` in a process of its own, with dropout, shuffling, two data workers, gradient accumulation, two
validations an epoch and two knots. What a run does is written down, batch by batch, by ``kill_run.Recorder``.
"""

import json
import re
from dataclasses import dataclass

import torch
import yaml

from tests.helpers import forked, tiny
from tests.helpers.resuming import first_difference

EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
SAVED_EVERY = 2  # optimizer steps, in the runs that get no chance to save anything when they are killed
SECONDS = 120  # a run takes ten

TRAINER = {"max_epochs": 3, "accelerator": "cpu", "val_check_interval": 0.5, "log_every_n_steps": 1}
TRAINER |= {"enable_progress_bar": False, "enable_model_summary": False}


def adamw(lr):
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}


def digits(chain, **model):
    """Batches 0 to 6 of an epoch: windows of 0-2, 3-5 and 6, validations after 2 and 5; knots in the middle of epochs, at the
    batches 3 of epoch 1 and 6 of epoch 2.
    """
    model |= {
        "target_modules": "all-linear",
        "rank": 2,
        "alpha": 8,
        "dropout": 0.2,
        "optimizer": adamw(1e-1),
    }
    return {
        "model": {"class_path": "examples.digits.COLADigits", "init_args": model},
        "data": {"class_path": "examples.digits.DigitsDataModule", "init_args": {"batch_size": 16, "num_workers": 2}},
        "chain": {"every_n_train_steps": 4} | chain,
        "trainer": TRAINER | {"accumulate_grad_batches": 3, "limit_train_batches": 7, "limit_val_batches": 3},
    }


def llama(chain, class_path="COLACausalLM", data=("PromptDataModule", {"task": "SST2"}), **model):
    """Batches 0 to 5 of an epoch: windows of 0-1, 2-3 and 4-5, validations after 2, inside a window, and after 5; knots between
    epochs.
    """
    model |= {"model_name": "../model", "target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 4, "dropout": 0.1}
    rows = {"source": "../rows", "batch_size": 4, "train_size": 24, "val_size": 12, "num_workers": 2}
    return {
        "model": {"class_path": class_path, "init_args": model | {"optimizer": adamw(1e-2)}},
        "data": {"class_path": data[0], "init_args": rows | data[1]},
        "chain": {"every_n_epochs": 1} | chain,
        "trainer": TRAINER | {"accumulate_grad_batches": 2},
    }


# Each knot of pairs moves their reference and merges half; A, the rest of B and the optimizer go on. Knots of records merge
# nothing, on stacked links; those of thirds merge a third, in the middle of epochs.
SETUPS = {
    "digits": digits({"ranks": [2, 1, 2]}),
    "llama": llama({}),
    "pairs": llama({"knot": "half"}, "COLAPreferenceLM", ("PreferenceDataModule", {}), reference="link"),
    "records": llama({"knot": "record"}, dtype="bfloat16"),
    "thirds": digits({"knot": "half", "share": 0.3}, lr_schedule="stable"),
}


@dataclass(frozen=True)
class Kill:
    """A moment in words, the signal that is sent then, and where that is: see ``kill_run.Recorder``."""

    moment: str
    signal: str
    hook: str
    digits: tuple[int, int]
    llama: tuple[int, int]

    def at(self, setup):
        """The batch, in a set-up's run: its epoch, and its place in the epoch."""
        return self.digits if setup in ("digits", "thirds") else self.llama

    def __str__(self):
        return f"{self.moment}, {self.signal}"


KILLS = [
    Kill("first batch", "SIGKILL", "backward", digits=(0, 0), llama=(0, 0)),
    Kill("after the first step", "SIGKILL", "validation", digits=(0, 2), llama=(0, 2)),
    Kill("before a knot", "SIGINT", "batch end", digits=(1, 2), llama=(0, 5)),
    Kill("at a knot", "SIGINT", "batch start", digits=(1, 3), llama=(1, 0)),
    Kill("after a knot", "SIGTERM", "batch end", digits=(1, 3), llama=(1, 0)),
    Kill("mid-epoch", "SIGKILL", "batch end", digits=(1, 4), llama=(1, 3)),
    Kill("inside an accumulation window: after backward", "SIGINT", "backward", digits=(0, 4), llama=(1, 4)),
    Kill("inside an accumulation window: at a batch's end", "SIGTERM", "batch end", digits=(1, 1), llama=(1, 2)),
    Kill("before the optimizer's step", "SIGINT", "optimizer step", digits=(1, 2), llama=(1, 3)),
    Kill("inside validation", "SIGTERM", "validation", digits=(1, 2), llama=(1, 2)),
    Kill("inside validation", "SIGINT", "validation", digits=(1, 5), llama=(1, 5)),
    Kill("while a checkpoint is being written", "SIGKILL", "checkpoint", digits=(1, 1), llama=(1, 1)),
    Kill("while a checkpoint is being written", "SIGINT", "checkpoint", digits=(1, 1), llama=(1, 1)),
]


def prepare(setup, folder):
    """Writes what a set-up's runs share: the configuration, and for the language model its files and its data."""
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0} | SETUPS[setup]))
    if setup not in ("digits", "thirds"):
        tiny.folder(folder / "model", "llama", attention_dropout=0.1)
    if setup == "pairs":
        answers = ["It was great.", "It was terrible."]
        rows = [{"prompt": f"Film {k}? ", "chosen": answers[k % 2], "rejected": answers[1 - k % 2]} for k in range(40)]
        tiny.write_rows(folder / "rows", rows)
    if setup in ("llama", "records"):
        words = [("great", 1), ("terrible", 0)]
        rows = [{"sentence": f"film {k} with {words[k % 2][0]} actors ", "label": words[k % 2][1]} for k in range(40)]
        tiny.write_rows(folder / "rows", rows)


def fit(folder, name, *arguments, **recorder):
    """One ``cola fit`` in a folder beside the configuration; it leaves ``name.log`` and ``name.jsonl``. Its exit status."""
    options = [f"--trainer.callbacks.{option}={value}" for option, value in {"path": f"{name}.jsonl", **recorder}.items()]
    command = ["-m", "cola_lightning", "fit", "--config", "../config.yaml", *arguments]
    command += ["--trainer.callbacks+=tests.helpers.kill_run.Recorder", *options]
    given = {"cwd": folder, "log": folder / f"{name}.log", "start_new_session": True}
    return forked.run(*command, **given, timeout=SECONDS).returncode


def records(folder, name):
    """What a run has written down."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_checkpoint(folder):
    """The newest run's ``last.ckpt``, there or not."""
    runs = sorted((folder / "runs").glob("version_*"), key=lambda path: int(path.name.partition("_")[2]))
    return (runs[-1] if runs else folder) / "checkpoints" / "last.ckpt"


def run_whole(setup, folder):
    """Prepares a set-up in a folder, and makes there the run that nobody kills: in ``whole``, whose path it returns."""
    prepare(setup, folder)
    whole = folder / "whole"
    whole.mkdir()
    status = fit(whole, "whole")
    assert status == 0, (status, (whole / "whole.log").read_text())
    return whole


def run_kill(setup, whole, kill):
    """Kills a run and resumes it, in a folder beside the whole run's; the two are that run. The step that it resumed from."""
    folder = whole.parent / re.sub(r"\W+", "-", str(kill))
    folder.mkdir()
    options = ["--last.every_n_train_steps", str(SAVED_EVERY)] if kill.signal == "SIGKILL" else []
    at = json.dumps(kill.at(setup))
    status = fit(folder, "killed", *options, kill=kill.hook, at=at, signal=kill.signal)
    assert status == EXIT_STATUS[kill.signal], (folder / "killed.log").read_text()
    assert any(folder.rglob("*.partial")) == (kill.hook == "checkpoint" and kill.signal == "SIGKILL")
    checkpoint, resumed_from = last_checkpoint(folder), None
    assert checkpoint.exists() or kill.signal == "SIGKILL"
    if checkpoint.exists():
        options += ["--ckpt_path", str(checkpoint.relative_to(folder))]
        resumed_from = torch.load(checkpoint, weights_only=True)["global_step"]
    assert fit(folder, "resumed", *options) == 0, (folder / "resumed.log").read_text()
    assert_one_run(*(records(*run) for run in ((whole, "whole"), (folder, "killed"), (folder, "resumed"))), kill.signal)
    theirs, ours = (torch.load(last_checkpoint(run), weights_only=True) for run in (whole, folder))
    # Without Lightning's counters: one counts the gradients that were set to zero, and so a window that was begun twice.
    assert first_difference(*(one | {"loops": None} for one in (ours, theirs)), "checkpoint") is None
    return resumed_from


def assert_one_run(whole, killed, resumed, signal):
    """The killed run is the whole one's beginning, the resumed one its end, without a gap between.

    A partial accumulation window may be done twice, and a validation that was interrupted or that falls into it; after SIGKILL,
    a few whole steps and what comes between them, too.
    """
    start = len(whole) - len(resumed)
    assert 0 <= start <= len(killed)
    assert first_difference(killed, whole[: len(killed)], "killed") is None
    assert first_difference(resumed, whole[start:], "resumed") is None
    twice = whole[start : len(killed)]
    assert sum(record.get("has_stepped", False) for record in twice) <= (SAVED_EVERY if signal == "SIGKILL" else 0)
    assert signal == "SIGKILL" or len(twice) < 2 or twice[0]["event"] != "validation"
