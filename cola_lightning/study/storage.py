"""Where Optuna stores a study: a journal file, whose mishaps Optuna leaves to its user, or a database."""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.exc import DBAPIError
from typing_extensions import override

from cola_lightning.errors import DiskError, StorageError, UserError, one_line, shortened_text

DATABASE_TRIES = 5
JOURNAL_LINE = b'{"op_code":'  # the beginning of each line that Optuna writes


def open_storage(storage: str) -> BaseStorage:
    """Opens a storage, and makes it if need be.

    Args:
        storage: a journal file, or the URL of a database.

    Raises:
        UserError: if it cannot be opened.
    """
    try:
        if "://" in storage:
            return _database(storage)
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        path = os.path.abspath(storage)  # a lock is a link to it, through which Optuna reads the age of one that was left
        return JournalStorage(Journal(path))
    except Exception as error:  # the database's own exceptions, or the disk's
        raise UserError(
            f"storage: expected a file, or the URL of a database that answers, received {storage!r} ({one_line(str(error))})"
        ) from error


@contextmanager
def answering() -> Iterator[None]:
    """Tells in one line of a database that no longer answers.

    Raises:
        StorageError: in the place of the database's own exceptions.
    """
    try:
        yield
    except (DBAPIError, StorageInternalError) as error:
        said = one_line(str(getattr(error, "orig", None) or error))
        raise StorageError(f"storage: the database no longer answers ({said}); the same command continues the study") from error


def _database(url: str) -> RDBStorage:
    """A database, whose tables are created if need be; of several processes that do so at once, Optuna lets one succeed."""
    for _ in range(DATABASE_TRIES - 1):
        with suppress(DBAPIError, StorageInternalError):
            return RDBStorage(url)
        time.sleep(random.uniform(0.1, 1.0))
    return RDBStorage(url)


class Journal(JournalFileBackend):
    """A journal file that says in one line that it cannot be written.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, WholeLines(path))
        self.path = path

    @override
    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise DiskError(f"{self.path} could not be written ({error.strerror or error})") from error


class WholeLines(JournalFileSymlinkLock):
    """The lock for writing a journal, which begins by dropping half a line: what a killed process or a full disk has left.

    Args:
        path: the journal.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    @override
    def acquire(self) -> bool:
        is_acquired = super().acquire()
        try:
            self._drop_half_line()
        except BaseException:
            self.release()
            raise
        return is_acquired

    def _drop_half_line(self) -> None:
        with open(self._path, "rb+") as journal:
            journal.seek(max(0, journal.seek(0, os.SEEK_END) - 1))
            if journal.read() in (b"", b"\n"):
                return
            journal.seek(0)
            *whole, half = journal.read().split(b"\n")
            if not half.startswith(JOURNAL_LINE[: len(half)]):
                end = half.decode(errors="replace")
                raise UserError(f"storage: expected a journal, received {self._path!r}, which ends in {shortened_text(end)!r}")
            journal.truncate(sum(len(line) + 1 for line in whole))
