"""One run of a study: its folder, which process executes it, and what that does: a fit, then validation and test.

The folders are all that processes know of each other, on one machine or on several with a shared disk. A run is finished
if its folder has a ``result.json``, executed if it has the claim of a living process, and otherwise free.
"""

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from cola_lightning.callbacks.command import RunWatch
from cola_lightning.chain.base import base_values, fingerprint_of
from cola_lightning.cli.training import COLACLI
from cola_lightning.errors import NonFiniteError, UserError
from cola_lightning.module import COLAModule
from cola_lightning.study.results import Result, write

log = logging.getLogger(__name__)

OPTIONS, LOG, RESULT = "run.json", "log.txt", "result.json"
TOUCH_EVERY, DEAD_AFTER = 1.0, 600.0  # seconds


def claim_run(folder: Path) -> Path | None:
    """Claims a run for this process; returns the claim, a file, or None if it is finished or another process executes it.

    Only one process can create the file of the next number. An abandoned claim stays: if it had to be removed first, the slower
    of two processes would remove the new claim of the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims = list(folder.glob("claim.*"))
    if any(map(_is_alive, claims)):
        return None
    claim = folder / f"claim.{1 + max((int(other.suffix[1:]) for other in claims), default=0)}"
    try:
        with claim.open("x") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}")
    except FileExistsError:
        return None
    if (folder / RESULT).exists():  # its process has removed its claim
        claim.unlink()
        return None
    return claim


def _is_alive(claim: Path) -> bool:
    """Whether a claim's process lives: it touches its claim, and one of this machine can be looked for."""
    try:
        host, _, process = claim.read_text(encoding="utf-8").partition(" ")
        if host == socket.gethostname():
            with contextlib.suppress(PermissionError):  # another user's
                os.kill(int(process), 0)
        return time.time() - claim.stat().st_mtime < DEAD_AFTER
    except (FileNotFoundError, ProcessLookupError):
        return False


def execute(claim: Path, options: Mapping[str, Any], command: str = "compare") -> bool:
    """Executes a claimed run in a process of its own, and returns whether it has a result.

    So its peak memory is its own, and if it is killed the study goes on. A run that was stopped before resumes from its last
    checkpoint, if it has the same options.

    Args:
        claim: of this process.
        options: see :func:`run`.
        command: the subcommand of ``cola`` that executes a run if it gets ``--run`` and the run's folder.

    Raises:
        UserError: if the run refuses its arguments, which ends the study: it is the config, or one of its methods.
    """
    folder = claim.parent
    text, path = json.dumps(options, indent=1), folder / OPTIONS
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of another run
        path.write_text(text, encoding="utf-8")
    with (folder / LOG).open("w") as output:
        words = [sys.executable, "-m", "cola_lightning", command, "--run", str(folder)]
        # In a session of its own: the terminal's Ctrl-C goes to this process alone, which then stops the run by one signal.
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None:
            os.utime(claim)
            time.sleep(TOUCH_EVERY)
    finally:
        process.terminate()  # it finishes its batch, and writes its state
        process.wait()
    if process.returncode == 2:
        text = (folder / LOG).read_text(encoding="locale", errors="replace")
        raise UserError([f"a run was refused, see {folder / LOG}", *re.findall("^error: (.*)", text, re.MULTILINE)][-1])
    return (folder / RESULT).exists()


# ---------------------------------------------------------------------- in the process of a run


class ChildWatch(RunWatch):
    """Watches a fit as ``cola fit`` does, and ends it if the process that began it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.parent = os.getppid()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if os.getppid() != self.parent:  # another process may begin this run anew
            os._exit(1)
        super().on_train_batch_end(trainer)


class Recorder(ChildWatch):
    """A :class:`ChildWatch` that records what a study needs of a fit.

    Args:
        metric: the validation metric's name.

    Attributes:
        facts: fields of the run's Result. They are in its checkpoints, for the process that resumes it.
    """

    validates_at_end = False

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric
        self.facts: dict[str, Any] = {"steps": 0, "seconds": 0.0, "curve": []}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["study"] = self.facts  # a state_dict would have Lightning warn wherever this callback is missing

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.facts = checkpoint["study"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        _check_measurable(trainer)
        assert isinstance(pl_module, COLAModule)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.facts["trainable_parameters"] = sum(parameter.numel() for group in groups for parameter in group["params"])
        if not pl_module.run.is_sharded and "base" not in self.facts:  # of a run that resumes, whose base has links merged
            self.facts["base"] = fingerprint_of(base_values(pl_module.model))
        self._started_at = time.perf_counter() - self.facts["seconds"]

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.facts |= {"steps": trainer.global_step, "seconds": time.perf_counter() - self._started_at}
        super().on_train_batch_end(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.facts["seconds"] = time.perf_counter() - self._started_at

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        check_logged(self.metric, trainer.callback_metrics)  # also in the sanity check, before any time is lost
        if not trainer.sanity_checking:
            self.facts["curve"].append((trainer.global_step, float(trainer.callback_metrics[self.metric])))


def run(folder: str) -> int:
    """Fits, validates and tests, and writes the run's result.

    Args:
        folder: the run's. Its ``run.json`` has ``words``, the arguments of ``cola fit``; ``metric``, the validation metric's
            name, ``val_...`` (the test metric's is ``test_...``); and ``result``, the fields of the Result that are known.

    Returns:
        The exit status.

    Raises:
        UserError: if the run has no such metric.
    """
    options = json.loads((Path(folder) / OPTIONS).read_text(encoding="utf-8"))
    metric, test_metric, facts = options["metric"], f"test_{options['metric'].removeprefix('val_')}", options["result"]
    warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")  # the log is in it
    recorder, cli, words = Recorder(metric), None, options["words"]
    if (last := Path(folder) / "checkpoints" / "last.ckpt").exists():
        words += ["--ckpt_path", str(last)]
    with recorder.listening():
        try:
            cli = COLACLI(["fit", *words], recorder)
        except NonFiniteError as error:
            log.warning("diverged: %s", error)
        facts |= recorder.facts | {"peak_memory": _peak_memory()}
        found: dict[str, float | None] = dict.fromkeys((metric, test_metric))
        if cli is not None:
            module, trainer, arguments = cli.model, cli.trainer, {"datamodule": cli.datamodule, "verbose": False}
            if module.lora_config.target_modules is not None:
                links = module.full_chain().links
                knots = [link.end_step for link in links[:-1]]
                facts |= {"rank": max(link.rank for link in links), "links": len(links), "knots": knots}
            savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
            best_paths = [saver.best_model_path for saver in savers if saver.monitor is not None]
            arguments["ckpt_path"] = next(filter(None, best_paths), None)  # the best; None: what is in memory
            loader_metrics = [*trainer.validate(module, **arguments), *trainer.test(module, **arguments)]
            found = {name: value for metrics in loader_metrics for name, value in metrics.items()}
    for name in (metric, test_metric):
        check_logged(name, found)
    result = Result(**facts, validation=found[metric], test=found[test_metric])
    rank_zero_only(write)([result], Path(folder) / RESULT)
    return 0


def check_logged(metric: str, found: Mapping[str, Any]) -> None:
    """Refuses a metric that a run does not log."""
    if metric not in found:
        raise UserError(f"metric: {metric} is not logged. Logged are {', '.join(sorted(found))}")


def _check_measurable(trainer: Trainer) -> None:
    """Refuses a run that could not be validated and tested, and one that ends before the step by which methods divide it."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not sum(trainer.num_val_batches) or trainer.limit_test_batches == 0 or not getattr(data, "can_be_tested", True):
        raise UserError("data: methods are compared by validation and test rows, of which one is missing. Set data.test_size.")
    if (steps := trainer.estimated_stepping_batches) < trainer.max_steps:
        raise UserError(
            f"trainer.max_steps: must be at most {steps}, got {trainer.max_steps}. trainer.max_epochs ends a run there, but "
            "methods divide it into links by max_steps"
        )


def _peak_memory() -> float:
    """Peak memory in MB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return held / 1e6
    if sys.platform == "linux":  # where getrusage's peak is at least that of the process that began this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in bytes on macOS
