"""One run of a study: a fit, then validation and test."""

import contextlib
import logging
import resource
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from cola_lightning.callbacks.command import RunWatch
from cola_lightning.chain.base import base_values, fingerprint_of
from cola_lightning.cli.training import MadeRun
from cola_lightning.errors import NonFiniteError, UserError
from cola_lightning.module import COLAModule
from cola_lightning.study.results import Result

log = logging.getLogger(__name__)


class Recorder(RunWatch):
    """A :class:`RunWatch` that records what a study needs of a fit.

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


def measured(config: Mapping[str, Any], folder: Path, metric: str, known: Mapping[str, Any]) -> Result:
    """Fits, validates and tests.

    Args:
        config: the complete configuration of the fit.
        folder: the run's.
        metric: the validation metric's name, ``val_...``; the test metric's is ``test_...``.
        known: the fields of the Result that are known.

    Returns:
        The run's result.

    Raises:
        UserError: if the run has no such metric.
    """
    recorder, is_finite = Recorder(metric), True
    _begin_peak_memory()
    warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")  # of a run that was stopped
    made = MadeRun(config, watch=recorder, folder=folder)
    try:
        made.fit()
    except NonFiniteError as error:
        log.warning("diverged: %s", error)
        is_finite = False
    facts = {**known, **recorder.facts, "peak_memory": _peak_memory()}
    found: dict[str, float | None] = dict.fromkeys((metric, test_metric := f"test_{metric.removeprefix('val_')}"))
    if is_finite:
        module, trainer = made.model, made.trainer
        if module.lora_config.target_modules is not None:
            links = module.full_chain().links
            knots = [link.end_step for link in links[:-1]]
            facts |= {"rank": max(link.rank for link in links), "links": len(links), "knots": knots}
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        best_paths = [saver.best_model_path for saver in savers if saver.monitor is not None]
        best = next(filter(None, best_paths), None)  # None: what is in memory
        arguments = {"datamodule": made.datamodule, "verbose": False, "ckpt_path": best}
        with recorder.listening():
            loader_metrics = [*trainer.validate(module, **arguments), *trainer.test(module, **arguments)]
        found = {name: value for metrics in loader_metrics for name, value in metrics.items()}
    for name in (metric, test_metric):
        check_logged(name, found)
    return Result(**facts, validation=found[metric], test=found[test_metric])


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


def _begin_peak_memory() -> None:
    """Forgets the peak of the runs before this one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # of another system than Linux
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak_memory() -> float:
    """Peak memory in MB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return held / 1e6
    if sys.platform == "linux":  # where getrusage's peak is that of all runs
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in bytes on macOS
