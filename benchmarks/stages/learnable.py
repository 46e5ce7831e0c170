"""Which tasks a model can learn at all: each candidate is trained alone, and compared with its most frequent word."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lines import Lines, Rows
from benchmarks.stages.arms import ARMS
from benchmarks.stages.sequence import TaskSequence
from benchmarks.stages.training import rows_of_stages, train_stage, validation_scores

FACTORS = (0.5, 2, 4)  # of the first rate of the sequence: the rates that are tried
MARGIN = 0.05  # how much better than the most frequent word a task's own model must be


def try_alone(sequence: TaskSequence, lines: Lines, folder: Path) -> None:
    """Adds a line for each candidate and rate: its accuracy on validation, before and after, and that of a constant."""
    for task in sequence.candidates:
        rates = [sequence.rates[0] * factor for factor in FACTORS]
        missing = lines.missing({"arm": "task", "task": task, "rate": rate} for rate in rates)
        if not missing:
            continue
        alone = replace(sequence, tasks={task: task}, orders=[(task,)])
        data = alone.read_data(folder)
        labels = Counter(row.label for row in data[task]["validation"])
        found: dict[str, Any] = {"rows": {split: len(rows) for split, rows in data[task].items()}}
        found["constant"] = round(max(labels.values()) / labels.total(), 4)
        found["untrained"] = validation_scores(alone, alone.adapted_model(0).model, data)["accuracy"][0]
        (rows,) = rows_of_stages(alone, ARMS["lora"], data, [task], 0)
        for run in missing:
            adapted = alone.adapted_model(0)
            train_stage(alone, adapted, rows, run["rate"])
            scores = {name: values[0] for name, values in validation_scores(alone, adapted.model, data).items()}
            lines.add(run | found | scores)
            print(lines.results[-1], flush=True)


def learnable(lines: Lines) -> list[str]:
    """The candidates that one rate brings above the most frequent word by the margin."""
    of_tasks = [line for line in lines.results if line["arm"] == "task"]
    is_in = {line["task"] for line in of_tasks if line["accuracy"] >= line["constant"] + MARGIN}
    return [task for task in dict.fromkeys(line["task"] for line in of_tasks) if task in is_in]


def table_of_candidates(sequence: TaskSequence, lines: Lines) -> Rows:
    """The head, and a row for each candidate."""
    of_tasks = [line for line in lines.results if line["arm"] == "task"]
    rates = sorted({line["rate"] for line in of_tasks})
    rows = [["candidate", "rows", "most frequent word", "untrained", *(f"{rate:g}" for rate in rates), "in"]]
    names = learnable(lines)
    for task in dict.fromkeys(line["task"] for line in of_tasks):
        found = {line["rate"]: line for line in of_tasks if line["task"] == task}
        first = next(iter(found.values()))
        cells = [sequence.tasks.get(task, task), " / ".join(str(n) for n in first["rows"].values())]
        cells += [f"{first['constant']:.3f}", f"{first['untrained']:.3f}"]
        cells += [f"{found[rate]['accuracy']:.3f}" if rate in found else "" for rate in rates]
        rows.append([*cells, "yes" if task in names else "no"])
    return rows
