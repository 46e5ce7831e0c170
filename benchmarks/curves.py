"""Curves of a study's runs."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cola_lightning.study.results import Result

Results = Mapping[str, Sequence[Result]]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")  # safe for color blindness


def plot_curves(axes: Any, results: Results, skip: float, names: Mapping[str, str]) -> None:
    """Plots the metric over the optimizer steps, one line per method, with knots as dots.

    Of full fine-tuning it shows the last value alone, as a dashed horizontal line.

    Args:
        axes: matplotlib's.
        results: each method's results, at one learning rate.
        skip: the share of a run's steps, from its start, that is omitted, where all methods are alike.
        names: the methods' names in the legend, in an order that gives each its color in every figure.
    """
    colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
    for name, method_results in results.items():
        curve = mean_curve(method_results)
        steps = [step for step in curve if step >= skip * max(curve)]
        values = [curve[step] for step in steps]
        if name == "full" and values:
            axes.axhline(values[-1], color="0.4", linestyle="--", linewidth=1.2, label="full fine-tuning, at its end")
        elif values:
            style = {"color": colors[name], "linewidth": 1.6, "marker": "D" if len(steps) == 1 else ""}  # which has no line
            axes.plot(steps, values, label=names[name], **style)
            knots = [knot for knot in method_results[0].knots if knot >= steps[0]]
            axes.plot(knots, np.interp(knots, steps, values), "o", color=colors[name], markersize=4)


def mean_curve(results: Sequence[Result]) -> dict[int, float]:
    """The metric's mean over the seeds, at each step at which all have it; of runs validated after their end only, that end."""
    ends = [[(one.steps, one.validation)] if one.validation is not None else [] for one in results]
    curves = [dict(one.curve or end) for one, end in zip(results, ends, strict=True) if one.curve or end]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return {step: statistics.fmean(curve[step] for curve in curves) for step in steps}
