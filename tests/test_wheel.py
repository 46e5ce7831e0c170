"""The wheel is all that a user needs: the package with its type marker, and the configs that `cola configs` copies."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds, as pip would put it among the other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_it_holds_the_package_and_its_configs(installed):
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cola_lightning").rglob("*.py*") if path.suffix != ".pyc"}
    configs = {f"cola_lightning/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.*")}
    ours = {name for name in files if ".dist-info/" not in name}
    assert ours == package | configs | {"cola_lightning/py.typed", "cola_lightning/export/card.md"}
    assert len(configs) == 9 + 3  # and the quickstart's rows
    (scripts,) = (path.read_text() for path in installed.rglob("entry_points.txt"))
    assert "cola = cola_lightning.__main__:entry_point" in scripts


def test_a_copied_config_is_fitted_outside_the_clone(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    for words in (
        ["configs", "digits"],
        ["fit", "--config", "configs/digits.yaml", "--trainer.max_epochs", "2", "--chain.every_n_epochs", "1"],
    ):
        command = [sys.executable, "-m", "cola_lightning", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "link 0 finished: steps 0 to 9, rank 1" in done.stdout
    assert (tmp_path / "runs/version_0/checkpoints/last.ckpt").is_file()
