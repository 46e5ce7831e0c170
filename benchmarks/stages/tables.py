"""The tables of a sequence's lines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.lines import Lines
from benchmarks.stages.arms import ARMS
from benchmarks.stages.measures import (
    Array,
    Measure,
    after_own_stage,
    at_the_end,
    difference_of,
    forgetting,
    score_at_the_end,
    total,
)
from benchmarks.stages.plan import best_settings, tuned_like, tuning
from benchmarks.stages.sequence import TaskSequence


def table(sequence: TaskSequence, lines: Lines) -> list[list[str]]:
    """The head, and a row for each arm at its best rate; differences are over the runs that both arms have.

    The last row is one LoRA at the best rate of a new link, if there are several such runs.
    """
    measures: dict[str, Measure] = {f"{sequence.score} at the end": at_the_end, "forgetting": forgetting}
    measures["after its own stage"] = after_own_stage
    measures |= {title: score_at_the_end(name) for name, title in sequence.more_scores.items()}
    found = [["arm", "rate", "runs", *(cell for title in measures for cell in (title, "to one LoRA"))]]
    found[0].insert(5, "to a new link")
    if not (tokens := tokens_of(lines)):
        return found
    rows = [(ARMS[arm].title, arm, best_settings(sequence, lines, arm)) for arm in ARMS if tuning(lines, tuned_like(arm))]
    best = {arm: settings for _, arm, settings in rows}
    loras, links = (of_settings(lines, arm, best.get(arm, {})) for arm in ("lora", "link"))
    if best.keys() >= {"lora", "link"} and best["lora"] != best["link"] and len(of_settings(lines, "lora", best["link"])) > 1:
        rows.append(("one LoRA, at the rate of a new link", "lora", best["link"]))
    for title, arm, settings in rows:
        if not (of_arm := of_settings(lines, arm, settings)):
            continue
        cells = [title, f"{settings['rate']:g}", str(len(of_arm))]
        for measure in measures.values():
            is_of_end = measure not in (forgetting, after_own_stage)
            has_measure = is_of_end or len(next(iter(of_arm.values()))["matrix"]) == len(sequence.tasks)
            means = [total(measure(sequence, line, tokens)) for line in of_arm.values()] if has_measure else []
            cells.append(f"{np.mean(means):.3f}" if means else "")
            for others in (loras, links) if measure is at_the_end else (loras,):
                pairs = [(line, others[key]) for key, line in of_arm.items() if key in others and line is not others[key]]
                cells.append(_difference(sequence, measure, pairs, tokens) if has_measure and pairs else "")
        found.append(cells)
    return found


def _difference(sequence: TaskSequence, measure: Measure, pairs: Sequence[tuple[Any, Any]], tokens: Sequence[Array]) -> str:
    """The mean difference of two arms' lines with its interval, if there is one."""
    ours, theirs = ([measure(sequence, line, tokens) for line in side] for side in zip(*pairs, strict=True))
    mean, low, high = difference_of(ours, theirs, tokens)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if low < high else f"{mean:+.3f}"


def table_of_rates(sequence: TaskSequence, lines: Lines) -> list[list[str]]:
    """The head, the base, and a row for each run of the first order and seed: its losses at the end, and its measures."""
    found = [["arm", "rate", "validation", *sequence.tasks.values(), "mean", "forgetting", "after its own stage"]]
    tokens, order = tokens_of(lines), list(ARMS)
    ends = [line for line in lines.results if line["arm"] == "base"]
    of_rates = [line for arm in ARMS for line in tuning(lines, arm)]
    for line in ends + sorted(of_rates, key=lambda line: (order.index(line["arm"]), line["rate"])):
        scores = at_the_end(sequence, line, tokens)
        cells = [ARMS[line["arm"]].title, f"{line['rate']:g}"] if line["arm"] in ARMS else ["before training", ""]
        if "scales" in line:
            cells[0] += f" ({', '.join(f'{scale:g}' for scale in line['scales'])})"
        cells.append(f"{np.mean(line['validation']):.3f}")
        cells += [f"{of.sum() * len(sequence.tasks):.3f}" for of in scores] + [f"{total(scores):.3f}"]
        measures = (forgetting, after_own_stage) if len(line["matrix"]) == len(sequence.tasks) else ()
        found.append(cells + ([f"{total(measure(sequence, line, tokens)):.3f}" for measure in measures] or [""] * 2))
    return found


def of_settings(lines: Lines, arm: str, settings: Mapping[str, float]) -> dict[tuple[int, int], dict[str, Any]]:
    """The lines of an arm with these settings, by order and seed."""
    found = [line for line in lines.results if line["arm"] == arm and settings.items() <= line.items()]
    return {(line["order"], line["seed"]): line for line in found}


def tokens_of(lines: Lines) -> list[Array]:
    """How many tokens with a loss each test row has, of each task; empty without the base's line."""
    base: dict[str, Any] = next((line for line in lines.results if line["arm"] == "base"), {})
    return [np.array(of, dtype=float) for of in base.get("tokens", [])]
