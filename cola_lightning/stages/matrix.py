"""The matrix of a sequence of stages: what each stage did to the test data of every stage.

Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory" (arXiv 1706.08840), section 3, for the transfers; Chaudhry et al.,
"Riemannian Walk" (arXiv 1801.10112), section 4.1, for forgetting.
"""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_lightning.study.comparison import BETTER
from cola_lightning.writing import atomic_file

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = ("loss", "accuracy", "f1", "exact_match")  # the metrics that a matrix has, of those that a task logs
SUMMARIES = ("forgetting", "backward transfer", "forward transfer")


@dataclass(frozen=True)
class Column:
    """One task in one of its metrics.

    Attributes:
        task: the stage whose test data it is.
        metric: the metric's name, such as ``loss``.
        values: the metric of the base, and of the model after each stage.
        own: the place of the task's own stage among the values.
        kind: the classes of its model and data. Averages are over tasks of one kind: a loss of preferences is not one of texts.

    Example:
        >>> loss = Column("sft", "loss", [1.9, 1.2, 1.4], own=1)
        >>> round(loss.forgetting, 6), round(loss.backward_transfer, 6), loss.forward_transfer
        (0.2, 0.2, None)
        >>> round(Column("sft", "accuracy", [0.5, 0.9, 0.7], own=1).forgetting, 6)
        0.2
    """

    task: str
    metric: str
    values: Sequence[float]
    own: int
    kind: str = ""

    @property
    def is_lower_better(self) -> bool:
        """Whether a lower value of the metric is better."""
        return BETTER[f"val_{self.metric.partition('/')[0]}"] == "min"

    @property
    def losses(self) -> list[float]:
        """How much worse each value is than the best of them: positive for losses and for accuracies."""
        best = min(self.values) if self.is_lower_better else max(self.values)
        return [abs(value - best) for value in self.values]

    @property
    def forgetting(self) -> float:
        """How much worse the task is at the end than at its best."""
        return self.losses[-1]

    @property
    def backward_transfer(self) -> float | None:
        """The metric at the end minus that right after the task's own stage; None if no stage has followed."""
        return None if self.own == len(self.values) - 1 else self.values[-1] - self.values[self.own]

    @property
    def forward_transfer(self) -> float | None:
        """The metric right before the task's own stage minus that of the base; None if no stage came before."""
        return None if self.own == 1 else self.values[self.own - 1] - self.values[0]

    @property
    def summaries(self) -> list[float | None]:
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
    def of(cls, tests: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str]) -> "Matrix":
        """The matrix of each task's tests.

        Args:
            tests: by task, a row for each state of the model, with ``links``, ``stage`` and metrics such as ``test_loss``.
            kinds: by task, what its metrics depend on.
        """
        rows = next(iter(tests.values()), [])
        stages = [row["stage"] for row in rows]
        columns = [
            Column(task, name.removeprefix("test_"), [row[name] for row in task_rows], stages.index(task), kinds[task])
            for task, task_rows in tests.items()
            for metric in SHOWN
            for name in task_rows[0]
            if name.partition("/")[0] == f"test_{metric}"
        ]
        return cls(stages, [row["links"] for row in rows], columns)

    @property
    def averages(self) -> list[str]:
        """A line for each metric that several tasks share, which have one kind of loss: the means of what these tasks have."""
        lines = []
        for key in dict.fromkeys((column.kind, column.metric) for column in self.columns):
            columns = [column for column in self.columns if (column.kind, column.metric) == key]
            if len(columns) > 1:
                tasks, end = ", ".join(column.task for column in columns), _mean([column.values[-1] for column in columns])
                earlier = [column for column in columns if column.backward_transfer is not None]  # which could be forgotten
                means = [_mean([column.forgetting for column in earlier])]
                means += [_mean([column.summaries[index] for column in columns], "+") for index in (1, 2)]
                summaries = ", ".join(f"{name} {mean}" for name, mean in zip(SUMMARIES, means, strict=True))
                lines.append(f"average {key[1]} of {tasks}: {end} at the end; {summaries}")
        return lines

    def write(self, path: Path) -> None:
        """Writes the values as a CSV file, atomically: a row for each state of the model."""
        with atomic_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["links", "stage", *(f"{column.task} {column.metric}" for column in self.columns)])
            for index, (links, stage) in enumerate(zip(self.links, self.stages, strict=True)):
                writer.writerow([links, stage, *(column.values[index] for column in self.columns)])

    def on_screen(self) -> "Table":
        """The matrix as a table, with forgetting and transfers below it."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        table.add_column("model after")
        for column in self.columns:
            table.add_column(f"{escape(column.task)}\n{_with_arrow(column)}", justify="right")
        for index, stage in enumerate(self.stages):
            values = [f"{column.values[index]:.4g}" for column in self.columns]
            table.add_row(escape(stage), *values, end_section=index == len(self.stages) - 1)
        for index, name in enumerate(SUMMARIES):
            table.add_row(name, *(_number(column.summaries[index], "+" if index else "") for column in self.columns))
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


def _with_arrow(column: Column) -> str:
    return f"{column.metric} {'↓' if column.is_lower_better else '↑'}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4g}"


def _mean(values: Sequence[float | None], sign: str = "") -> str:
    known = [value for value in values if value is not None]
    return _number(statistics.fmean(known) if known else None, sign)
