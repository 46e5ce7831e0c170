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
        rank: the largest rank of its links; None for full fine-tuning.
        links: median number of links; 0 for full fine-tuning.
        learning_rate: the best on validation.
        seeds: number of runs.
        diverged: number of diverged runs; the metrics are those of the others.
        validation: mean validation metric.
        test: mean test metric.
        deviation: standard deviation of the test metric over the seeds; None for a single seed.
        difference: mean difference of the test metric to LoRA's, paired by seed; None without a pair.
        low: lower end of its 95 % interval, by Student's t; None for fewer than two seeds.
        high: upper end of that interval.
        seconds: median duration of a fit.
        peak_memory: median, in MB; None if it is not known.
        trainable_parameters: of the first run.
    """

    method: str
    rank: int | None
    links: int
    learning_rate: float
    seeds: int
    diverged: int
    validation: float | None
    test: float | None
    deviation: float | None
    difference: float | None
    low: float | None
    high: float | None
    seconds: float
    peak_memory: float | None
    trainable_parameters: int


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
    low, high = _interval(differences)
    return MethodSummary(
        method=name,
        rank=first.rank,
        links=statistics.median_low(result.links for result in results if not tests or result.seed in tests),
        learning_rate=first.learning_rate,
        seeds=len(results),
        diverged=len(results) - len(tests),
        validation=_mean([result.validation for result in results if result.validation is not None]),
        test=_mean([*tests.values()]),
        deviation=statistics.stdev(tests.values()) if len(tests) > 1 else None,
        difference=_mean(differences),
        low=low,
        high=high,
        seconds=statistics.median(result.seconds for result in results),
        peak_memory=None if first.peak_memory is None else statistics.median(result.peak_memory or 0 for result in results),
        trainable_parameters=first.trainable_parameters,
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """The confidence interval of the mean difference, by Student's t."""
    if len(differences) < 2:
        return None, None
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
    interval = "" if row.low is None or row.high is None else f" [{row.low:+.{digits}f}, {row.high:+.{digits}f}]"
    return f"{row.difference:+.{digits}f}{interval}"


COLUMNS: dict[str, Callable[[MethodSummary], str]] = {
    "method": lambda row: row.method,
    "rank": lambda row: "" if row.rank is None else str(row.rank),
    "links": lambda row: str(row.links or ""),
    "learning rate": lambda row: f"{row.learning_rate:g}",
    "seeds": lambda row: str(row.seeds),
    "validation": lambda row: "" if row.validation is None else f"{row.validation:.4f}",
    "test": shown_test,
    "difference to LoRA": shown_difference,
    "s": lambda row: f"{row.seconds:.0f}",
    "MB": lambda row: "" if row.peak_memory is None else f"{row.peak_memory:.0f}",
    "trained": lambda row: f"{row.trainable_parameters:,}",
}
ON_SCREEN = ("method", "rank", "learning rate", "seeds", "test", "difference to LoRA")  # in 80 columns


def as_markdown(rows: Sequence[MethodSummary], metric: str, warning: str = "") -> str:
    """The table as Markdown, with a note and, if there is one, a warning."""
    lines = [[*COLUMNS], ["---"] * len(COLUMNS), *([text(row) for text in COLUMNS.values()] for row in rows)]
    note = (
        f"{metric} and its test, mean ± standard deviation over the seeds, each method at the learning rate that is best on "
        "validation; the difference on test is paired by seed, with its interval of 95 % by Student's t. s: seconds of a fit; "
        "MB: peak memory of the GPU; trained: parameters of one link, or all."
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
