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
    commands = [
        ["fit", "--config", "../config.yaml"],
        ["inspect", "--checkpoint", CHECKPOINT],
    ]
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


TOLD = "import os, sys; from pathlib import Path; print(__name__, Path.cwd(), sys.argv, sys.path[0], os.getpgid(0)"
TOLD += " == os.getpid(), dict(os.environ)); print('aside', file=sys.stderr)"


@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_it_has_arguments_a_folder_and_an_environment_of_its_own(tmp_path, how):
    (tmp_path / "told.py").write_text(TOLD)
    first = {"-c": ["-c", TOLD], "-m": ["-m", "told"], "script": [tmp_path / "told.py"]}[how]
    environment = {name: os.environ.get(name, "") for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")}
    environment |= {"LC_ALL": "C.UTF-8", "ITS": "own"}
    one, other = (run(*first, "--an=argument", cwd=tmp_path, env=environment) for run in (new, forked.run))
    assert "'ITS': 'own'" in one.stdout
    assert (one.returncode, one.stdout, one.stderr) == (0, other.stdout, other.stderr)


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit('said')", 1),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
    ],
)
def test_its_exit_status_is_the_programs(program, status):
    one, other = (run("-c", program) for run in (new, forked.run))
    assert (one.returncode, other.returncode) == (status, status)
    assert one.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]


def test_it_begins_with_one_thread_and_in_a_process_group_of_its_own_where_it_is_to():
    told = "import os, torch; print(len(os.listdir('/proc/self/task')), torch.get_num_threads(), os.getpgid(0) == os.getpid())"
    assert forked.run("-c", told, start_new_session=True).stdout.split() == ["1", "1", "True"]
    assert forked.run("-c", told).stdout.split() == ["1", "1", "False"]


def test_what_no_seed_is_given_for_is_another_in_each():
    drawn = [forked.run("-c", "import random, torch; print(torch.rand(1), random.random())").stdout for _ in range(2)]
    assert not set(drawn[0].split()) & set(drawn[1].split())


def test_one_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run("-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)", log=tmp_path / "log", timeout=1)
    assert not Path(f"/proc/{(tmp_path / 'log').read_text().strip()}").exists()


def test_a_failed_one_is_an_error_where_that_is_asked_for():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        forked.run("-c", "1 / 0", check=True)
