"""What is measured on a run, and the difference of two arms with its interval.

There are three measures of the loss, each of them a mean over tasks:

* the loss at the end;
* forgetting: how much higher the loss is at the end than at its lowest after an earlier stage, from the task's own stage on.
  The task that came last is left out;
* the loss of each task right after its own stage.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.stages.sequence import TaskSequence

Array = np.ndarray[Any, np.dtype[np.float64]]
# Of a line and the rows' numbers of tokens: the part of each row, which sum up.
Measure = Callable[[TaskSequence, Mapping[str, Any], Array], Array]


def at_the_end(sequence: TaskSequence, line: Mapping[str, Any], tokens: Array) -> Array:
    """The mean loss of the tasks at the end, as its part of each row (tasks x rows)."""
    return _parts(line["matrix"][-1], tokens)


def after_own_stage(sequence: TaskSequence, line: Mapping[str, Any], tokens: Array) -> Array:
    """The mean loss of each task right after its own stage, as its part of each row."""
    return _parts([line["matrix"][_stage(sequence, line, task)][k] for k, task in enumerate(sequence.tasks)], tokens)


def forgetting(sequence: TaskSequence, line: Mapping[str, Any], tokens: Array) -> Array:
    """How much higher the loss is at the end than at its lowest before, from a task's own stage on, as its part of each row."""
    parts, last = np.zeros(tokens.shape), len(line["matrix"]) - 1
    for k, task in enumerate(sequence.tasks):
        if (own := _stage(sequence, line, task)) < last:
            best = min((line["matrix"][stage][k] for stage in range(own, last)), key=sum)
            parts[k] = (np.array(line["matrix"][-1][k]) - np.array(best)) / tokens[k].sum() / last
    return parts


def score_at_the_end(name: str) -> Measure:
    """The mean over tasks of another score at the end. The lines have one mean for each task, and no rows."""

    def measure(sequence: TaskSequence, line: Mapping[str, Any], tokens: Array) -> Array:
        parts: Array = np.array(line[name][-1])[:, None] / len(tokens)
        return parts

    return measure


def _parts(losses: Sequence[Sequence[float]], tokens: Array) -> Array:
    parts: Array = np.array(losses) / tokens.sum(1, keepdims=True) / len(tokens)
    return parts


def _stage(sequence: TaskSequence, line: Mapping[str, Any], task: str) -> int:
    return list(sequence.orders[line["order"]]).index(task)


def difference_of(ours: Sequence[Array], theirs: Sequence[Array], tokens: Array) -> tuple[float, float, float]:
    """The mean difference of a measure, and its interval of 95 %, over the rows of each task and over the runs.

    The runs are pairs of one order and one seed, and all of them score the same rows. The variance over the rows of each task
    and, of several runs, that over the runs are added; the interval is Student's, with the degrees of freedom of Welch and
    Satterthwaite. Of one run, it does not contain how much a difference varies from run to run; of a measure without rows, it
    contains nothing else.

    Args:
        ours: a measure's parts of each row, for each run.
        theirs: those of the other arm, for the same runs.
        tokens: of each row.

    Shape:
        ``ours``, ``theirs``: runs x tasks x rows; ``tokens``: tasks x rows. A measure without rows has one part for each task.
    """
    gaps = np.array(ours) - np.array(theirs)
    n_runs, _, n_rows = gaps.shape
    of_runs, variances = gaps.sum((1, 2)), list[tuple[float, int]]()
    if n_rows > 1:
        of_rows = gaps.mean(0)
        rest = of_rows - of_rows.sum(1, keepdims=True) * tokens / tokens.sum(1, keepdims=True)  # tasks' means: ratios of sums
        variances += [(float(variance), n_rows - 1) for variance in (rest**2).sum(1) * n_rows / (n_rows - 1)]
    if n_runs > 1:
        variances.append((float(of_runs.var(ddof=1)) / n_runs, n_runs - 1))
    total, mean = sum(variance for variance, _ in variances), of_runs.mean()
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances) if total else math.inf
    margin = math.sqrt(total) * stats.t.ppf(0.975, freedom)
    return float(mean), float(mean - margin), float(mean + margin)
