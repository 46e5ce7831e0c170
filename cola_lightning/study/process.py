"""Starts a run in a separate process, and waits for it."""

import json
import logging
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cola_lightning.errors import UserError

log = logging.getLogger(__name__)

LOG = "log.txt"


def execute(
    words: Sequence[str], metric: str, folder: Path, tell: Callable[[float], None], tell_every: float
) -> dict[str, Any] | None:
    """Executes a run, and returns its reported result; None if it failed.

    Args:
        words: the arguments of ``cola fit``.
        metric: the validation metric.
        folder: the run's folder, which is emptied first; the process writes ``log.txt`` there.
        tell: called with the share of the run that is done, periodically.
        tell_every: maximum number of seconds between two calls of ``tell``.

    Raises:
        UserError: if the run reports a user error, which ends the study: it is the config, or one of its methods.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)  # a process that a dead study has left may still write into it
    output = (folder / LOG).open("w")
    reading, writing = os.pipe()
    asked = json.dumps({"words": list(words), "metric": metric, "report": writing})
    reports: dict[str, Any] = {}
    with output, os.fdopen(reading, "rb", buffering=0):
        command = [sys.executable, "-m", "cola_lightning", "compare", "--run", asked]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, pass_fds=[writing])
        try:
            os.close(writing)
            for report in _reports(reading, tell_every):
                if (warning := report.pop("warning", None)) is not None:
                    log.warning("%s", warning)
                reports |= report
                tell(reports.get("done", 0.0))
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # after the terminal's Ctrl-C, this is a second signal: it stops at once
                process.wait()
    if status == 2:
        raise UserError(_last_error(folder / LOG))
    return reports.get("result") if status == 0 else None


def _reports(reading: int, at_least_every: float) -> Iterator[dict[str, Any]]:
    """The process's reports, one per line, until it ends; an empty report if it writes nothing for a while."""
    pending = b""
    while True:
        if not select.select([reading], [], [], at_least_every)[0]:
            yield {}
            continue
        if not (received := os.read(reading, 1 << 16)):
            return
        *lines, pending = (pending + received).split(b"\n")
        yield from map(json.loads, lines)


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="locale", errors="replace").splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else f"a run was refused: {log}"
