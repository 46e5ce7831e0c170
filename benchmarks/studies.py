"""Benchmarks that consist of studies: calls of ``cola compare`` on one CPU thread, whose results are lines of one file."""

import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.lines import Lines
from cola_lightning.cli import main as cola
from cola_lightning.cli.command_line import as_words
from cola_lightning.study.results import Mode, Result, at_best_rates, read, write
from cola_lightning.study.table import MethodSummary, shown_difference, shown_test

FOLDER = Path("build", "benchmarks")  # for what the runs leave
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A call of ``cola compare``. Calls with the same name go on with one study.

    Attributes:
        name: of the study, in each of its lines.
        options: those of ``cola compare``.
        of_fit: those of ``cola fit``, for each run.
    """

    name: str
    options: Mapping[str, Any]
    of_fit: Mapping[str, Any]


def results_of(results: Results, name: str) -> list[Result]:
    """What the lines of a study say of its runs."""
    known = {field.name for field in fields(Result)}
    lines = (line for line in results if line["study"] == name)
    return [Result(**{field: value for field, value in line.items() if field in known}) for line in lines]


def best_of(results: Results, name: str, mode: Mode = "min", tuning_seeds: int = 1) -> dict[str, list[Result]]:
    """The results of each method of a study at its best rate."""
    return at_best_rates(results_of(results, name), mode, range(tuning_seeds))


def run(lines: Lines, studies: Iterable[Study], more: Callable[[Path], Mapping[str, Any]] = lambda folder: {}) -> None:
    """Prints each call, runs what its study lacks, and adds the lines.

    Args:
        lines: of these studies.
        studies: the calls, in their order.
        more: what a line also holds, from the folder of its run.

    Raises:
        SystemExit: with the status of a call, unless it is 0.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if lines.is_new:
        shutil.rmtree(FOLDER / lines.path.stem, ignore_errors=True)
    for study in studies:
        folder = FOLDER / lines.path.stem / study.name
        folder.mkdir(parents=True, exist_ok=True)
        known = {result.key: result for result in results_of(lines.results, study.name)}
        write(({result.key: result for result in read(folder / "results.jsonl")} | known).values(), folder / "results.jsonl")
        words = ["compare", *as_words({**study.options, "output": str(folder)}), "--", *as_words(study.of_fit)]
        print(shlex.join(["cola", *words]), flush=True)
        status = cola(words)
        for result in read(folder / "results.jsonl"):
            if result.key not in known:
                name = f"{result.method}-lr{result.learning_rate}-seed{result.seed}"
                lines.add({"study": study.name, **asdict(result), **more(folder / "runs" / name)})
        if status != 0:
            raise SystemExit(status)


def short_cells(row: MethodSummary, name: str) -> list[str]:
    """A row's cells in a document: a name, learning rate, number of seeds, test metric, difference to LoRA."""
    return [name, f"{row.learning_rate:g}", str(len(row.runs)), shown_test(row, 3), shown_difference(row, 3)]
