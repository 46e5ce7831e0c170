"""A forked command is the command in a new process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.kills import DIGITS
from tests.run_comparison import differences_of_checkpoints

CHECKPOINT = "runs/version_0/checkpoints/last.ckpt"


def new(*arguments, cwd=None, env=None):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_a_forked_run_and_what_follows_it_are_those_of_new_processes_to_the_bit(tmp_path):
    """With dropout, data workers, accumulation and knots; all that they say and all the files that they write."""
    (tmp_path / "config.yaml").write_text(DIGITS)
    commands = [["fit", "--config", "../config.yaml"], ["inspect", "--checkpoint", CHECKPOINT]]
    found = []
    for folder, run in ((tmp_path / "new", new), (tmp_path / "forked", forked.run)):
        folder.mkdir()
        done = [run("-m", "cola_lightning", *words, cwd=folder) for words in commands]
        said = [(one.returncode, *(text.replace(str(folder), "") for text in (one.stdout, one.stderr))) for one in done]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        found.append((said, {name: data.replace(b"/new", b"/forked") for name, data in files.items() if ".ckpt" not in name}))
    assert [status for status, *_ in found[0][0]] == [0, 0]
    assert found[0] == found[1]
    assert differences_of_checkpoints(tmp_path / "new" / CHECKPOINT, tmp_path / "forked" / CHECKPOINT) == []


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


def test_it_begins_with_one_thread_and_draws_of_its_own():
    told = "import os, random, torch; print(len(os.listdir('/proc/self/task')), torch.rand(1).item(), random.random())"
    first, second = (forked.run("-c", told).stdout.split() for _ in range(2))
    assert first[0] == second[0] == "1"
    assert not set(first[1:]) & set(second[1:])


def test_one_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run("-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)", log=tmp_path / "log", timeout=1)
    assert not Path(f"/proc/{(tmp_path / 'log').read_text().strip()}").exists()
