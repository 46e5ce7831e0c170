"""The newest state of a fit, always under the same name."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from cola_lightning.callbacks.run_watch import Interruption
from cola_lightning.errors import UserError


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt``, the newest state of a fit, from which an interrupted fit resumes.

    It is written after each epoch and each validation, and when the fit is interrupted or fails; the state of a failed
    optimizer step is not written. The command line includes it as the group ``last``. (ModelCheckpoint's ``save_last`` writes
    only together with a checkpoint that its ``monitor`` selects, its ``save_on_exception`` also halfway through a step.)

    Args:
        every_n_train_steps: also write it after every n optimizer steps.
        train_time_interval: also write it when this much time has passed since the last write: ``0:10:00`` is ten minutes.

    Raises:
        UserError: for invalid values.
    """

    def __init__(self, every_n_train_steps: int | None = None, train_time_interval: timedelta | None = None) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise UserError(f"last.every_n_train_steps: expected a whole number of at least 1, received {every_n_train_steps}")
        super().__init__(filename=self.CHECKPOINT_NAME_LAST, enable_version_counter=False)
        self.every_n_train_steps, self.interval = every_n_train_steps, train_time_interval
        self._is_in_training = False
        self._stepping_batch: int | None = None
        self._written_at = 0.0
        self._first_step = self._step_written = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._is_in_training = False
        # Last, so that ckpt_path="best" uses another callback.
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ when

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_in_training, self._stepping_batch = True, None
        self._written_at, self._first_step = time.monotonic(), trainer.global_step
        self._step_written = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:  # noqa: D102
        self._stepping_batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step, every = trainer.global_step, self.every_n_train_steps
        is_due = every is not None and step % every == 0 and step != self._step_written
        if self.interval is not None:
            is_due |= bool(trainer.strategy.broadcast(time.monotonic() - self._written_at >= self.interval.total_seconds()))
        if is_due:
            self._write(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_in_training = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        is_alone = trainer.world_size == 1 or isinstance(exception, Interruption)  # else other processes may not get here
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        is_halfway = batches.ready == self._stepping_batch and batches.processed < batches.ready
        is_refused = isinstance(exception, UserError) and trainer.global_step == self._first_step  # nothing was trained
        if not self._is_in_training or is_refused or is_halfway or not is_alone:
            return
        try:
            self._write(trainer)
        except Exception as error:  # the first failure is the one to report
            exception.add_note(f"and its last checkpoint could not be written: {error}")

    # ------------------------------------------------------------------ what

    def _write(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = str(Path(str(self.dirpath)) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        trainer.save_checkpoint(path, weights_only=False)
        self._written_at, self._step_written = time.monotonic(), trainer.global_step
        self.last_model_path = self.best_model_path = path

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load: the previous run's paths are not this run's."""
