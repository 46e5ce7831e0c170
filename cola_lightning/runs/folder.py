"""The folder of a run: who is at work in it, and what is known of it."""

import fcntl
import itertools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from cola_lightning.data.reading import hash_of_file
from cola_lightning.errors import UserError
from cola_lightning.runs.facts import DEVICES, changes, option_changes
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

RECORD = "run.json"  # what a run's result depends on, and more that is known of it
LAST = Path("checkpoints", "last.ckpt")


def claim(path: Path) -> TextIO | None:
    """Claims a piece of work for this process: an open file, as long as it is open; None if another process has claimed it.

    The system frees the claim when the process ends, however it ends. A process that is started with the open file has the
    claim too; workers that are forked do not.

    Args:
        path: the file, on this machine or on a disk that several machines share.

    Raises:
        UserError: on a disk without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            return None
        why = f"its disk has no locks ({error.strerror}), so two processes could train the same run"
        raise UserError(f"output: cannot use {str(path.parent)!r}: {why}. Use a folder on another disk") from error
    os.register_at_fork(after_in_child=file.close)
    return file


def is_claimed(path: Path) -> bool:
    """Whether a process has claimed a file; on a disk without locks, nobody can."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
    return False


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


def begin(folder: Path, facts: Mapping[str, Any], name: str, **more: Any) -> Path | None:
    """Makes a run's folder ready for its fit: a run that was stopped goes on, and another run is kept aside.

    Args:
        folder: the run's.
        facts: what its result depends on.
        name: of the run, for the log.
        **more: what else its record holds.

    Returns:
        The checkpoint from which it goes on; None: it starts.
    """
    why, last = why_again(folder, facts), folder / LAST
    if why is None and last.exists():
        for option, here, there in option_changes(facts, read_record(folder / RECORD)["facts"]):
            if option in DEVICES:
                log.info("%s: goes on with %s %s, and began with %s", name, option, here, there)
        log.info("%s: goes on from %s", name, last)
        return last
    if why is not None:
        kept = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
        log.info("%s: %s, so it is trained again. The earlier run is kept in %s", name, why, folder.rename(kept))
    write_record(folder / RECORD, {"facts": facts, **more})
    log.info("%s: training", name)
    return None


def why_again(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """Why the run in a folder is another one; None if there is none, or it is the same, so that it is finished or goes on."""
    record, last = read_record(folder / RECORD), hash_of_last(folder)
    if last is None and "checkpoint" not in record:
        return None
    if "facts" not in record:
        return "its folder has another run"
    for name, here, there in changes(facts, record["facts"]):
        return f"{name} has changed" + (f" (now {here}, before {there})" if " " not in name else "")
    return None if record.get("checkpoint", last) == last else "its checkpoint is not the one that was written"


def hash_of_last(folder: Path) -> str | None:
    """A hash of the last checkpoint of a run; None if it has none."""
    return hash_of_file(folder / LAST) if (folder / LAST).exists() else None
