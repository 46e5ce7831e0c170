"""Python commands in processes of their own, without the seconds in which each would import torch and train the digits' base.

``forked.run("-m", "cola_lightning", "fit", ...)`` stands for ``subprocess.run([sys.executable, "-m", ...])``: the process is
forked from one that knows that base (``fork_server.py``). That one is forked from the tests' process before the first test,
with the libraries that are imported there. A command's folder, environment, arguments, standard streams, signals, coverage
and exit status are its own. A new process it must be where a test is about how long imports take, a variable that is read
meanwhile, or what is said while the interpreter ends.
"""

import atexit
import faulthandler
import itertools
import logging
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from unittest import mock

import coverage

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.helpers.fork_server"])


def start_server():
    """Begins the process that forks commands, with what this one has imported."""
    resource_tracker.ensure_running()  # which is a new process
    with mock.patch.object(util, "spawnv_passfds", _fork):
        forkserver.ensure_running()


def _fork(executable, arguments, descriptors):
    """In the place of a new interpreter: does what ``arguments`` end with, ``-c PROGRAM``, in a fork of this process."""
    if pid := os.fork():
        return pid
    ends = [2, *sorted(descriptors), os.sysconf("SC_OPEN_MAX")]
    for one, next_ in itertools.pairwise(ends):
        os.closerange(one + 1, next_)  # files of pytest's and xdist's, which would wait for their end
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")  # not those that pytest reads
    logging.getLogger().handlers.clear()
    for handler in filter(None, (reference() for reference in logging._handlerList)):
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    warnings.resetwarnings()
    for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):  # as in a new interpreter
        warnings.simplefilter("ignore", hidden)
    faulthandler.disable()
    atexit._clear()
    if measured := coverage.Coverage.current():
        measured.stop()
    try:
        exec(arguments[-1], {})
    except Exception:
        traceback.print_exc()
    finally:  # not what the tests' process does next
        os._exit(0)


class Command:
    """A command that runs.

    Args:
        *arguments: what would follow ``python``: ``-m`` and a module, ``-c`` and a program, or a script; then its arguments.
        cwd: the folder in which it runs; None: the current one.
        env: its environment; None: this process' own. ``OMP_NUM_THREADS`` stays 1, and ``PYTHONPATH`` the tests'.
        log: the path of a file that gets both of its streams; None: they are collected.
        start_new_session: whether it has a session, and so a process group, of its own.
    """

    def __init__(self, *arguments, cwd=None, env=None, log=None, start_new_session=False):
        self.arguments = list(map(str, arguments))
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(log or Path(self._folder.name, name)).absolute() for name in ("stdout", "stderr")]
        for path in self._streams:
            path.write_text("")
        environment = dict(os.environ if env is None else env)
        given = self.arguments, os.path.abspath(cwd or "."), environment, self._streams, start_new_session
        self._process = SERVER.Process(target=_become, args=given)
        self._process.start()
        self.pid = self._process.pid

    def finish(self, timeout=None):
        """Waits for its end, and kills it after ``timeout`` seconds; gives what ``subprocess.run`` does, as text."""
        try:
            self._process.join(timeout)
            if self._process.is_alive():
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            texts = [path.read_text() for path in self._streams]
            return subprocess.CompletedProcess(self.arguments, self._process.exitcode, *texts)
        finally:  # after Ctrl-C, too
            self._process.kill()
            self._process.join()
            self._folder.cleanup()


def run(*arguments, timeout=None, check=False, **options):
    """A command from beginning to end; see ``Command``."""
    done = Command(*arguments, **options).finish(timeout)
    assert not check or done.returncode == 0, done.stderr
    return done


def _become(arguments, folder, environment, streams, has_own_session):
    """Makes of a process that was just forked what ``python *arguments`` would be."""
    from tests.helpers import fork_server

    sys.path = [folder, *fork_server.PATH[1:]]
    multiprocessing.set_start_method("fork", force=True)  # the system's
    for number, path in enumerate(streams, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if has_own_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    coverage.process_startup(force=True)  # if the environment says so
    sys.modules["torch"].seed()  # as a new process has one of its own
    sys.modules["numpy"].random.seed()
    try:
        _run(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def _run(first, *rest):
    if first == "-m":
        module, *rest = rest
        sys.argv[1:] = rest
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        program, *rest = rest
        sys.path[0], sys.argv = "", ["-c", *rest]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, vars(sys.modules["__main__"]))
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(first)), [first, *rest]
        runpy.run_path(first, run_name="__main__")


def environments(n, **more):
    """The environments of n processes that train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": port, **more}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]


def as_torchrun(n):
    """The environments in which Lightning sees torchrun."""
    return environments(n, TORCHELASTIC_RUN_ID="tests", GROUP_RANK="0", LOCAL_WORLD_SIZE=str(n))


def as_srun(n, n_nodes=1):
    """The environments in which Lightning sees SLURM's srun, with as many processes on each node."""
    n_local = n // n_nodes
    job = {
        "SLURM_JOB_ID": 7,
        "SLURM_JOB_NAME": "tests",
        "SLURM_NTASKS": n,
        "SLURM_NTASKS_PER_NODE": n_local,
        "SLURM_NNODES": n_nodes,
    }
    address = {name: environments(1)[0][name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    shared = address | {name: str(value) for name, value in job.items()}
    places = [{"PROCID": rank, "LOCALID": rank % n_local, "NODEID": rank // n_local} for rank in range(n)]
    return [os.environ | shared | {f"SLURM_{name}": str(k) for name, k in place.items()} for place in places]
