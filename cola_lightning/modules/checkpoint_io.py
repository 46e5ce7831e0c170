"""Checkpoints that are written atomically, so that no name refers to half a file, and checked for damage when read."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch.serialization import get_crc32_options, set_crc32_options
from typing_extensions import override

from cola_lightning.chain.checkpoint import check_archive, unreadable
from cola_lightning.errors import causes
from cola_lightning.modules.pending import pending_checkpoint
from cola_lightning.writing import whole_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint to disk beside its destination, then renames it in one step; refuses to read damaged ones.

    Lightning writes to the system's temporary folder first, which is often another file system, so that its move is a copy.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with _checksums():
            if storage_options is not None or "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            with whole_file(Path(path)) as partial:
                _save(checkpoint, partial)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        pending = pending_checkpoint()
        is_open = pending is not None and "://" not in str(path) and pending.opened.path == Path(path)
        if pending is not None and is_open and (contents := pending.opened.take()):  # already read and checked
            return contents
        if get_filesystem(path).exists(path):  # else Lightning reports it
            check_source(path)
        with unreadable_as_user_error(path):  # Lightning's default unpickles what is at a URL
            return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)


@contextmanager
def unreadable_as_user_error(source: Any) -> Iterator[None]:
    """A UserError of one line for an archive that zipfile can read and torch cannot."""
    try:
        yield
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise unreadable(str(source), "checkpoint", error) from error


def check_source(source: Any) -> None:
    """Checks the bytes of a checkpoint: a path, a URL, or an open file, whose position does not change.

    A checkpoint at an HTTP URL is not checked: Lightning downloads it by itself.

    Raises:
        UserError: for a damaged checkpoint.
    """
    if not isinstance(source, str | PathLike):
        place = source.tell()
        check_archive(source)
        source.seek(place)
    elif "://" not in str(source):
        check_archive(str(source))
    elif not str(source).startswith("http"):
        with get_filesystem(str(source)).open(str(source), "rb") as file:
            check_archive(file, name=str(source))


def check_read_by_other(io: CheckpointIO, source: str | Path) -> None:
    """Checks the bytes of a file that a CheckpointIO other than ours has read, if they are a zip archive at all.

    Raises:
        UserError: for a damaged checkpoint.
    """
    if not isinstance(io, AtomicCheckpointIO) and "://" not in str(source) and zipfile.is_zipfile(source):
        check_source(source)


@contextmanager
def _checksums() -> Iterator[None]:
    """Has ``torch.save`` write checksums, whatever the user has set: damage could not be detected without them."""
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(before)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """``torch.save``, with the system's error if the disk is full: torch raises its own instead."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        raise next((cause for cause in causes(error) if isinstance(cause, OSError)), error) from error
