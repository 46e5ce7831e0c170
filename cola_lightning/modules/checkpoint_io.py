"""Checkpoints that are written so that a name never stands for half a file, and read so that damage is seen."""

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
    """Writes a local checkpoint beside its place, to disk, and then moves it there in one step; reads none that is damaged.

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
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        pending = pending_checkpoint()
        is_open = pending is not None and "://" not in str(path) and pending.opened.path == Path(path)
        if pending is not None and is_open and (contents := pending.opened.take()):  # it is read and checked
            return contents
        if get_filesystem(path).exists(path):  # else Lightning says so
            check_source(path)
        with unreadable_as_user_error(path):
            return super().load_checkpoint(path, *args, **kwargs)


@contextmanager
def unreadable_as_user_error(source: Any) -> Iterator[None]:
    """One line for an archive that zipfile can read and torch cannot."""
    try:
        yield
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise unreadable(str(source), "checkpoint", error) from error


def check_source(source: Any) -> None:
    """Checks the bytes of a checkpoint: a path, an address, or an open file, which stays where it is.

    One that is downloaded over HTTP is not checked: Lightning does that by itself.

    Raises:
        UserError: for one that is damaged.
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
        UserError: for one that is damaged.
    """
    if not isinstance(io, AtomicCheckpointIO) and "://" not in str(source) and zipfile.is_zipfile(source):
        check_source(source)


@contextmanager
def _checksums() -> Iterator[None]:
    """Has ``torch.save`` write them whatever the user has set: else damage could not be seen."""
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(before)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """``torch.save``, with the system's error where the disk is full: torch raises one of its own in its place."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        raise next((cause for cause in causes(error) if isinstance(cause, OSError)), error) from error
