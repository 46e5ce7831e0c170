"""The wheel is all that a user needs: the package with its type marker, and the configs. `.ci/run` uses it elsewhere."""

import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


def test_it_holds_the_package_the_configs_and_the_command(tmp_path):
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(tmp_path / "site")
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cola_lightning").rglob("*.py*") if path.suffix != ".pyc"}
    configs = {f"cola_lightning/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.*")}
    others = {f"cola_lightning/{name}" for name in ("py.typed", "export/card.md", "cli/help.yaml")}
    assert files == package | configs | others
    (scripts,) = (path.read_text() for path in (tmp_path / "site").rglob("entry_points.txt"))
    assert "cola = cola_lightning.__main__:entry_point" in scripts
