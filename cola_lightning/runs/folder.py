"""The folder of a run: who is at work in it, and what is known of it."""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from cola_lightning.errors import UserError
from cola_lightning.writing import atomic_file

LAST = Path("checkpoints", "last.ckpt")


def claim(path: Path) -> TextIO | None:
    """Claims a piece of work for this process: an open file, as long as it is open; None if another process has claimed it.

    The system frees the claim when the process ends, however it ends. A process that is started with the open file has the
    claim too; workers that are forked do not.

    Args:
        path: the file, on this machine or on a disk that several machines share.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    os.register_at_fork(after_in_child=file.close)
    return file


def read_record(path: Path) -> dict[str, Any]:
    """A record; empty if there is no such file.

    Raises:
        UserError: for a file that is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"output: {str(path)!r} is damaged ({error}). Remove its folder, or move it away") from error


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")


def set_aside(folder: Path) -> Path:
    """Gives a run's folder another name, with the next free number: ``sft.1``; returns its new path."""
    new = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
    return folder.rename(new)


def hash_of_last(folder: Path) -> str | None:
    """A hash of the last checkpoint of a run; None if it has none."""
    try:
        with (folder / LAST).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
