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

from safetensors import SafetensorError

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
        UserError: for what :func:`check_free` refuses, and for a folder that another process is writing.
        DiskError: if it cannot be written.
    """
    check_free(path, overwrite=overwrite)
    given, path = path, Path(os.path.realpath(path))  # a link to a folder stays one
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    try:
        with _locked(partial, given):
            check_free(path, overwrite=overwrite)  # another process may have written it by now
            try:
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
            finally:
                if old.exists() and not path.exists():
                    old.rename(path)
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DiskError(f"{path} could not be written ({reason}); the old contents are unchanged") from error


@contextmanager
def _locked(partial: Path, path: Path) -> Iterator[None]:
    """Makes an empty folder to write into, which no other process or thread gets inside the block; it is removed at the end.

    The lock ends with its process: the folder that a killed one has left is emptied.
    """
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        if not _lock(descriptor) or not _is_of(descriptor, partial):
            raise UserError(f"output: expected a folder that no other process is writing, received {str(path)!r}")
        try:
            for part in partial.iterdir():
                shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
            yield
        finally:
            if _is_of(descriptor, partial):  # once renamed, the name is free for others
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks an open folder until it is closed; False if another process, or thread, has locked it."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # a system, or a file system, without locks
        return True
    return True


def _is_of(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def check_free(path: Path, *, overwrite: bool = False, field: str = "output") -> None:
    """Refuses to write a folder over a file, a folder that is not empty, the working directory, or a mount point.

    With ``overwrite``, over one that contains folders: that would be a mistake.

    Args:
        path: the folder.
        overwrite: whether a folder of files is replaced.
        field: its name in messages.
    """
    try:
        if not path.exists():
            return
        parts = list(path.iterdir()) if path.is_dir() else None
    except OSError as error:  # no permission, a name that is too long
        raise UserError(f"{field}: expected a folder that can be written, received {str(path)!r} ({error.strerror})") from error
    if parts is None:
        raise UserError(f"{field}: expected a folder, received {str(path)!r}, which is a file")
    is_current = path.samefile(os.curdir)
    if is_current or os.path.ismount(path):  # it would have to be renamed
        what = "the working directory" if is_current else "a mount point"
        raise UserError(f"{field}: expected a folder that can be replaced, received {str(path)!r}, {what}: name one in it")
    if overwrite and any(part.is_dir() for part in parts):
        raise UserError(f"{field}: expected a folder of files alone to overwrite, received {str(path)!r}, which holds folders")
    if not overwrite and parts:
        raise UserError(
            f"{field}: expected a folder that does not exist or is empty, received {str(path)!r}, which is not: "
            "overwrite replaces it"
        )


def check_writable(field: str, folder: str | Path, *, is_replaced: bool = False) -> None:
    """Refuses a folder that cannot be created or written to, without creating it; a URL is not checked.

    Args:
        field: its name in messages.
        folder: the folder.
        is_replaced: whether it is written as by :func:`whole_folder`, for which the folder that contains it must be writable.
    """
    if "://" in str(folder):
        return
    path = Path(os.path.realpath(folder))
    existing = next(place for place in (path, *path.parents)[is_replaced:] if place.exists())
    if not existing.is_dir():
        raise UserError(f"{field}: expected a folder that can be written, received {str(folder)!r}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{field}: expected a folder that can be written, received {str(folder)!r}: no permission in {existing}"
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
