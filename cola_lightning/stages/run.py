"""The process of one stage."""

import hashlib
import json
import warnings
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from cola_lightning.cli.training import COLACLI
from cola_lightning.study.run import OPTIONS, RESULT, ChildWatch
from cola_lightning.writing import atomic_file

CONFIG, LAST = "config.yaml", Path("checkpoints", "last.ckpt")


def run(folder: str) -> int:
    """Trains a stage, or resumes it, and writes its result: what was asked for, and a hash of its last checkpoint.

    Args:
        folder: the stage's. It has its ``config.yaml``, and ``run.json`` with what is ``asked`` for.

    Returns:
        The exit status.
    """
    place = Path(folder)
    asked = json.loads((place / OPTIONS).read_text(encoding="utf-8"))["asked"]
    warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")  # the log is in it
    words, watch = ["fit", "--config", str(place / CONFIG)], ChildWatch()
    if (last := place / LAST).exists():
        words += ["--ckpt_path", str(last)]
    with watch.listening():
        COLACLI(words, watch, place)
    _write(place, {"asked": asked, "checkpoint": _hash(last)})
    return 0


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@rank_zero_only
def _write(folder: Path, result: dict[str, object]) -> None:
    with atomic_file(folder / RESULT) as partial:
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
