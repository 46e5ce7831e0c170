"""Writing checkpoints so that a name never stands for half a file."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from typing_extensions import override

from cola_lightning.errors import causes
from cola_lightning.writing import whole_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place, to disk, and then moves it there in one step.

    Lightning writes to the system's temporary folder first, which is often another file system, so that its move is a copy.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(Path(path)) as partial:
            _save(checkpoint, partial)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """``torch.save``, with the system's error where the disk is full: torch raises one of its own in its place."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        raise next((cause for cause in causes(error) if isinstance(cause, OSError)), error) from error
