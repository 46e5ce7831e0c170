"""The matrix of a sequence of stages: what each stage did to the test data of every stage.

Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory" (arXiv 1706.08840), section 3, for the transfers; Chaudhry et al.,
"Riemannian Walk" (arXiv 1801.10112), section 4.1, for forgetting.
"""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from cola_lightning.study.comparison import BETTER
from cola_lightning.study.table import CONFIDENCE
from cola_lightning.writing import atomic_file

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = ("loss", "accuracy", "f1", "exact_match")  # the metrics that a matrix has, of those that a task logs
SUMMARIES = ("forgetting", "backward transfer", "forward transfer")


@dataclass(frozen=True)
class Difference:
    """A difference between two states of the model, which were measured on the same test rows.

    Attributes:
        value: the difference.
        error: its standard error over the rows; None if the metric is no mean over rows, or if there is only one row.
        freedom: the degrees of freedom of the error.
    """

    value: float
    error: float | None = None
    freedom: float = math.inf

    @classmethod
    def of(cls, value: float, ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> "Difference":
        """The difference between two means, paired by row.

        A mean is the sum of the rows' values over that of their weights. Of losses these are sums over a row's tokens and the
        numbers of tokens, so the error is that of a ratio: a row counts by how far its values are from those that the
        difference expects of its tokens.

        Args:
            value: the difference.
            ours: the rows' values and weights.
            theirs: those of the other state; the weights are the same.

        Shape:
            ``ours``, ``theirs``: 2 x rows.

        Example:
            >>> Difference.of(0.5, [[2.0, 4.0], [1, 1]], [[2.0, 3.0], [1, 1]])
            Difference(value=0.5, error=0.5, freedom=1)

        Source: Cochran, "Sampling Techniques" (3rd edition, 1977), section 2.11, for the error of a ratio.
        """
        (mine, weights), (others, _) = np.array(ours), np.array(theirs)
        if len(weights) < 2:
            return cls(value)
        gaps = mine - others
        rest = (gaps - gaps.sum() / weights.sum() * weights) / weights.mean()
        return cls(value, float(stats.sem(rest)), len(rest) - 1)

    @classmethod
    def mean(cls, differences: Sequence["Difference"]) -> "Difference":
        """The mean of the differences of several tasks, by Welch and Satterthwaite: their rows are independent."""
        value = statistics.fmean(one.value for one in differences)
        errors = [one.error for one in differences if one.error is not None]
        if len(errors) < len(differences):
            return cls(value)
        variances = [(error**2, one.freedom) for error, one in zip(errors, differences, strict=True)]
        total, rest = sum(one for one, _ in variances), sum(one**2 / freedom for one, freedom in variances)
        return cls(value, math.sqrt(total) / len(differences), total**2 / rest if rest else math.inf)

    @property
    def margin(self) -> float | None:
        """Half of the interval of 95 % by Student's t, over the rows; None without an error."""
        return None if self.error is None else self.error * float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom))

    def text(self, sign: str = "", separator: str = " ") -> str:
        """The difference and half of its interval, unless all rows are equal: ``+0.1039 ± 0.053``."""
        return f"{self.value:{sign}.4g}{f'{separator}± {self.margin:.2g}' if self.margin else ''}"


@dataclass(frozen=True)
class Column:
    """One task in one of its metrics.

    Attributes:
        task: the stage whose test data it is.
        metric: the metric's name, such as ``loss``.
        values: the metric of the base, and of the model after each stage.
        own: the place of the task's own stage among the values.
        kind: the classes of its model and data. Averages are over tasks of one kind: a loss of preferences is not one of texts.
        rows: for each of the values, what each test row adds to it; empty if it is no mean over rows.

    Shape:
        ``rows``: states x 2 (values and weights) x rows.

    Example:
        >>> loss = Column("sft", "loss", [1.9, 1.2, 1.4], own=1)
        >>> loss.forgetting.text(), loss.backward_transfer.text(), loss.forward_transfer
        ('0.2', '0.2', None)
        >>> Column("sft", "accuracy", [0.5, 0.9, 0.7], own=1).forgetting.text()
        '0.2'
    """

    task: str
    metric: str
    values: Sequence[float]
    own: int
    kind: str = ""
    rows: Sequence[Sequence[Sequence[float]]] = ()

    @property
    def is_lower_better(self) -> bool:
        """Whether a lower value of the metric is better."""
        return BETTER[f"val_{self.metric.partition('/')[0]}"] == "min"

    @property
    def losses(self) -> list[float]:
        """How much worse each value is than the best of them: positive for losses and for accuracies."""
        best = min(self.values) if self.is_lower_better else max(self.values)
        return [abs(value - best) for value in self.values]

    def change(self, before: int, after: int) -> Difference:
        """The metric of a state minus that of another one, by their places among the values."""
        value = self.values[after] - self.values[before]
        return Difference.of(value, self.rows[after], self.rows[before]) if self.rows else Difference(value)

    @property
    def forgetting(self) -> Difference:
        """How much worse the task is at the end than at its best."""
        best, last = self.losses.index(0), len(self.values) - 1
        return self.change(best, last) if self.is_lower_better else self.change(last, best)

    @property
    def backward_transfer(self) -> Difference | None:
        """The metric at the end minus that right after the task's own stage; None if no stage has followed."""
        return None if self.own == len(self.values) - 1 else self.change(self.own, len(self.values) - 1)

    @property
    def forward_transfer(self) -> Difference | None:
        """The metric right before the task's own stage minus that of the base; None if no stage came before."""
        return None if self.own == 1 else self.change(0, self.own - 1)

    @property
    def summaries(self) -> list[Difference | None]:
        """The column's :data:`SUMMARIES`."""
        return [self.forgetting, self.backward_transfer, self.forward_transfer]


@dataclass(frozen=True)
class Matrix:
    """The columns of a sequence of stages.

    Attributes:
        stages: the rows' names, the base's first.
        links: how many links the model of each row has.
        columns: the columns, in the order of the stages.
    """

    stages: Sequence[str]
    links: Sequence[int]
    columns: Sequence[Column]

    @classmethod
    def of(cls, tests: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Matrix":
        """The matrix of each task's tests.

        Args:
            tests: by task, a row for each state of the model, with ``links``, ``stage``, ``kind``, metrics such as
                ``test_loss``, and ``row_values``: by metric, what each test row adds.
        """
        rows = next(iter(tests.values()), [])
        stages = [row["stage"] for row in rows]
        columns = list[Column]()
        for task, task_rows in tests.items():
            for name in [name for metric in SHOWN for name in task_rows[0] if name.partition("/")[0] == f"test_{metric}"]:
                values, of_rows = [row[name] for row in task_rows], [row["row_values"].get(name, ()) for row in task_rows]
                metric, kind = name.removeprefix("test_"), task_rows[0]["kind"]
                columns.append(Column(task, metric, values, stages.index(task), kind, of_rows if all(of_rows) else ()))
        return cls(stages, [row["links"] for row in rows], columns)

    @property
    def averages(self) -> list[str]:
        """A line for each metric that several tasks share, which have one kind of loss: the means of what these tasks have."""
        lines = []
        for key in dict.fromkeys((column.kind, column.metric) for column in self.columns):
            columns = [column for column in self.columns if (column.kind, column.metric) == key]
            if len(columns) > 1:
                tasks, end = ", ".join(column.task for column in columns), statistics.fmean(c.values[-1] for c in columns)
                earlier = [column for column in columns if column.backward_transfer is not None]  # which could be forgotten
                known = [[column.forgetting for column in earlier]]
                known += [[one for column in columns if (one := column.summaries[index])] for index in (1, 2)]
                means = [_text(Difference.mean(some) if some else None, "+" * (some is not known[0])) for some in known]
                summaries = ", ".join(f"{name} {mean}" for name, mean in zip(SUMMARIES, means, strict=True))
                lines.append(f"average {key[1]} of {tasks}: {end:.4g} at the end; {summaries}")
        return lines

    def write(self, folder: Path) -> None:
        """Writes two CSV files, atomically.

        ``matrix.csv`` has a row for each state of the model. ``summary.csv`` has forgetting and transfers, a row for each, with
        the ends of their intervals.

        Args:
            folder: the files'.
        """
        lines: list[list[Any]] = [["links", "stage", *(f"{column.task} {column.metric}" for column in self.columns)]]
        for index, (links, stage) in enumerate(zip(self.links, self.stages, strict=True)):
            lines.append([links, stage, *(column.values[index] for column in self.columns)])
        summaries: list[list[Any]] = [["task", "metric", "summary", "value", "low", "high"]]
        for column in self.columns:
            for name, one in zip(SUMMARIES, column.summaries, strict=True):
                if one is not None:
                    ends = [one.value - one.margin, one.value + one.margin] if one.margin else ["", ""]
                    summaries.append([column.task, column.metric, name, one.value, *ends])
        for file_name, rows in {"matrix.csv": lines, "summary.csv": summaries}.items():
            with atomic_file(folder / file_name) as partial, partial.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)

    def on_screen(self) -> "Table":
        """The matrix as a table, with forgetting and transfers below it."""
        table = _table(self.columns, self.stages)
        for index, name in enumerate(SUMMARIES):
            table.add_row(name, *(_text(column.summaries[index], "+" * (index > 0), "\n") for column in self.columns))
        return table

    def draw(self, path: Path) -> None:
        """Draws the matrix as a heat map, to a PNG file, which is written atomically.

        A cell's color says how much worse it is than the task's best, as a share of the task's range. Cells of tasks right
        after their own stage have a frame.
        """
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        n_rows, n_columns = len(self.stages), len(self.columns)
        figure = Figure(figsize=(2.6 + 1.1 * n_columns, 1.9 + 0.5 * n_rows), layout="constrained")
        axes = figure.add_subplot()
        shares = [[loss / (max(column.losses) or 1.0) for loss in column.losses] for column in self.columns]
        image = axes.imshow(list(zip(*shares, strict=True)), cmap="YlOrRd", vmin=0, vmax=1, aspect="auto")
        for x, column in enumerate(self.columns):
            for y, value in enumerate(column.values):
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", color="white" if shares[x][y] > 0.7 else "black")
            axes.add_patch(Rectangle((x - 0.48, column.own - 0.48), 0.96, 0.96, fill=False, edgecolor="black", linewidth=1.8))
        axes.set_xticks(range(n_columns), [f"{column.task}\n{_with_arrow(column)}" for column in self.columns])
        axes.set_yticks(range(n_rows), [stage if index == 0 else f"after {stage}" for index, stage in enumerate(self.stages)])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("test data of each stage (frame: right after its own stage)")
        bar = figure.colorbar(image, ax=axes, ticks=[0, 1])
        bar.ax.set_yticklabels(["the task's best", "its worst"])
        with atomic_file(path) as partial:
            figure.savefig(partial, format="png", dpi=150)


def scales_table(last: str, columns: Sequence[Column]) -> "Table":
    """What factors change, as a table.

    Args:
        last: the last stage.
        columns: their last two values are those of the model after that stage, and of the same with factors.
    """
    table = _table([replace(column, values=column.values[-2:]) for column in columns], [last, "the same, scaled"])
    table.add_row("change", *(column.change(-2, -1).text("+", "\n") for column in columns))
    return table


def _table(columns: Sequence[Column], names: Sequence[str]) -> "Table":
    """A table of the columns' values; the names are those of its rows."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("model after")
    for column in columns:
        table.add_column(f"{escape(column.task)}\n{_with_arrow(column)}", justify="right")
    for index, name in enumerate(names):
        values = [f"{column.values[index]:.4g}" for column in columns]
        table.add_row(escape(name), *values, end_section=index == len(names) - 1)
    return table


def _with_arrow(column: Column) -> str:
    return f"{column.metric} {'↓' if column.is_lower_better else '↑'}"


def _text(difference: Difference | None, sign: str, separator: str = " ") -> str:
    return "-" if difference is None else difference.text(sign, separator)
