"""What is measured on a run, and the difference of two arms with its interval.

There are three measures of the score (the loss or the accuracy), each of them a mean over tasks:

* the score at the end;
* forgetting: how much worse it is at the end than at its best after an earlier stage, from the task's own stage on. The task
  that came last is left out;
* the score of each task right after its own stage.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.stages.sequence import TaskSequence
from benchmarks.stages.training import of_bits

Array = np.ndarray[Any, np.dtype[np.float64]]
Parts = list[Array]  # of each task: what each of its rows contributes to a measure, which is the sum of all
# Of a line and the rows' numbers of tokens.
Measure = Callable[[TaskSequence, Mapping[str, Any], Sequence[Array]], Parts]


def total(parts: Parts) -> float:
    """A measure."""
    return float(sum(of.sum() for of in parts))


def at_the_end(sequence: TaskSequence, line: Mapping[str, Any], tokens: Sequence[Array]) -> Parts:
    """The mean score of the tasks at the end."""
    return [part / len(tokens) for part in map(_mean, map(_scores, line["matrix"][-1]), tokens)]


def after_own_stage(sequence: TaskSequence, line: Mapping[str, Any], tokens: Sequence[Array]) -> Parts:
    """The mean score of each task right after its own stage."""
    own = [line["matrix"][_stage(sequence, line, task)][k] for k, task in enumerate(sequence.tasks)]
    return [part / len(tokens) for part in map(_mean, map(_scores, own), tokens)]


def forgetting(sequence: TaskSequence, line: Mapping[str, Any], tokens: Sequence[Array]) -> Parts:
    """How much worse a score is at the end than at its best before, from a task's own stage on; of the rows that both have."""
    parts, last = list[Array](), len(line["matrix"]) - 1
    sign = -1 if sequence.score == "accuracy" else 1
    for k, task in enumerate(sequence.tasks):
        if (own := _stage(sequence, line, task)) == last:
            parts.append(np.zeros(len(tokens[k])))
            continue
        best = min((_scores(line["matrix"][stage][k]) for stage in range(own, last)), key=lambda scores: sign * scores.sum())
        n = len(best)
        parts.append(_mean(sign * (_scores(line["matrix"][-1][k])[:n] - best), tokens[k]) / last)
    return parts


def score_at_the_end(name: str) -> Measure:
    """The mean over tasks of another score at the end. The lines have one mean for each task, and no rows."""

    def measure(sequence: TaskSequence, line: Mapping[str, Any], tokens: Sequence[Array]) -> Parts:
        return [np.array([value]) / len(tokens) for value in line[name][-1]]

    return measure


def _scores(of: str | Sequence[float]) -> Array:
    """A task's score for each row, as the lines have it."""
    return np.array(of_bits(of) if isinstance(of, str) else of, dtype=float)


def _mean(scores: Array, tokens: Array) -> Array:
    """What each row contributes to the mean of a task."""
    parts: Array = scores / tokens[: len(scores)].sum()
    return parts


def _stage(sequence: TaskSequence, line: Mapping[str, Any], task: str) -> int:
    return list(sequence.orders[line["order"]]).index(task)


def difference_of(ours: Sequence[Parts], theirs: Sequence[Parts], tokens: Sequence[Array]) -> tuple[float, float, float]:
    """The mean difference of a measure, and its interval of 95 %, over the rows of each task and over the runs.

    The runs are pairs of one order and one seed, and all of them score the same rows. The variance over the rows of each task
    and, of several runs, that over the runs are added; the interval is Student's, with the degrees of freedom of Welch and
    Satterthwaite. Of one run, it does not contain how much a difference varies from run to run; of a measure without rows, it
    contains nothing else.

    Args:
        ours: a measure's parts of each row, for each run.
        theirs: those of the other arm, for the same runs.
        tokens: of each row.
    """
    gaps = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(ours, theirs, strict=True)]
    of_runs, variances = np.array([total(run) for run in gaps]), list[tuple[float, int]]()
    for of_task, weights in zip(zip(*gaps, strict=True), tokens, strict=True):
        n_rows = min(map(len, of_task))  # after a stage fewer rows may be scored than at the end
        if n_rows > 1:
            of_rows = np.mean([part[:n_rows] for part in of_task], 0)
            rest = of_rows - of_rows.sum() * weights[:n_rows] / weights[:n_rows].sum()  # a task's mean: a ratio of sums
            variances.append((float((rest**2).sum()) * n_rows / (n_rows - 1), n_rows - 1))
    if len(of_runs) > 1:
        variances.append((float(of_runs.var(ddof=1)) / len(of_runs), len(of_runs) - 1))
    sum_of_variances, mean = sum(variance for variance, _ in variances), of_runs.mean()
    freedom = sum_of_variances**2 / sum(v**2 / degrees for v, degrees in variances) if sum_of_variances else math.inf
    margin = math.sqrt(sum_of_variances) * stats.t.ppf(0.975, freedom)
    return float(mean), float(mean - margin), float(mean + margin)
