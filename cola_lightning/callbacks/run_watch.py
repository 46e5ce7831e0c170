"""What the command line watches during a run: Ctrl-C and SIGTERM, and whether the run writes anything."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(BaseException):
    """A signal asked the run to stop. Not a KeyboardInterrupt: after that, Lightning ignores a second Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class RunWatch(Callback):
    """Stops a fit where it can be resumed exactly, and removes the folder of a run that wrote nothing.

    After the first Ctrl-C or SIGTERM, a fit finishes the current batch; anything else stops at once. A second signal always
    stops at once, and then nothing more is written.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.log_dir: str | None = None  # of the run's logger
        self._process = os.getpid()
        self._received: int | None = None
        self._is_waited_for = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
            yield
            return
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
        if self._received is not None:
            self._stop_at_once(number)
        self._received = number
        if not self._is_waited_for:
            raise Interruption(number)
        log.warning("%s: stopping after this batch; once more stops at once", signal.Signals(number).name)

    def _stop_at_once(self, number: int) -> None:
        """Ends the process, whatever it is doing: a file that is being written retains its previous content."""
        import rich

        rich.get_console().show_cursor()
        os._exit(128 + number)

    def _stop_if_asked(self, trainer: Trainer, *, everywhere: bool = True) -> None:
        is_asked = self._received is not None
        if trainer.world_size > 1:  # all processes at the same batch, or some would wait for the others forever
            is_asked = everywhere and trainer.strategy.reduce_boolean_decision(is_asked, all=False)
        if is_asked:
            self._is_waited_for = False
            raise Interruption(self._received or signal.SIGTERM)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.has_begun = self._is_waited_for = True
        is_requeued = isinstance(getattr(trainer.strategy, "cluster_environment", None), SLURMEnvironment)
        if threading.current_thread() is threading.main_thread() and not is_requeued:
            # Replaces Lightning's handler, after which a fit ends with status 0; Lightning restores ours after the fit.
            signal.signal(signal.SIGTERM, self._handle)

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._stop_if_asked(trainer)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._stop_if_asked(trainer, everywhere=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_waited_for = False

    def remove_empty_folder(self) -> None:
        """Removes the run's folder, and those around it, if nothing is in them: a run that was refused, for example."""
        if self.log_dir is not None:
            with contextlib.suppress(OSError):
                os.removedirs(self.log_dir)
