"""One run of a study: an ordinary fit, then validation and test of the final model.

It has a process of its own, so that its peak memory is its own, and so that a run that is killed does not end the study.
"""

import difflib
import json
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.callbacks import RunWatch
from cola_lightning.chain.base import fingerprint_of
from cola_lightning.chain.schedule import START
from cola_lightning.cli.training import COLACLI
from cola_lightning.errors import NonFiniteError, UserError
from cola_lightning.lora.layer import names_of_factors
from cola_lightning.module import COLAModule
from cola_lightning.module.run import run_length

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]

REPORT_EVERY = 0.5  # seconds


class Recorder(Callback):
    """Records what a study needs of a fit, and reports its progress.

    Args:
        metric: the validation metric's name.
        report: called with ``{"done": share of the run}``, and with a ``{"warning": text}``.
    """

    def __init__(self, metric: str, report: Report) -> None:
        self.metric, self.report = metric, report
        self.curve: list[tuple[int, float]] = []
        self.steps, self.trainable_parameters, self.seconds, self._reported_at = 0, 0, 0.0, 0.0
        self._has_warned = False
        self.base: str | None = None

    def facts(self) -> dict[str, Any]:
        """The recorded values, as a Result's fields."""
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "peak_memory": _peak_memory(),
            "trainable_parameters": self.trainable_parameters,
            "curve": self.curve,
            "base": self.base,
        }

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_measurable(trainer, pl_module)
        _check_length(trainer)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.trainable_parameters = sum(parameter.numel() for group in groups for parameter in group["params"])
        self.base = _fingerprint(pl_module)
        self._started_at = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps, self.seconds = trainer.global_step, time.perf_counter() - self._started_at
        if self.seconds - self._reported_at > REPORT_EVERY:
            self._reported_at = self.seconds
            self.report({"done": _share_done(trainer)})

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        logged = trainer.callback_metrics
        if self.metric not in logged:  # that of generated answers is only computed after the fit
            self._warn_of_name(logged)
        elif not trainer.sanity_checking:
            self.curve.append((trainer.global_step, float(logged[self.metric])))

    def _warn_of_name(self, logged: Collection[str]) -> None:
        """Reports early what may be a typing error; what is no metric at all is known only after the fit."""
        near = difflib.get_close_matches(self.metric, logged, n=1, cutoff=0.8)
        if near and not self._has_warned:
            self._has_warned = True
            meant = f"is {near[0]} meant? Without {self.metric} after the fit, the study ends there"
            self.report({"warning": f"metric: a validation logged no {self.metric}; {meant}"})

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._started_at


class RunCLI(COLACLI):
    """``cola fit`` with one more callback."""

    def __init__(self, words: Sequence[str], watch: RunWatch, recorder: Recorder) -> None:
        self.recorder = recorder
        super().__init__(words, watch)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self.recorder)  # type: ignore[attr-defined]
        return trainer


def run(words: Sequence[str], metric: str, report: Report) -> int:
    """Fits, validates and tests, and reports the result.

    Args:
        words: the arguments of ``cola fit``.
        metric: the validation metric's name, ``val_...``; the test metric's is ``test_...``.
        report: called with ``{"done": share of the run}``, ``{"warning": text}`` and, at the end, ``{"result": fields of a
            Result}``.

    Returns:
        The exit status.

    Raises:
        UserError: if the run has no such metric.
    """
    watch, recorder = RunWatch(), Recorder(metric, report)
    # Lightning's warning that the process's own arguments are not used.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended to run from within Python")
    with watch.listening():
        try:
            cli = RunCLI(["fit", *words], watch, recorder)
        except NonFiniteError as error:
            log.warning("diverged: %s", error)
            report({"result": recorder.facts() | {"validation": None, "test": None}})
            return 0
        finally:
            watch.remove_empty_folder()
        module, trainer, facts = cli.model, cli.trainer, recorder.facts()
        assert isinstance(module, COLAModule)
        if module.target_modules is not None:
            links = module.full_chain().links
            knots = [link.start_step for link in links[1:]]
            facts |= {"rank": max(link.rank for link in links), "links": len(links), "knots": knots}
        validated = _merged(trainer.validate(module, datamodule=cli.datamodule, verbose=False))
        tested = _merged(trainer.test(module, datamodule=cli.datamodule, verbose=False))
        of_test = f"test_{metric.removeprefix('val_')}"
        for name, found in {metric: validated, of_test: tested}.items():
            if name not in found:
                logged = ", ".join(sorted(found)) or "a metric that the model logs"
                raise UserError(f"metric: expected one of {logged}, received {name}")
        report({"result": facts | {"validation": validated[metric], "test": tested[of_test]}})
    return 0


def main(asked: str) -> int:
    """The entry point of a run's process.

    Args:
        asked: JSON: ``words``, ``metric``, and ``report``, the file descriptor to which reports are written.
    """
    given = json.loads(asked)

    @rank_zero_only
    def report(facts: dict[str, Any]) -> None:
        os.write(given["report"], (json.dumps(facts) + "\n").encode())  # if the study has died, a broken pipe ends its run

    return run(given["words"], given["metric"], report)


def _merged(of_loaders: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What Lightning returns for each loader, as one."""
    return {name: value for found in of_loaders for name, value in found.items()}


def _check_measurable(trainer: Trainer, module: LightningModule) -> None:
    """Refuses a run that could be trained, and then not be validated or tested."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    limits = {"validation": trainer.limit_val_batches, "test": trainer.limit_test_batches}
    for stage, limit in limits.items():
        loader = f"{stage.removesuffix('idation')}_dataloader"
        has_rows = limit != 0 and (is_overridden(loader, module) or (data is not None and is_overridden(loader, data)))
        has_rows = has_rows and (stage == "validation" or getattr(data, "can_be_tested", True))
        if not (has_rows and is_overridden(f"{stage}_step", module)):
            raise UserError(
                f"data: expected rows and a {stage}_step for {stage}, as methods are compared by validation and test, "
                "received none"
            )


def _check_length(trainer: Trainer) -> None:
    """Refuses a run that ends before ``max_steps``, by which a study counts and divides it."""
    if (steps := run_length(trainer, START).end_step) < trainer.max_steps:
        raise UserError(
            f"trainer.max_steps: expected at most {steps:.0f}, where trainer.max_epochs: {trainer.max_epochs} ends a run, as "
            f"methods divide it into links by max_steps, received {trainer.max_steps}"
        )


def _fingerprint(module: LightningModule) -> str | None:
    """That of the weights without the first link's; None if they are sharded."""
    if not isinstance(module, COLAModule) or module.is_sharded:
        return None
    state, factors = layout.state_dict(module.model), names_of_factors(module.model)
    values = {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in factors}
    return fingerprint_of(values)


def _share_done(trainer: Trainer) -> float:
    if (trainer.max_steps or -1) > 0:
        return min(1.0, trainer.global_step / trainer.max_steps)
    epochs = trainer.max_epochs or 1
    return min(1.0, (trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches) / epochs)


def _peak_memory() -> float:
    """Peak memory in MB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return held / 1e6
    status = Path("/proc/self/status")  # on Linux; getrusage's peak is there at least that of the process that began this one
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # macOS reports bytes
