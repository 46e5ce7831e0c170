"""What the command line wants to know of a run after it has ended."""

import contextlib
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override


class RunWatch(Callback):
    """Remembers why a run ended: Lightning exits with 1 after Ctrl-C, and with 0 after SIGTERM. And which folders it made."""

    def __init__(self) -> None:
        self.exit_status = 0
        self.folders: list[Path] = []

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.exit_status = 130
        elif isinstance(exception, SIGTERMException):
            self.exit_status = 143

    def expect_folder(self, folder: str | Path) -> None:
        """Takes note of a folder that a logger will make: it, and those of its parents that are not there yet."""
        path = Path(folder).absolute()
        self.folders += [part for part in (path, *path.parents) if not part.exists()]

    def remove_empty_folders(self) -> None:
        """Takes back what was made for a run that was refused; a folder that holds anything stays."""
        for folder in sorted(self.folders, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
