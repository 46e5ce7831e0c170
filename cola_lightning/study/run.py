"""One run of a study: a fit, then validation and test."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from cola_lightning.callbacks.command import RunWatch
from cola_lightning.chain.base import base_values, fingerprint_of
from cola_lightning.cli.made_run import MadeRun
from cola_lightning.errors import NonFiniteError, UserError
from cola_lightning.module.module import COLAModule
from cola_lightning.study.results import Result, RunKey

log = logging.getLogger(__name__)


class Recorder(RunWatch):
    """A :class:`RunWatch` that records what a study needs of a fit.

    Args:
        metric: the validation metric's name.

    Attributes:
        curve: the optimizer step and the metric, at each validation.
        base: a hash of the weights before the first step.
    """

    validates_at_end = False

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric, self.base, self.curve = metric, cast(str | None, None), list[tuple[int, float]]()
        self._started_at = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since training began, with those of the processes that trained the run before this one."""
        return time.perf_counter() - self._started_at

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A state_dict would have Lightning warn wherever this callback is missing.
        checkpoint["study"] = {"base": self.base, "curve": self.curve, "seconds": self.seconds}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        known = checkpoint["study"]
        self.base, self.curve = known["base"], known["curve"]
        self._started_at = time.perf_counter() - known["seconds"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        _check_measurable(trainer)
        assert isinstance(pl_module, COLAModule)
        if trainer.global_step == 0:
            self._started_at = time.perf_counter()
            self.base = None if pl_module.run.is_sharded else fingerprint_of(base_values(pl_module.model))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            check_logged(self.metric, trainer.callback_metrics)  # also in the sanity check, before any time is lost
            if not trainer.sanity_checking:
                self.curve.append((trainer.global_step, float(trainer.callback_metrics[self.metric])))


def measured(config: Mapping[str, Any], folder: Path, metric: str, key: RunKey) -> Result:
    """Fits, validates and tests.

    Args:
        config: the complete configuration of the fit.
        folder: the run's.
        metric: the validation metric's name, ``val_...``; the test metric's is ``test_...``.
        key: the run's parameters in its study.

    Raises:
        UserError: if the run has no such metric.
    """
    recorder, test_metric = Recorder(metric), f"test_{metric.removeprefix('val_')}"
    found: dict[str, float | None] = {metric: None, test_metric: None}
    is_finite = True
    made = MadeRun(config, watch=recorder, folder=folder)
    module, trainer = made.model, made.trainer
    try:
        made.fit()
    except NonFiniteError as error:
        log.warning("diverged: %s", error)
        is_finite = False
    links = module.full_chain().links
    facts: dict[str, Any] = {"rank": max((link.rank for link in links), default=None), "links": len(links)}
    facts |= {"knots": [link.end_step for link in links[:-1]], "steps": trainer.global_step, "seconds": recorder.seconds}
    facts |= {"curve": recorder.curve, "base": recorder.base}
    facts["trainable_parameters"] = sum(values.numel() for values in module.parameters() if values.requires_grad)
    if is_finite:
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        best = next(filter(None, (saver.best_model_path for saver in savers if saver.monitor is not None)), None)
        arguments = {"datamodule": made.datamodule, "verbose": False, "ckpt_path": best}  # None: what is in memory
        with recorder.listening():
            loader_metrics = [*trainer.validate(module, **arguments), *trainer.test(module, **arguments)]
        found = {name: value for metrics in loader_metrics for name, value in metrics.items()}
    for name in (metric, test_metric):
        check_logged(name, found)
    return Result(**key._asdict(), **facts, validation=found[metric], test=found[test_metric])


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
        raise UserError(f"trainer.max_steps: must be at most {steps}, where max_epochs ends the run, got {trainer.max_steps}")
