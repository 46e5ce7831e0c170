"""The newest state of a fit, always under the same name."""

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from typing_extensions import override

from cola_lightning.errors import Interruption, UserError


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt``, the newest state of a fit, from which an interrupted fit resumes.

    It is written after the first optimizer step, after each epoch and each validation inside one, after a signal to ``cola
    fit`` and, on one process, after a failure; the state of a failed optimizer step is not written. The command line includes
    it as the group ``last``.
    (ModelCheckpoint's ``save_last`` writes only together with a checkpoint that its ``monitor`` selects, its
    ``save_on_exception`` also halfway through a step.)

    Args:
        every_n_train_steps: Also write it after every N optimizer steps.
        train_time_interval: Also write it whenever this much time has passed: ``0:10:00`` is ten minutes.
    """

    def __init__(self, every_n_train_steps: int | None = None, train_time_interval: timedelta | None = None) -> None:
        when: dict[str, Any] = {"every_n_train_steps": every_n_train_steps, "train_time_interval": train_time_interval}
        super().__init__(filename=self.CHECKPOINT_NAME_LAST, enable_version_counter=False, **when)
        self._first_step: int | None = None  # of the training that has begun
        self._is_written = False  # in that training
        self._stepping_batch: int | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._first_step = self._stepping_batch = None
        # Last, so that ckpt_path="best" uses another callback, whose state is stored as it is after the same validation.
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_step, self._is_written = trainer.global_step, False

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:  # noqa: D102
        self._stepping_batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        # Early, so that a run that is killed soon resumes, and is not taken for the run before it.
        if not self._is_written and self._first_step is not None and trainer.global_step > self._first_step:
            self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._write(trainer)  # again: the module has the averages from here on
        self._first_step = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        is_alone = trainer.world_size == 1 or isinstance(exception, Interruption)  # else other processes may not get here
        loop = trainer.fit_loop.epoch_loop
        batches, rates = loop.batch_progress.total, loop.scheduler_progress.total
        is_in_step = batches.ready == self._stepping_batch and batches.processed < batches.ready  # type: ignore[attr-defined]
        # Between the two, the weights are those after the step, and the learning rate is not.
        is_halfway = is_in_step or rates.completed < rates.ready
        is_refused = isinstance(exception, UserError) and trainer.global_step == self._first_step  # nothing was trained
        if self._first_step is None or is_refused or is_halfway or not is_alone:
            return
        try:
            self._write(trainer)
        except Exception as error:  # the first failure is the one to report
            exception.add_note(f"and its last checkpoint could not be written: {error}")

    def _write(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.fast_dev_run or trainer.state.fn != "fit" or trainer.sanity_checking:  # type: ignore[attr-defined]
            return
        path = self.format_checkpoint_name({})  # spelled as ModelCheckpoint does: it removes what it takes for an older file
        trainer.save_checkpoint(path, weights_only=False)
        self.last_model_path = self.best_model_path = path
        self._is_written = True

    on_train_epoch_end = _write

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop.epoch_loop.done:  # else the end of the epoch follows
            self._write(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Nothing: the previous run's paths are not this run's."""
        return {}
