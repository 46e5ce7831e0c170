"""Python commands in processes of their own, without the seconds in which each would import torch and train the digits' base.

``forked.run("-m", "cola_lightning", "fit", ...)`` stands for ``subprocess.run([sys.executable, "-m", ...])``: the process is
forked from one that has imported the libraries, knows that base, and has done nothing with either. Its folder, environment,
arguments, standard streams, signals, coverage and exit status are its own; ``test_forked.py`` compares it with a new process,
to the bit. A new process it must be where a test is about what is imported, how long that takes, a variable that is read
meanwhile, or what is said while the interpreter frees all that it holds: these do not, which takes a third of a second.
"""

import atexit
import fcntl
import functools
import gc
import importlib
import json
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = ["lightning.pytorch", "cola_lightning.cli.training", "sklearn.datasets"]  # none starts a thread: a fork loses those
_BEFORE_TESTS = dict(os.environ)


@functools.cache
def _server():
    """The process that forks, from its first use on; the socket that takes its requests."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, "-m", "tests.forked", str(its.fileno())]
        how = {"cwd": ROOT, "env": _BEFORE_TESTS, "stdin": subprocess.DEVNULL, "start_new_session": True}
        server = subprocess.Popen(command, pass_fds=[its.fileno()], **how)

    @atexit.register
    def _end():
        ours.close()
        server.wait()  # until its coverage is written

    return ours


class Command:
    """A command that runs.

    Args:
        *arguments: what would follow ``python``: ``-m`` and a module, ``-c`` and a program, or a script; then its arguments.
        cwd: the folder in which it runs; None: the current one.
        env: its environment; None: this process' own. ``OMP_NUM_THREADS`` and ``PYTHONPATH`` stay the tests'.
        log: the path of a file that gets both of its streams; None: they are collected.
        start_new_session: whether it has a session, and so a process group, of its own.
        pass_fds: file descriptors that it shares, under the same numbers.
    """

    def __init__(self, *arguments, cwd=None, env=None, log=None, start_new_session=False, pass_fds=()):
        self.arguments = list(map(str, arguments))
        self._streams = [log.open("w+")] if log else [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]  # noqa: SIM115
        self._reports, reports = os.pipe()
        environment = dict(os.environ if env is None else env)
        request = json.dumps([self.arguments, os.path.abspath(cwd or "."), environment, start_new_session, list(pass_fds)])
        descriptors = [reports, self._streams[0].fileno(), self._streams[-1].fileno(), *pass_fds]
        socket.send_fds(_server(), [request.encode()], descriptors)
        os.close(reports)
        self.pid = _read(self._reports)

    def finish(self, timeout=None):
        """Waits for its end, and kills it after ``timeout`` seconds; gives what ``subprocess.run`` does, as text."""
        try:
            if not select.select([self._reports], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            status = _read(self._reports)
        except BaseException:  # Ctrl-C, too
            os.kill(self.pid, signal.SIGKILL)
            _read(self._reports)
            raise
        else:
            texts = [stream.seek(0) or stream.read() for stream in self._streams]
        finally:
            os.close(self._reports)
            for stream in self._streams:
                stream.close()
        return subprocess.CompletedProcess(self.arguments, status, *texts)


def _read(pipe):
    if not (received := os.read(pipe, 8)):
        raise RuntimeError("tests.forked: the process that forks has ended")
    return int.from_bytes(received, "little", signed=True)


def _write(pipe, number):
    os.write(pipe, number.to_bytes(8, "little", signed=True))


def run(*arguments, timeout=None, check=False, **how):
    """A command from beginning to end; see ``Command``."""
    done = Command(*arguments, **how).finish(timeout)
    assert not check or done.returncode == 0, done.stderr
    return done


def _learn_base():
    """Puts the base of ``COLADigits`` into its cache; it is trained in another process, whose threads would not be here."""
    digits = importlib.import_module("benchmarks.digits_model")
    with tempfile.NamedTemporaryFile() as file:
        if (pid := os.fork()) == 0:
            digits.COLADigits(seed=0).configure_model()
            Path(file.name).write_bytes(pickle.dumps(digits._pretrained))
            os._exit(0)
        os.waitpid(pid, 0)
        digits._pretrained.update(pickle.loads(file.read()))


def _serve(requests):
    """Forks a process for each request. Returns in each of these, with the request, and where no more will come, with None."""
    while (received := socket.recv_fds(requests, 1 << 20, 8))[0]:
        request, descriptors, *_ = received
        if os.fork() == 0:  # who waits for the command
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if (pid := os.fork()) == 0:
                for number, stream in enumerate(descriptors[1:3], start=1):
                    os.dup2(stream, number)
                shared = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 256) for descriptor in descriptors[3:]]  # off the numbers
                for descriptor in descriptors:
                    os.close(descriptor)
                return [*json.loads(request), shared]
            _write(descriptors[0], pid)
            _write(descriptors[0], os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
    return None


def _become(arguments, folder, environment, has_own_session, numbers, shared):
    """Makes of a process that was just forked what ``python *arguments`` would be."""
    for descriptor, number in zip(shared, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if has_own_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["torch"].seed()  # as a new process has one of its own
    sys.modules["numpy"].random.seed()
    first, *rest = arguments
    if first == "-m":
        module, *rest = rest
        sys.path[0], sys.argv[1:] = folder, rest
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        program, *rest = rest
        sys.path[0], sys.argv = "", ["-c", *rest]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, vars(sys.modules["__main__"]))
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(first)), [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _end(status):
    """What an interpreter does at its end, up to where it frees all that it holds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    _learn_base()
    gc.freeze()  # else each process would go through all of that: for a second
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait for commands are not waited for
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = _serve(requests)
    if request is not None:
        try:
            _become(*request)
        except SystemExit as end:
            if not isinstance(end.code, int | None):
                raise
            _end((end.code or 0) & 0xFF)
        _end(0)
