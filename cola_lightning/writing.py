"""Files and folders that are written atomically.

Both are written next to their destination, under a hidden name, flushed to disk, and then renamed in one step: after a crash or
on a full disk, the previous contents are still there.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from cola_lightning.errors import DiskError, UserError


@contextmanager
def atomic_file(path: Path, *, is_shared: bool = False) -> Iterator[Path]:
    """Yields a path to write to, which becomes the file at the end of the block.

    Args:
        path: the file.
        is_shared: several processes may write it at once, each under its own temporary name.

    Raises:
        DiskError: if it cannot be written, for lack of space or permission.
    """
    partial = path.with_name(f".{path.name}{f'.{uuid4().hex}' if is_shared else ''}.partial")
    with _disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _flush(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder to write into, which becomes the requested folder at the end of the block.

    Args:
        path: the requested folder; its parents are created.
        overwrite: replace a folder that is not empty.

    Raises:
        UserError: for what :func:`check_free` refuses.
        DiskError: if it cannot be written.
    """
    check_free(path, overwrite=overwrite)
    path = Path(os.path.realpath(path))  # a link to a folder stays one
    partial, old = (path.with_name(f".{path.name}.{uuid4().hex}.{what}") for what in ("partial", "old"))
    with _disk_errors(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            for part in (*partial.rglob("*"), partial):
                _flush(part)
            if overwrite and path.exists():
                path.rename(old)
            partial.rename(path)  # which refuses to replace a folder that is not empty
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            for folder in (partial, old):
                shutil.rmtree(folder, ignore_errors=True)
    _flush(path.parent)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuses to write a folder over a file or a folder that is not empty.

    With ``overwrite``, over a folder that contains folders: that would be a mistake.

    Args:
        path: the folder.
        overwrite: whether a folder of files is replaced.
    """
    parts = list(path.iterdir()) if path.is_dir() else []
    in_the_way = [part for part in parts if part.is_dir() or not overwrite]
    is_here = path.is_dir() and path.samefile(os.curdir)  # the folder of the shell would be replaced
    if in_the_way or is_here or (path.exists() and not path.is_dir()):
        raise UserError(
            f"output: {str(path)!r} is in use. Choose a folder that does not exist or is empty (with overwrite: one that "
            "contains no folders)"
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises its own error, also for a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DiskError(f"{path} could not be written ({reason}); the old contents are unchanged") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
