"""What the command line watches during a run: Ctrl-C and SIGTERM, and the folders that the run creates."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import override

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(BaseException):
    """A signal asked the run to stop. Not a KeyboardInterrupt: after that, Lightning ignores a second Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class RunWatch(Callback):
    """Stops a fit where it can be resumed exactly, and removes the folders of a run that wrote nothing.

    After the first Ctrl-C or SIGTERM, a fit finishes the current batch; anything else stops at once. A second signal always
    stops at once, and then nothing more is written.
    """

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.has_begun = False
        self._process = os.getpid()
        self._received: int | None = None
        self._is_waited_for = False
        self._patience: dict[EarlyStopping, int] = {}

    # ------------------------------------------------------------------ signals

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
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stoppers = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
        self._patience = {callback: callback.patience for callback in stoppers}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback, patience in self._patience.items():  # EarlyStopping restores the checkpoint's, not the requested one
            callback.patience = patience
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

    # ------------------------------------------------------------------ folders

    def expect_folder(self, folder: str | Path) -> None:
        """Records a folder that a logger will create, and those of its parents that do not exist yet."""
        path = Path(folder).absolute()
        self.folders += [part for part in (path, *path.parents) if not part.exists()]

    def remove_empty_folders(self) -> None:
        """Removes the recorded folders of a run that wrote nothing; a folder with contents stays."""
        for folder in sorted(self.folders, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
