"""Which runs are missing, the most telling ones first."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.lines import Lines
from benchmarks.stages.arms import ARMS
from benchmarks.stages.scales import rescale
from benchmarks.stages.sequence import SETTINGS, Data, Run, TaskSequence
from benchmarks.stages.training import evaluate, matrices, of_validation, train, validation_scores

Settings = dict[str, float]
MOST = 9  # values of one setting that are tried


def missing_runs(sequence: TaskSequence, lines: Lines) -> Iterator[Run]:
    """The runs that have no line, in the order of their use; settings come from the lines of the runs before them.

    Of each round, the arms are tuned on the first order and seed, then repeated with the other orders and seeds. One LoRA runs
    at their rates, too: which of the two makes the difference, the method or the rate?
    """
    for arms in sequence.rounds:
        for arm in arms:
            yield from _tuned(sequence, lines, arm)
        yield from _repeated(sequence, lines, [(arm, best_settings(sequence, lines, arm)) for arm in arms])
        rates = [best_settings(sequence, lines, arm)["rate"] for arm in arms if ARMS[arm].n_orders is None]
        yield from _repeated(sequence, lines, [("lora", {"rate": rate}) for rate in dict.fromkeys(rates)])


def _tuned(sequence: TaskSequence, lines: Lines, arm: str) -> Iterator[Run]:
    """The first order and seed of an arm with several settings."""
    if ARMS[arm].of is not None and ARMS[arm].factors == "fitted":
        return
    rest: Settings = {}
    if ARMS[arm].penalty is not None:
        rate = best_settings(sequence, lines, "link")["rate"]
        yield from _bracketed(sequence, lines, arm, "weight", (0.5, 0.05, 5.0), 10, {"rate": rate, "norms": 0.0})
        weight = best_settings(sequence, lines, arm)["weight"]
        norms = (0.0, 0.1) if ARMS[arm].penalty == "released" else (0.0,)
        yield from lines.missing(_first(arm, {"rate": rate, "weight": weight, "norms": norm}) for norm in norms)
        best = best_settings(sequence, lines, arm)
        rest = {"weight": best["weight"], "norms": best["norms"]}
        yield from _bracketed(sequence, lines, arm, "rate", (rate, rate / 2, rate * 2), 2, rest)
    else:
        yield from _bracketed(sequence, lines, arm, "rate", sequence.rates, 2, rest)


def _bracketed(
    sequence: TaskSequence, lines: Lines, arm: str, name: str, values: Sequence[float], factor: float, rest: Settings
) -> Iterator[Run]:
    """Values of one setting, with the rest as it is; one more as long as the best one is at an edge."""
    yield from lines.missing(_first(arm, rest | {name: value}) for value in values)
    tried = [line for line in tuning(lines, arm) if rest.items() <= line.items()]
    found, best = sorted(line[name] for line in tried), _best(sequence, tried)[name]
    if best in (found[0], found[-1]) and len(found) < MOST:
        yield _first(arm, rest | {name: best / factor if best == found[0] else best * factor})


def _first(arm: str, settings: Settings) -> Run:
    return {"arm": arm, "order": 0, "seed": 0} | settings


def _repeated(sequence: TaskSequence, lines: Lines, arms: Sequence[tuple[str, Settings]]) -> Iterator[Run]:
    """Each arm with its settings, with its orders and all seeds."""
    for seed in range(sequence.seeds):
        for order in range(len(sequence.orders)):
            of_order = [(arm, settings) for arm, settings in arms if order < (ARMS[arm].n_orders or len(sequence.orders))]
            yield from lines.missing({"arm": arm, "order": order, "seed": seed} | settings for arm, settings in of_order)


def tuning(lines: Lines, arm: str) -> list[dict[str, Any]]:
    """An arm's lines of the first order and seed."""
    return [line for line in lines.results if (line["arm"], line.get("order"), line.get("seed")) == (arm, 0, 0)]


def tuned_like(arm: str) -> str:
    """The arm whose settings an arm has: its own, except if it only fits factors afterwards."""
    of = ARMS[arm].of
    return of if of is not None and ARMS[arm].factors == "fitted" else arm


def best_settings(sequence: TaskSequence, lines: Lines, arm: str) -> Settings:
    """The settings with the best mean score on the validation of the first order and seed."""
    best = _best(sequence, tuning(lines, tuned_like(arm)))
    return {name: best[name] for name in SETTINGS if name in best}


def _best(sequence: TaskSequence, tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    sign = 1 if sequence.score == "accuracy" else -1
    return max(tried, key=lambda line: sign * float(np.mean(line["validation"])))


def planned(sequence: TaskSequence, lines: Lines) -> list[Run]:
    """All runs that are missing, if no further value of a setting turns out to be needed."""
    expected, runs = Lines(lines.path), list[Run]()
    expected.results = list(lines.results)
    worst = [0.0 if sequence.score == "accuracy" else float("inf")]
    while (run := next(missing_runs(sequence, expected), None)) is not None:
        expected.results.append(run | {"validation": worst})
        runs.append(run)
    return runs


def run_missing(sequence: TaskSequence, lines: Lines, data: Data) -> None:
    """Adds the line of the base, and those of the missing runs."""
    if lines.missing([{"arm": "base"}]):
        model, tokens = sequence.adapted_model(0).model, [sequence.sizes(data[task]["test"]) for task in sequence.tasks]
        found = matrices(sequence, [evaluate(sequence, model, data, "test")])
        validation = of_validation(sequence, validation_scores(sequence, model, data))
        lines.add({"arm": "base", "tokens": tokens} | found | validation)
    while (run := next(missing_runs(sequence, lines), None)) is not None:
        result = (train if ARMS[run["arm"]].of is None else rescale)(sequence, run, data)
        lines.add(run | result)
        rest = planned(sequence, lines)
        took = [line["seconds"] for line in lines.results if "seconds" in line][-20:]
        score, hours = np.mean(result["validation"]), len(rest) * np.mean(took) / 3600
        print(
            f"{run}: {score:.3f} in {result['seconds']} s; at least {len(rest)} runs are missing, {hours:.1f} hours", flush=True
        )
