"""The table of a study: one row per method, at its best learning rate."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from scipy import stats

from cola_lightning.study.results import Result

BASELINE = "lora"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class MethodSummary:
    """A method at its best learning rate.

    Attributes:
        method: the method's name.
        learning_rate: the best on validation.
        runs: its runs.
        diverged: number of diverged runs; the metrics are those of the others.
        validation: mean validation metric.
        test: mean test metric.
        deviation: standard deviation of the test metric over the seeds; None for a single seed.
        difference: mean difference of the test metric to LoRA's, paired by seed; None without a pair.
        interval: its 95 % interval, by Student's t; None for fewer than two seeds.
    """

    method: str
    learning_rate: float
    runs: Sequence[Result]
    diverged: int
    validation: float | None
    test: float | None
    deviation: float | None
    difference: float | None
    interval: tuple[float, float] | None


def summarize(results: Mapping[str, Sequence[Result]]) -> list[MethodSummary]:
    """A row for each method.

    Args:
        results: each method's results, at one learning rate.
    """
    baseline = _tests(results.get(BASELINE, ()))
    return [_summary(name, method_results, {} if name == BASELINE else baseline) for name, method_results in results.items()]


def _tests(results: Sequence[Result]) -> dict[int, float]:
    """The test metric by seed, of the runs that did not diverge."""
    return {result.seed: result.test for result in results if result.test is not None}


def _summary(name: str, results: Sequence[Result], baseline: Mapping[int, float]) -> MethodSummary:
    first, tests = results[0], _tests(results)
    differences = [test - baseline[seed] for seed, test in tests.items() if seed in baseline]
    return MethodSummary(
        method=name,
        learning_rate=first.learning_rate,
        runs=results,
        diverged=len(results) - len(tests),
        validation=_mean([result.validation for result in results if result.validation is not None]),
        test=_mean([*tests.values()]),
        deviation=statistics.stdev(tests.values()) if len(tests) > 1 else None,
        difference=_mean(differences),
        interval=_interval(differences),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The confidence interval of the mean difference, by Student's t."""
    if len(differences) < 2:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    margin = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return mean - margin, mean + margin


def shown_test(row: MethodSummary, digits: int = 4) -> str:
    """The test metric as text: ``1.8230 ± 0.0027``, or ``diverged``."""
    if row.test is None:
        return "diverged"
    deviation = "" if row.deviation is None else f" ± {row.deviation:.{digits}f}"
    return f"{row.test:.{digits}f}{deviation}" + (f" ({row.diverged} diverged)" if row.diverged else "")


def shown_difference(row: MethodSummary, digits: int = 4) -> str:
    """The difference to LoRA as text: ``-0.0599 [-0.0661, -0.0536]``; empty if there is none."""
    if row.difference is None:
        return ""
    interval = "" if row.interval is None else " [{:+.{n}f}, {:+.{n}f}]".format(*row.interval, n=digits)
    return f"{row.difference:+.{digits}f}{interval}"


COLUMNS: dict[str, Callable[[MethodSummary], str]] = {
    "method": lambda row: row.method,
    "rank": lambda row: str(row.runs[0].rank or ""),
    "links": lambda row: str(statistics.median_low(run.links for run in row.runs) or ""),
    "learning rate": lambda row: f"{row.learning_rate:g}",
    "seeds": lambda row: str(len(row.runs)),
    "validation": lambda row: "" if row.validation is None else f"{row.validation:.4f}",
    "test": shown_test,
    "difference to LoRA": shown_difference,
    "s": lambda row: f"{statistics.median(run.seconds for run in row.runs):.0f}",
    "trained": lambda row: f"{row.runs[0].trainable_parameters:,}",
}
ON_SCREEN = ("method", "rank", "learning rate", "seeds", "test", "difference to LoRA")  # in 80 columns


def as_markdown(rows: Sequence[MethodSummary], metric: str, warning: str = "") -> str:
    """The table as Markdown, with a note and, if there is one, a warning."""
    lines = [[*COLUMNS], ["---"] * len(COLUMNS), *([text(row) for text in COLUMNS.values()] for row in rows)]
    note = (
        f"{metric} and its test, mean ± standard deviation over the seeds, each method at the learning rate that is best on "
        "validation; the difference on test is paired by seed, with its interval of 95 % by Student's t. s: seconds of a fit; "
        "trained: parameters of one link, or all."
    )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{note}\n" + (f"\n{warning}\n" if warning else "")


def on_screen(rows: Sequence[MethodSummary], metric: str) -> Table:
    """The table for a terminal of 80 columns, with the most important columns."""
    table = Table(title=f"test_{metric.removeprefix('val_')}, mean ± standard deviation; intervals of 95 %, paired by seed")
    for name in ON_SCREEN:
        table.add_column("rate" if name == "learning rate" else name, no_wrap=name != "method")
    for row in rows:
        table.add_row(*(COLUMNS[name](row) for name in ON_SCREEN))
    return table
