"""What a benchmark finds, as JSON lines in a file that is whole after each of them, and as a table."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cola_lightning.writing import atomic_file


class Lines:
    """A file of results, one a line.

    Args:
        path: the file; it need not exist.
        is_new: what is there goes, with the first line that is added.

    Attributes:
        results: what the lines hold, in their order.
    """

    def __init__(self, path: Path, *, is_new: bool = False) -> None:
        self.path = path
        self.results: list[dict[str, Any]] = []
        if path.exists() and not is_new:
            self.results = [json.loads(line) for line in path.read_text().splitlines()]

    def missing(self, wanted: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Those of what is wanted, each by some of a result's fields, that no line has."""
        return [dict(one) for one in wanted if not any(one.items() <= result.items() for result in self.results)]

    def add(self, result: Mapping[str, Any]) -> None:
        """Adds a line."""
        self.results.append(dict(result))
        with atomic_file(self.path) as partial:
            partial.write_text("".join(json.dumps(one) + "\n" for one in self.results))


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = 128, title: str | None = None) -> None:
    """Prints a table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)
