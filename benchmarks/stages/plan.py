"""Which runs are missing, the most telling ones first."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.lines import Lines
from benchmarks.stages.arms import ARMS
from benchmarks.stages.scales import fit_scales
from benchmarks.stages.sequence import Data, Run, TaskSequence
from benchmarks.stages.training import evaluate, matrices, train, validation_losses


def missing_runs(sequence: TaskSequence, lines: Lines) -> Iterator[Run]:
    """The runs that have no line, in the order of their use; rates come from the lines of the runs before them."""
    first, more = ("lora", "link"), ("lora-replay", "link-replay", "half")
    orders = range(len(sequence.orders))
    yield from _tuned(sequence, lines, first)
    yield from _repeated(sequence, lines, first, orders)
    yield from _repeated(sequence, lines, ("lora-scaled", "link-scaled"), orders)
    yield from _tuned(sequence, lines, more)
    yield from _repeated(sequence, lines, more, orders)
    yield from _tuned(sequence, lines, ("link-orthogonal", "joint", "alone"))
    yield from _repeated(sequence, lines, ("link-orthogonal",), orders)
    yield from _repeated(sequence, lines, ("joint", "alone"), orders[:1])
    yield from _repeated(sequence, lines, ("lora",), orders, like="link")  # which of the two is it, the knot or the rate?


def _tuned(sequence: TaskSequence, lines: Lines, arms: Sequence[str]) -> Iterator[Run]:
    """The rates of each arm with the first order and seed; one more as long as the best one is at an edge."""
    yield from lines.missing({"arm": arm, "order": 0, "seed": 0, "rate": rate} for rate in sequence.rates for arm in arms)
    for arm in arms:
        rates, best = sorted(line["rate"] for line in tuning(lines, arm)), best_rate(lines, arm)
        if best in (rates[0], rates[-1]):
            yield {"arm": arm, "order": 0, "seed": 0, "rate": best / 2 if best == rates[0] else best * 2}


def _repeated(
    sequence: TaskSequence, lines: Lines, arms: Sequence[str], orders: Sequence[int], like: str | None = None
) -> Iterator[Run]:
    """Each arm at its best rate, or at that of another arm, with these orders and all seeds."""
    wanted = [(order, seed, arm) for seed in range(sequence.seeds) for order in orders for arm in arms]
    for order, seed, arm in wanted:
        yield from lines.missing([{"arm": arm, "order": order, "seed": seed, "rate": best_rate(lines, like or arm)}])


def tuning(lines: Lines, arm: str) -> list[dict[str, Any]]:
    """An arm's lines of the first order and seed."""
    return [line for line in lines.results if (line["arm"], line.get("order"), line.get("seed")) == (arm, 0, 0)]


def best_rate(lines: Lines, arm: str) -> float:
    """The rate with the lowest mean loss on the validation of the first order and seed."""
    best = min(tuning(lines, ARMS[arm].scaled or arm), key=lambda line: sum(line["validation"]))
    return float(best["rate"])


def run_missing(sequence: TaskSequence, lines: Lines, data: Data) -> None:
    """Adds the line of the base, and those of the missing runs."""
    if lines.missing([{"arm": "base"}]):
        model, tokens = sequence.adapted_model(0).model, [sequence.sizes(data[task]["test"]) for task in sequence.tasks]
        found = matrices([evaluate(sequence, model, data, "test")])
        lines.add({"arm": "base", "tokens": tokens} | found | {"validation": validation_losses(sequence, model, data)})
    while (run := next(missing_runs(sequence, lines), None)) is not None:
        lines.add(run | (fit_scales if ARMS[run["arm"]].scaled else train)(sequence, run, data))
