"""Ctrl-C and SIGTERM: a fit stops where it can be resumed exactly."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(SystemExit):
    """A signal asked the run to stop: exit status 130 or 143. After a KeyboardInterrupt Lightning ignores a second Ctrl-C."""


class RunWatch(Callback):
    """Handles signals: after the first, a fit finishes the current batch; anything else stops at once.

    A second signal always stops at once, and then nothing more is written. (After Lightning's own handling a fit ends with
    status 0, Ctrl-C may come in the middle of an optimizer step, and processes may stop at different batches.)

    Attributes:
        validates_at_end: whether the fit it watches does; a study validates after it.
    """

    validates_at_end = True

    def __init__(self) -> None:
        self.log_dir: str | None = None  # of the run's logger
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
        log.warning("%s: stopping after this batch; once more stops at once", signal.Signals(number).name)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_waited_for = True
        signal.signal(signal.SIGTERM, self._handle)  # until Lightning restores it after the fit, in place of its own

    def _stop_if_asked(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        is_asked = self._received is not None
        if trainer.world_size > 1:  # all processes at the same batch, or some would wait for the others forever
            is_asked = trainer.strategy.reduce_boolean_decision(is_asked, all=False)
        if is_asked:
            raise Interruption(128 + (self._received or signal.SIGTERM))

    on_train_batch_end = on_train_epoch_end = _stop_if_asked

    @override
    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.world_size == 1:  # processes may have different numbers of these batches
            self._stop_if_asked(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_waited_for = False

    def remove_empty_folder(self) -> None:
        """Removes the run's folder, and those around it, if nothing is in them: a run that was refused, for example."""
        if self.log_dir is not None:
            with contextlib.suppress(OSError):
                os.removedirs(self.log_dir)
