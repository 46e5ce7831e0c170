"""The table of a study: one row per method, at its best learning rate."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from rich.table import Table

from cola_lightning.study.results import Result

BASELINE = "lora"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
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
        peak_memory: median, in MB.
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
    peak_memory: float
    trainable_parameters: int


def summarize(results: Mapping[str, Sequence[Result]]) -> list[Row]:
    """A row for each method.

    Args:
        results: each method's results, at one learning rate.
    """
    baseline = {result.seed: result.test for result in results.get(BASELINE, ())}
    return [_row(name, of_method, {} if name == BASELINE else baseline) for name, of_method in results.items()]


def _row(name: str, results: Sequence[Result], baseline: Mapping[int, float | None]) -> Row:
    tests = [result.test for result in results if result.test is not None]
    pairs = [(r.test, other) for r in results if r.test is not None and (other := baseline.get(r.seed)) is not None]
    low, high = _interval(pairs)
    first = results[0]
    return Row(
        method=name,
        rank=first.rank,
        links=statistics.median_low(result.links for result in ([r for r in results if r.test is not None] or results)),
        learning_rate=first.learning_rate,
        seeds=len(results),
        diverged=len(results) - len(tests),
        validation=_mean([result.validation for result in results if result.validation is not None]),
        test=_mean(tests),
        deviation=statistics.stdev(tests) if len(tests) > 1 else None,
        difference=_mean([mine - theirs for mine, theirs in pairs]),
        low=low,
        high=high,
        seconds=statistics.median(result.seconds for result in results),
        peak_memory=statistics.median(result.peak_memory for result in results),
        trainable_parameters=first.trainable_parameters,
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _interval(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """The confidence interval of the mean paired difference, by Student's t."""
    if len(pairs) < 2:
        return None, None
    if len({mine - theirs for mine, theirs in pairs}) == 1:  # no deviation: scipy would warn
        return (only := pairs[0][0] - pairs[0][1]), only
    from scipy import stats

    mine, theirs = zip(*pairs, strict=True)
    interval = stats.ttest_rel(mine, theirs).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


HEADINGS = ["method", "rank", "links", "learning rate", "seeds", "validation", "test", "difference to LoRA"]
HEADINGS += ["s", "MB", "trained"]


def shown_test(row: Row, digits: int = 4) -> str:
    """The test metric as text: ``1.8230 ± 0.0027``, or ``diverged``."""
    if row.test is None:
        return "diverged"
    deviation = "" if row.deviation is None else f" ± {row.deviation:.{digits}f}"
    return f"{row.test:.{digits}f}{deviation}" + (f" ({row.diverged} diverged)" if row.diverged else "")


def shown_difference(row: Row, digits: int = 4) -> str:
    """The difference to LoRA as text: ``-0.0599 [-0.0661, -0.0536]``; empty if there is none."""
    if row.difference is None:
        return ""
    interval = "" if row.low is None or row.high is None else f" [{row.low:+.{digits}f}, {row.high:+.{digits}f}]"
    return f"{row.difference:+.{digits}f}{interval}"


def short_cells(row: Row, name: str) -> list[str]:
    """A row's cells in a document: a name, learning rate, number of seeds, test metric, difference to LoRA."""
    return [name, f"{row.learning_rate:g}", str(row.seeds), shown_test(row, 3), shown_difference(row, 3)]


def _cells(row: Row) -> list[str]:
    """A row's cells as text, under HEADINGS."""
    return [
        row.method,
        "" if row.rank is None else str(row.rank),
        str(row.links or ""),
        f"{row.learning_rate:g}",
        str(row.seeds),
        "" if row.validation is None else f"{row.validation:.4f}",
        shown_test(row),
        shown_difference(row),
        f"{row.seconds:.0f}",
        f"{row.peak_memory:.0f}",
        f"{row.trainable_parameters:,}",
    ]


def as_markdown(rows: Sequence[Row], metric: str, warning: str = "") -> str:
    """The table as Markdown, with a note and, if there is one, a warning."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(_cells, rows)]
    note = (
        f"{metric} and its test, mean ± standard deviation over the seeds, each method at the learning rate that is best on "
        "validation; the difference on test is paired by seed, with its interval of 95 % by Student's t. s: seconds of a fit; "
        "MB: peak memory of its process; trained: parameters of one link, or all."
    )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{note}\n" + (f"\n{warning}\n" if warning else "")


def as_csv(rows: Sequence[Row]) -> str:
    """The table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def on_screen(rows: Sequence[Row], metric: str) -> Table:
    """The table for a terminal of 80 columns, with the most important columns."""
    shown = [HEADINGS.index(name) for name in ("method", "rank", "learning rate", "seeds", "test", "difference to LoRA")]
    title = f"test_{metric.removeprefix('val_')}, mean ± standard deviation; intervals of 95 %, paired by seed"
    table = Table(title=title)
    for place in shown:
        table.add_column({"learning rate": "rate"}.get(HEADINGS[place], HEADINGS[place]), no_wrap=HEADINGS[place] != "method")
    for cells in map(_cells, rows):
        table.add_row(*(cells[place] for place in shown))
    return table
