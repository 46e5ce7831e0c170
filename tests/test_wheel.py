"""The wheel is all that a user needs: the package with its type marker, and the configs that `cola configs` copies."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from tests import tiny

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
    configs -= {f"cola_lightning/configs/{name}.yaml" for name in ("digits", "domain_shift")}  # of modules in benchmarks/
    ours = {name for name in files if ".dist-info/" not in name}
    assert ours == package | configs | {"cola_lightning/py.typed", "cola_lightning/export/card.md"}
    assert len(configs) == 7 + 3  # and the quickstart's rows
    (scripts,) = (path.read_text() for path in installed.rglob("entry_points.txt"))
    assert "cola = cola_lightning.__main__:entry_point" in scripts


def test_a_copied_config_is_fitted_outside_the_clone(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    base = ["--model.model_name", tiny.folder(tmp_path / "model"), "--model.gguf_file", "null"]
    for words in (["configs", "quickstart"], ["fit", "--config", "configs/quickstart.yaml", "--trainer.max_steps", "3", *base]):
        command = [sys.executable, "-m", "cola_lightning", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "link 0 live at the end" in done.stdout
    assert (tmp_path / "runs/version_0/checkpoints/last.ckpt").is_file()
