"""Files and folders that are written atomically.

Both are written beside their destination, under a hidden name, flushed to disk, and then renamed in one step: after a crash, or
on a full disk, the previous contents are still there.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cola_lightning.errors import DiskError, UserError


@contextmanager
def whole_file(path: Path, *, is_shared: bool = False) -> Iterator[Path]:
    """Yields a path to write to, which becomes the file at the end of the block.

    Args:
        path: the file.
        is_shared: several processes may write it at once, each under its own temporary name.

    Raises:
        DiskError: if it cannot be written, for lack of space or permission.
    """
    writer = f".{socket.gethostname()}-{os.getpid()}" if is_shared else ""
    partial = path.with_name(f".{path.name}{writer}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _to_disk(partial)
        partial.replace(path)
        _to_disk(path.parent)
    except OSError as error:
        raise DiskError(f"{path} could not be written ({error.strerror or error}); the old contents are unchanged") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder to write into, which becomes the requested folder at the end of the block.

    Args:
        path: the requested folder; its parents are created.
        overwrite: replace a folder that is not empty.

    Raises:
        UserError: for a folder that is not empty, without ``overwrite``, and for a file.
        DiskError: if it cannot be written.
    """
    check_free(path, overwrite=overwrite)
    path = path.absolute()
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for part in partial.rglob("*"):
            if part.is_file():
                part.chmod(_usual_mode())  # safetensors lets only the owner read its files
            _to_disk(part)
        _to_disk(partial)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
        _to_disk(path.parent)
    except OSError as error:
        raise DiskError(f"{path} could not be written ({error.strerror or error}); the old contents are unchanged") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuses to write a folder over a file, or over a folder that is not empty.

    With ``overwrite``, over one that contains folders, or is the working directory: that would be a mistake.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"output: expected a folder, received {str(path)!r}, which is a file")
    if overwrite and path.exists() and (path.resolve() == Path.cwd() or any(part.is_dir() for part in path.iterdir())):
        raise UserError(
            f"output: expected a folder of files alone to overwrite, received {str(path)!r}, which holds folders or is in use"
        )
    if not overwrite and path.exists() and any(path.iterdir()):
        raise UserError(
            f"output: expected a folder that does not exist or is empty, received {str(path)!r}, which is not: "
            "overwrite replaces it"
        )


def _usual_mode() -> int:
    """The permissions of a new file; the umask can only be read by setting one."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
