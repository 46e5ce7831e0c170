"""A benchmark that consists of studies: calls of ``cola compare`` on one CPU thread, and the tables of their lines."""

import argparse
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from cola_lightning.cli import main as cola
from cola_lightning.study.config import as_words


def compare(options: Mapping[str, object], of_fit: Mapping[str, object]) -> list[str]:
    """The words of a call, after ``cola``.

    Args:
        options: those of ``cola compare``.
        of_fit: those of ``cola fit``, for each run.
    """
    return ["compare", *as_words(options), "--", *as_words(of_fit)]


def run(words: list[str]) -> None:
    """Prints a call, and runs what its study lacks.

    Raises:
        SystemExit: with the call's status, unless it is 0.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    print(shlex.join(["cola", *words]), flush=True)
    if (status := cola(words)) != 0:
        raise SystemExit(status)


def grouped(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Rows whose first cell is empty if it repeats the one above."""
    table, above = list[list[str]](), ""
    for first, *cells in rows:
        table.append(["" if first == above else first, *cells])
        above = first
    return table


def main(
    description: str | None,
    folder: Path,
    calls: Callable[[Path], Iterable[list[str]]],
    tables: Sequence[Callable[[Path], Iterable[list[str]]]],
    draw: Callable[[Path], None] | None = None,
) -> None:
    """The command of such a benchmark: runs what is missing, then prints its tables in README.md of this folder.

    Args:
        description: shown by ``--help``.
        folder: of the studies, by default.
        calls: what :func:`run` gets, for studies in a folder.
        tables: rows, made of the lines in a folder.
        draw: draws a figure of these lines.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing: only print the tables")
    parser.add_argument("--output", type=Path, default=folder, help="folder of the studies (default: %(default)s)")
    options = parser.parse_args()
    if not options.table:
        for words in calls(options.output):
            run(words)
    for table in tables:
        for row in table(options.output):
            print(f"| {' | '.join(row)} |")
    if draw is not None:
        draw(options.output)
