"""Checkpoints that are written atomically, so that no name refers to half a file, and checked for damage when read."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.utils.serialization import config
from typing_extensions import override

from cola_lightning.chain.checkpoint import OpenedCheckpoint, read_archive
from cola_lightning.errors import causes
from cola_lightning.writing import whole_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint to disk beside its destination, then renames it in one step; refuses to read damaged ones.

    Lightning writes to the system's temporary folder first, which is often another file system, so that its move is a copy.

    Args:
        opened: a checkpoint that was read already, for its path.
    """

    def __init__(self, opened: OpenedCheckpoint | None = None) -> None:
        super().__init__()
        self.opened = opened

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        # Without checksums, which a user may have turned off, it would be refused when read.
        with config.patch("save.compute_crc32", True):  # type: ignore[attr-defined]  # of torch's config modules
            if storage_options is not None or "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            with whole_file(Path(path)) as partial, partial.open("wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # torch's own, for a full disk, too
                    raise next((cause for cause in causes(error) if isinstance(cause, OSError)), error) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if self.opened is not None and self.opened.path == str(path) and (contents := self.opened.take()):
            return contents
        # Lightning's default unpickles what is at a URL
        checkpoint: dict[str, Any] = read_archive(path, weights_only=weights_only is not False)
        return checkpoint
