"""The wheel is all that a user needs: the package with its type marker, and the configs that `cola configs` copies."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

from tests import tiny

ROOT = Path(__file__).parent.parent


def test_what_it_holds_copies_a_config_and_fits_it_outside_the_clone(tmp_path):
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(tmp_path / "site")
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cola_lightning").rglob("*.py*") if path.suffix != ".pyc"}
    configs = {f"cola_lightning/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.*")}
    assert files == package | configs | {"cola_lightning/py.typed", "cola_lightning/export/card.md"}
    (scripts,) = (path.read_text() for path in (tmp_path / "site").rglob("entry_points.txt"))
    assert "cola = cola_lightning.__main__:entry_point" in scripts

    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    base = ["--model.model_name", tiny.folder(tmp_path / "model"), "--model.gguf_file", "null"]
    commands = [["configs", "quickstart"], ["fit", "--config", "configs/quickstart.yaml", "--trainer.max_steps", "3", *base]]
    program = f"import sys; from cola_lightning.cli import main; sys.exit(any(map(main, {commands})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/version_0/checkpoints/last.ckpt").is_file()
