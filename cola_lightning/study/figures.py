"""The figures of a study."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cola_lightning.study.results import Result

Results = Mapping[str, Sequence[Result]]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")  # safe for color blindness


def draw_curves(results: Results, metric: str, path: Path) -> None:
    """Plots the metric over the optimizer steps, one line per method, with knots as dots.

    Of full fine-tuning it shows the last value alone, as a dashed horizontal line.

    Args:
        results: each method's results, at one learning rate.
        metric: the metric's name.
        path: a PNG file.
    """
    figure, axes = _figure(4.2)
    plot_curves(axes, results)
    axes.set_xlabel("optimizer steps (dots: knots)")
    axes.set_ylabel(f"{metric}, mean over seeds")
    if axes.get_legend_handles_labels()[0]:  # a run that diverged before its first validation has none
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def plot_curves(axes: Any, results: Results, skip: float = 0.0, names: Mapping[str, str] | None = None) -> None:
    """Plots the curves of :func:`draw_curves` into matplotlib axes.

    Args:
        axes: the axes.
        results: each method's results, at one learning rate.
        skip: the share of a run's steps, from its start, that is omitted, where all methods are alike.
        names: the methods' names in the legend, in an order that gives each its color in every figure; None: their names,
            ranks and numbers of links, with colors in the order of the results.
    """
    colors = dict(zip(results if names is None else names, itertools.cycle(COLORS), strict=False))
    for name, method_results in results.items():
        curve = mean_curve(method_results)
        steps = [step for step in curve if step >= skip * max(curve)]
        values = [curve[step] for step in steps]
        if name == "full" and values:
            axes.axhline(values[-1], color="0.4", linestyle="--", linewidth=1.2, label="full fine-tuning, at its end")
        elif values:
            first = method_results[0]
            label = f"{name}, rank {first.rank}" + (f", {first.links} links" if first.links > 1 else "")
            style = {"color": colors[name], "linewidth": 1.6, "marker": "D" if len(steps) == 1 else ""}  # which has no line
            axes.plot(steps, values, label=label if names is None else names[name], **style)
            knots = [knot for knot in first.knots if knot >= steps[0]]
            axes.plot(knots, np.interp(knots, steps, values), "o", color=colors[name], markersize=4)


def mean_curve(results: Sequence[Result]) -> dict[int, float]:
    """The metric's mean over the seeds, at each step at which all have it; of runs validated after their end only, that end."""
    ends = [[(one.steps, one.validation)] if one.validation is not None else [] for one in results]
    curves = [dict(one.curve or end) for one, end in zip(results, ends, strict=True) if one.curve or end]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return {step: statistics.fmean(curve[step] for curve in curves) for step in steps}


def draw_points(results: Results, metric: str, path: Path) -> None:
    """Plots the test metric: one row per method, one point per seed, their mean as a line.

    Args:
        results: each method's results, at one learning rate.
        metric: the validation metric's name.
        path: a PNG file.
    """
    figure, axes = _figure(1.0 + 0.45 * len(results))
    for place, method_results in enumerate(results.values()):
        color = COLORS[place % len(COLORS)]
        if values := [result.test for result in method_results if result.test is not None]:
            axes.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2)
            axes.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=5)
    axes.set_yticks(range(len(results)), list(results))
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel(f"test_{metric.removeprefix('val_')} (a seed a point, their mean a line)")
    figure.savefig(path, dpi=130)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")  # not pyplot's: that would set the backend globally
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
