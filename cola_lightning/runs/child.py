"""A run in a process of its own: ``python -m cola_lightning.runs.child compare --run FOLDER``.

Its standard input is a socket to the process that began it. When that process is gone, however it ended, the socket says so,
and the run ends at once. A refusal goes the other way through it.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO


def execute(words: Sequence[str], log: Path, claim: TextIO) -> tuple[int, str]:
    """Executes a command of ``cola`` in a process of its own, which has the claim too.

    If this process is interrupted, the run finishes its batch and writes its state.

    Args:
        words: the arguments of ``cola``.
        log: the file for all that it prints.
        claim: see :func:`cola_lightning.runs.folder.claim`.

    Returns:
        Its exit status, and what it has sent by :func:`send`.
    """
    mine, theirs = socket.socketpair()
    with mine, log.open("w") as output:
        # In a session of its own: the terminal's Ctrl-C goes to this process alone, which then stops the run by one signal.
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *words],
            stdin=theirs.fileno(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[claim.fileno()],
        )
        theirs.close()
        try:
            status = process.wait()
        finally:
            process.terminate()
            process.wait()
        mine.setblocking(False)
        try:
            return status, mine.recv(1 << 16).decode()
        except BlockingIOError:  # a process of the run still has the socket
            return status, ""


def send(message: str) -> None:
    """Sends a message to the process that began this one."""
    os.write(0, message.encode())


def _end_with_parent() -> None:
    """Waits until the process that began this one is gone."""
    while os.read(0, 1):
        pass
    os._exit(1)  # another process may begin this run anew


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()  # before the imports, which take seconds
    import importlib

    importlib.import_module("cola_lightning.__main__").entry_point()
