"""``cola inspect``, ``--links``, and what is damaged: one line, status 2, and nothing changed on disk."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cola_lightning.chain.checkpoint import StoredState
from cola_lightning.cli import main
from tests.helpers import forked
from tests.helpers.toy import DIGITS, FAST, LAST

TEST = ["test", "--config", DIGITS, "--ckpt_path", LAST]
FIT = ["fit", "--config", DIGITS, "--ckpt_path", LAST]
FROM_CHAIN = ["fit", "--config", DIGITS, *FAST, "--model.init_chain", "chain"]
INSPECT = ["inspect", "chain"]
EXPORT = ["export", LAST, "--format", "chain", "--output"]


@pytest.fixture(scope="module")
def _fitted(tmp_path_factory):
    """A run of three links on the digits, and its chain as a folder."""
    folder = tmp_path_factory.mktemp("fitted")
    with contextlib.chdir(folder):
        assert [main(words) for words in (["fit", "--config", DIGITS, *FAST], [*EXPORT, "chain"])] == [0, 0]
    return folder


@pytest.fixture(autouse=True)
def _folder(_fitted, tmp_path, monkeypatch):
    shutil.copytree(_fitted, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")


def test_inspect_tells_the_same_of_a_checkpoint_and_of_its_chain(capsys):
    messages = []
    for path in (LAST, "chain"):
        assert main(["inspect", path, "--json", "--plot", "chain.png"]) == 0
        messages.append(json.loads(capsys.readouterr().out))
    assert messages[0] == messages[1]
    assert [(link["rank"], link["steps"], link["total_rank"]) for link in messages[0]] == [(1, 9, 1), (1, 9, 2), (1, 9, 3)]
    assert all("val_accuracy" in link["metrics"] for link in messages[0])
    assert main([*INSPECT, "--links", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.lstrip()[:1] in "0123456789" and line.strip()]) == 2


def test_a_new_run_from_some_links_saves_a_config_that_tests_it():
    assert main([*FROM_CHAIN, "--links", "1"]) == 0
    state = torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert len(StoredState.of(state).chain) == 1 + 2
    shutil.rmtree("chain")  # the checkpoint holds it
    config = ["--config", "runs/version_1/config.yaml", "--ckpt_path", "runs/version_1/checkpoints/last.ckpt"]
    assert main(["test", *config]) == 0
    assert main(["fit", *config, "--trainer.max_epochs", "4"]) == 0


# ---------------------------------------------------------------------- what is damaged or does not fit


def truncate(path):
    Path(path).write_bytes(Path(path).read_bytes()[:-200])


def edit_checkpoint(change):
    def edit(path):
        checkpoint = torch.load(path, weights_only=True)
        state = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("chain.base_weights.")}
        metadata = json.loads(bytes(state["chain.metadata"].tolist()))
        change(metadata)
        state["chain.metadata"] = torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8)
        torch.save(checkpoint | {"state_dict": state}, path)

    return edit


DAMAGE = [
    (truncate, LAST, TEST, "ckpt_path: "),
    (edit_checkpoint(lambda metadata: metadata.update(format_version=5)), LAST, TEST, "chain: .*reads format version 1"),
    (edit_checkpoint(lambda metadata: metadata["base"].update(values={})), LAST, FIT, "base: "),
    (truncate, "chain/chain.json", INSPECT, "chain: "),
]


def contents():
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.mark.parametrize(("damage", "path", "words", "message"), DAMAGE, ids=[message for *_, message in DAMAGE])
def test_what_is_damaged_or_does_not_fit_is_one_line_and_status_2(damage, path, words, message, capfd):
    damage(path)
    before = contents()
    assert main(words) == 2
    err = capfd.readouterr().err
    assert re.match(f"error: {message}", err.strip().splitlines()[-1]), err
    assert "Traceback" not in err
    assert contents() == before


# ---------------------------------------------------------------------- a disk that is full


def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_the_last_checkpoint_loads():
    """A limit on the size of files, which the checkpoint outgrows: each link adds to it."""
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({Path(LAST).stat().st_size + 500}, resource.RLIM_INFINITY))
from cola_lightning.__main__ import entry_point
try:
    entry_point()
finally:  # what coverage writes of this process when it ends is none of the run's files
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    fit = ["fit", "--config", DIGITS, *FAST, "--trainer.max_epochs", "9", "--trainer.default_root_dir", "full"]
    done = forked.run("-c", program, *fit)
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, last.partition("/")[0]) == (1, "error: full"), done.stderr
    assert "Traceback" not in done.stderr
    (checkpoint,) = Path("full").rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 2
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert main(["test", "--config", DIGITS, "--ckpt_path", str(checkpoint)]) == 0
