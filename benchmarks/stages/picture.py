"""The picture of a sequence: each arm's score over the learning rate, and its difference to one LoRA."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.lines import Lines
from benchmarks.stages.arms import ARMS
from benchmarks.stages.measures import at_the_end, difference_of, total
from benchmarks.stages.plan import best_settings, tuned_like, tuning
from benchmarks.stages.sequence import TaskSequence
from benchmarks.stages.tables import of_settings, tokens_of

LOOKS = {
    "lora": ("black", "-"),
    "link": ("tab:orange", "-"),
    "olora": ("tab:blue", "-"),
    "slao": ("tab:purple", "-"),
    "lora-replay": ("tab:green", "-"),
    "link-replay": ("tab:red", "-"),
    "half": ("tab:brown", "-"),
    "average": ("tab:pink", "-"),
    "olora-written": ("tab:blue", "--"),
    "lora-replay-1": ("tab:green", "--"),
    "link-replay-1": ("tab:red", "--"),
    "lora-scaled": ("black", "--"),
    "link-scaled": ("tab:orange", "--"),
}


def draw(sequence: TaskSequence, lines: Lines, path: Path) -> None:
    """Draws the arms that ran one task after another into a PNG file.

    On the left is the test score at the end over the rate, in the first order and seed; a dot marks the rate with the best
    validation. On the right are the differences to one LoRA over all runs, each arm at that rate, with intervals of 95 %.
    """
    arms = [arm for arm in LOOKS if tuning(lines, tuned_like(arm))]
    tokens, best = tokens_of(lines), {arm: best_settings(sequence, lines, arm) for arm in arms}
    loras = of_settings(lines, "lora", best["lora"])

    figure = Figure(figsize=(12.0, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1.0])
    for arm in arms:
        rest = {name: value for name, value in best[arm].items() if name != "rate"}
        tried = [line for line in tuning(lines, arm) if rest.items() <= line.items()]
        curve = {line["rate"]: total(at_the_end(sequence, line, tokens)) for line in tried}
        color, style = LOOKS[arm]
        if len(curve) > 1:
            left.plot(*zip(*sorted(curve.items()), strict=True), color=color, ls=style)
            left.plot(best[arm]["rate"], curve[best[arm]["rate"]], "o", color=color)
    left.set_xscale("log")
    left.set_xticks(
        rates := sorted({line["rate"] for line in lines.results if "rate" in line}), [f"{rate:g}" for rate in rates]
    )
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel("learning rate (dot: the best on validation)")
    left.set_ylabel(f"mean test {sequence.score} at the end")
    left.set_title("first order and seed", fontsize="medium")

    right.axvline(0, color="black", lw=0.8)
    for k, arm in enumerate(arms):
        color, style = LOOKS[arm]
        pairs = [(line, loras[key]) for key, line in of_settings(lines, arm, best[arm]).items() if key in loras]
        ours, theirs = ([at_the_end(sequence, line, tokens) for line in side] for side in zip(*pairs, strict=True))
        mean, low, high = difference_of(ours, theirs, tokens)
        right.plot([low, high], [k, k], color=color, ls=style)
        right.plot(mean, k, "o", color=color)
    right.set_yticks(range(len(arms)), [ARMS[arm].title for arm in arms])
    right.invert_yaxis()
    right.set_xlabel(f"difference of the {sequence.score} to one LoRA that goes on")
    right.set_title(f"{len(loras)} runs, each arm at its own best rate", fontsize="medium")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=130)
