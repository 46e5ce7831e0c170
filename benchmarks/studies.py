"""A benchmark that is a study: a call of ``cola compare`` on one CPU thread."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from cola_lightning.cli import main as cola
from cola_lightning.study.config import as_words

sys.path.append(str(Path(__file__).parent.parent))  # where the configs' class paths begin


def compare(options: Mapping[str, object], of_fit: Mapping[str, object]) -> list[str]:
    """The words of a call, after ``cola``.

    Args:
        options: those of ``cola compare``.
        of_fit: those of ``cola fit``, for each run.
    """
    return ["compare", *as_words(options), "--", *as_words(of_fit)]


def run(words: list[str]) -> None:
    """Prints a call, and does what its study lacks.

    Raises:
        SystemExit: with the call's status, unless it is 0.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    print(shlex.join(["cola", *words]), flush=True)
    if (status := cola(words)) != 0:
        raise SystemExit(status)
