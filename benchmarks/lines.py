"""What all benchmarks share: results as JSON lines in a file that is whole after each of them, and tables made of them."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_lightning.writing import atomic_file

Rows = list[list[str]]


class Lines:
    """A file of results, one a line.

    Args:
        path: the file; it need not exist.
        is_new: what is there goes, with the first line that is added.

    Attributes:
        path: the file.
        is_new: whether nothing that was measured before counts.
        results: what the lines hold, in their order.
    """

    def __init__(self, path: Path, *, is_new: bool = False) -> None:
        self.path, self.is_new = path, is_new
        self.results: list[dict[str, Any]] = []
        if path.exists() and not is_new:
            self.results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def missing(self, wanted: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Those of what is wanted, each by some of a result's fields, that no line has."""
        return [dict(one) for one in wanted if not any(one.items() <= result.items() for result in self.results)]

    def add(self, result: Mapping[str, Any]) -> None:
        """Adds a line."""
        self.results.append(dict(result))
        with atomic_file(self.path) as partial:
            partial.write_text("".join(json.dumps(one) + "\n" for one in self.results), encoding="utf-8")


def grouped(rows: Iterable[Sequence[str]]) -> Rows:
    """Rows whose first cell is empty if it repeats the one above."""
    table, above = Rows(), ""
    for first, *cells in rows:
        table.append(["" if first == above else first, *cells])
        above = first
    return table


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table as Markdown."""
    for row in [columns, ["---"] * len(columns), *rows]:
        print(f"| {' | '.join(row)} |")


def main(
    description: str | None,
    file: Path,
    run: Callable[[Lines], None],
    tables: Sequence[tuple[Sequence[str], Callable[[list[dict[str, Any]]], Rows]]],
    draw: Callable[[list[dict[str, Any]], Path], None] | None = None,
) -> None:
    """The command of a benchmark: measures what its file lacks, then prints its tables and draws its picture.

    Args:
        description: shown by ``--help``.
        file: the results, one a line.
        run: adds the lines that are missing.
        tables: the columns of each table, and what makes its rows of the results.
        draw: draws a picture of the results, into the second argument.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing: only print the tables")
    parser.add_argument("--anew", action="store_true", help="measure everything again")
    parser.add_argument("--output", type=Path, default=file, help="the file of results (default: %(default)s)")
    options = parser.parse_args()
    lines = Lines(options.output, is_new=options.anew)
    if not options.table:
        run(lines)
    for columns, rows in tables:
        show(columns, rows(lines.results))
        print()
    if draw is not None:
        draw(lines.results, lines.path.with_suffix(".png"))
