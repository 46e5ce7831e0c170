"""A forked command is the command in a new process."""

import os
import subprocess
import sys

import pytest

from tests import forked


def new(*arguments, cwd=None, env=None):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, check=False)


TOLD = """
import os, signal, sys
from multiprocessing import get_start_method
from pathlib import Path
print(__name__, Path.cwd(), sys.argv, sys.path, get_start_method(), os.getpgid(0) == os.getpid(), dict(os.environ))
print('aside', file=sys.stderr)
if sys.argv[-1] == 'SIGKILL':
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(eval(sys.argv[-1]))
"""


@pytest.mark.parametrize("how", ["-c", "-m", "script"])
@pytest.mark.parametrize(("end", "status"), [("3", 3), ("None", 0), ("'said'", 1), ("1 / 0", 1), ("SIGKILL", -9)])
def test_its_arguments_folder_environment_streams_and_exit_status_are_its_own(tmp_path, how, end, status):
    (tmp_path / "told.py").write_text(TOLD)
    first = {"-c": ["-c", TOLD], "-m": ["-m", "told"], "script": [tmp_path / "told.py"]}[how]
    environment = {name: os.environ.get(name, "") for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")}
    environment |= {"LC_ALL": "C.UTF-8", "ITS": "own", "PYTHONUNBUFFERED": "1"}
    one, other = (run(*first, "--an=argument", end, cwd=tmp_path, env=environment) for run in (new, forked.run))
    assert "'ITS': 'own'" in one.stdout or end == "SIGKILL"
    assert (one.returncode, other.returncode) == (status, status)
    assert other.stdout in (one.stdout, "")  # what is not flushed is lost with a process that is killed
    assert one.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]
