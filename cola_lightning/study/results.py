"""The results of a study's runs, one line each, and the choice of the best learning rates."""

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from cola_lightning.errors import UserError
from cola_lightning.writing import atomic_file

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Run:
    """The parameters of a run, which identify it in its study.

    Attributes:
        method: the method's name.
        learning_rate: the optimizer's learning rate.
        seed: the value of ``seed_everything``.
    """

    method: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        method: the method's name.
        seed: the value of ``seed_everything``.
        learning_rate: the optimizer's learning rate.
        rank: the largest rank of its links; None for full fine-tuning.
        links: number of links; 0 for full fine-tuning.
        validation: the final validation metric; None if the run diverged, or if it or the test metric is not finite.
        test: the final test metric; None likewise.
        steps: optimizer steps taken.
        seconds: duration of the fit, including validations.
        peak_memory: peak memory of the process, or of its GPU, in MB.
        trainable_parameters: of the first link, at the largest rank; of the model for full fine-tuning.
        knots: the optimizer steps before which a link was finished.
        curve: the optimizer step and the validation metric, at each validation.
        base: a hash of the weights before the first step, without a link's; None if they are sharded or were not recorded.
    """

    method: str
    seed: int
    learning_rate: float
    rank: int | None
    links: int
    validation: float | None
    test: float | None
    steps: int
    seconds: float
    peak_memory: float
    trainable_parameters: int
    knots: Sequence[int] = ()
    curve: Sequence[tuple[int, float]] = ()
    base: str | None = None

    def __post_init__(self) -> None:
        if not all(value is not None and math.isfinite(value) for value in (self.validation, self.test)):
            object.__setattr__(self, "validation", None)
            object.__setattr__(self, "test", None)

    @property
    def run(self) -> Run:
        """The run with this result."""
        return Run(self.method, self.learning_rate, self.seed)

    def value(self, mode: Mode) -> float:
        """The validation metric, by which runs are compared; of a run that diverged, the worst value."""
        worst = math.inf if mode == "min" else -math.inf
        return worst if self.validation is None else self.validation


def write(results: Iterable[Result], path: Path) -> None:
    """Writes the results as JSON, one line each, atomically."""
    with atomic_file(path, is_shared=True) as partial:
        partial.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results), encoding="utf-8")


def read(path: Path) -> list[Result]:
    """Reads the results that :func:`write` wrote; empty if there is no file.

    Raises:
        UserError: for a line that is not a result.
    """
    results = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            results.append(Result(**json.loads(line)))
        except (TypeError, ValueError) as error:
            received = line[:60].decode(errors="replace")
            raise UserError(f"output: expected a run's result in {path}, line {number}, received {received!r}") from error
    return results


def best_rates(results: Sequence[Result], mode: Mode, tuning_seeds: Sequence[int]) -> dict[str, float]:
    """Each method's learning rate with the best mean validation metric, over the seeds with results for all its rates.

    A rate at which a run diverged is chosen only if this holds for all rates.

    Args:
        results: results of any methods, rates and seeds.
        mode: whether a lower or a higher metric is better.
        tuning_seeds: the seeds by which rates are compared.
    """
    best = {}
    for method in dict.fromkeys(result.method for result in results):
        by_rate: dict[float, dict[int, float]] = {}
        for result in results:
            if result.method == method and result.seed in tuning_seeds:
                by_rate.setdefault(result.learning_rate, {})[result.seed] = result.value(mode)
        if not by_rate:
            continue
        shared = set.intersection(*(set(values) for values in by_rate.values())) or set(tuning_seeds)
        means = {
            rate: statistics.fmean(compared)
            for rate, values in by_rate.items()
            if (compared := [value for seed, value in values.items() if seed in shared])
        }
        best[method] = (min if mode == "min" else max)(means, key=lambda rate: means[rate])
    return best


def warning_about(results: Mapping[str, Sequence[Result]]) -> str:
    """What keeps a difference between methods from being theirs alone, in a sentence each; empty if nothing is known to."""
    by_seed: dict[int, list[Result]] = {}
    for result in sorted(chain.from_iterable(results.values()), key=lambda result: result.seed):
        by_seed.setdefault(result.seed, []).append(result)
    bases = {seed: {result.base for result in of_seed} - {None} for seed, of_seed in by_seed.items()}
    steps = {seed: {r.steps for r in of_seed if r.validation is not None} for seed, of_seed in by_seed.items()}
    sentences = []
    if which := _seeds_with_several(bases):
        sentences.append(
            f"The runs of {which} did not begin from the same weights: a difference there is not the method's alone."
        )
    if which := _seeds_with_several(steps):
        sentences.append(
            f"The runs of {which} did not take the same number of optimizer steps, as where an EarlyStopping or "
            "trainer.max_time ends them."
        )
    return " ".join(sentences)


def _seeds_with_several(found: Mapping[int, Collection[object]]) -> str:
    seeds = [str(seed) for seed, values in found.items() if len(values) > 1]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""


def at_best_rates(results: Sequence[Result], mode: Mode, tuning_seeds: Sequence[int]) -> dict[str, list[Result]]:
    """The results of each method at its best rate, by method, in the order of their seeds."""
    best = best_rates(results, mode, tuning_seeds)
    chosen: dict[str, list[Result]] = {method: [] for method in best}
    for result in sorted(results, key=lambda result: result.seed):
        if best.get(result.method) == result.learning_rate:
            chosen[result.method].append(result)
    return chosen
