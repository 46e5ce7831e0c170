"""The callbacks of the command line alone: for signals and short fits, the configuration next to the checkpoints, progress."""

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import rich
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from cola_lightning.callbacks.run_folder import run_folder
from cola_lightning.errors import Interruption

log = logging.getLogger(__name__)

SECONDS = 30  # between two lines of a fit

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunWatch(Callback):
    """Handles signals, and shows the losses of short fits.

    After the first signal, a fit finishes the current batch; anything else stops at once. A second signal always stops at once,
    and then nothing more is written. (After Lightning's own handling a fit ends with status 0, Ctrl-C may come in the middle of
    an optimizer step, and processes may stop at different batches.)

    A fit is logged at its end, and validates there. (Lightning logs every 50th step, and validates after an epoch or an
    interval, so a fit of twelve steps would leave no loss.)

    Attributes:
        validates_at_end: whether the fit it watches does; a study validates after it.
    """

    validates_at_end = True

    def __init__(self) -> None:
        self._process = os.getpid()
        self._received: int | None = None
        self._is_waited_for = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block; only the main thread may."""
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker, forked with this handler: a Ctrl-C in the terminal is not for it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self._received is not None:  # a file that is being written retains its previous content
            rich.get_console().show_cursor()
            os._exit(128 + number)
        self._received = number
        if not self._is_waited_for:
            raise Interruption(128 + number)
        log.warning("%s: stopping after this batch. A second signal stops at once", signal.Signals(number).name)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._is_waited_for = True
        signal.signal(signal.SIGTERM, self._handle)  # until Lightning restores it after the fit, in place of its own

    @override
    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        is_last_step = trainer.global_step + 1 == trainer.max_steps or (trainer.is_last_batch and is_last_epoch)
        if self.validates_at_end and is_last_step:
            trainer.should_stop = True  # which it does in any case: Lightning logs such a step, and validates after it
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1

    def _stop_if_signalled(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        should_stop = self._received is not None
        if trainer.world_size > 1:  # all processes at the same batch, or some would wait for the others forever
            should_stop = trainer.strategy.reduce_boolean_decision(should_stop, all=False)
        if should_stop:
            raise Interruption(128 + (self._received or signal.SIGTERM))

    on_train_batch_end = on_train_epoch_end = _stop_if_signalled

    @override
    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.world_size == 1:  # processes may have different numbers of these batches
            self._stop_if_signalled(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_waited_for = False


class ConfigSaver(SaveConfigCallback):
    """Saves the run's configuration next to its checkpoints, once it is known to work: when its first epoch starts.

    A fit replaces an existing file; an evaluation, which may use the same folder, leaves the fit's. The checkpoint that the run
    resumed from is omitted: a later command with this configuration would use it in place of the run's own.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def _save(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.sanity_checking or self.already_saved:
            return
        self.already_saved, folder = True, run_folder(trainer)
        path, files = os.path.join(folder, self.config_filename), get_filesystem(folder)
        if trainer.is_global_zero and (trainer.state.fn == "fit" or not files.exists(path)):
            files.makedirs(folder, exist_ok=True)
            config = self.config.clone()
            config.ckpt_path = config.links = None  # another run's: this run's own checkpoints are next to the file
            if "scale" in config:
                config.scale = None
            self.parser.save(config, path, skip_none=False, skip_validation=True, overwrite=True, multifile=self.multifile)

    on_train_batch_start = on_validation_start = on_test_start = on_predict_start = _save


class ProgressLines(ProgressBar):
    """The progress bar where there is no terminal: a log line after the first step, the last one, and now and then between."""

    _shown_at = -math.inf  # seconds

    @override
    def disable(self) -> None:
        """Does nothing: log lines are those of the first process."""

    enable = disable

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        end = length.end_step if (length := pl_module.run.known_length()) is not None else math.inf
        is_new, self._step = trainer.global_step > self._step, trainer.global_step
        if is_new and (self._step == end or time.monotonic() - self._shown_at > SECONDS):
            self._shown_at = time.monotonic()
            metrics = "".join(f", {name} {value:.4g}" for name, value in trainer.progress_bar_metrics.items())
            of = "" if end == math.inf else f" of {end}"
            log.info("step %d%s, link %d, epoch %d%s", self._step, of, pl_module.n_finished, trainer.current_epoch, metrics)
