"""The results of a study's runs, one line each, and the choice of the best learning rates."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cola_lightning.writing import atomic_file

Mode = Literal["min", "max"]

# What the runs of a seed should have in common.
UNEQUAL = {
    "base": "begin from the same weights, so their difference is not due to the method alone",
    "steps": "have the same number of optimizer steps (did EarlyStopping or trainer.max_time end them?)",
}


class RunKey(NamedTuple):
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
        trainable_parameters: of one link, at the largest rank; of the model for full fine-tuning.
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
    trainable_parameters: int
    knots: Sequence[int] = ()
    curve: Sequence[tuple[int, float]] = ()
    base: str | None = None

    def __post_init__(self) -> None:
        if not all(value is not None and math.isfinite(value) for value in (self.validation, self.test)):
            object.__setattr__(self, "validation", None)
            object.__setattr__(self, "test", None)

    @property
    def key(self) -> RunKey:
        """The parameters of the run with this result."""
        return RunKey(self.method, self.learning_rate, self.seed)

    def value(self, mode: Mode) -> float:
        """The validation metric, by which runs are compared; of a run that diverged, the worst value."""
        worst = math.inf if mode == "min" else -math.inf
        return worst if self.validation is None else self.validation


def write(results: Iterable[Result], path: Path) -> None:
    """Writes the results as JSON, one line each, atomically."""
    with atomic_file(path, is_shared=True) as partial:
        partial.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results), encoding="utf-8")


def read(path: Path) -> list[Result]:
    """Reads the results that :func:`write` wrote; empty if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Result(**json.loads(line)) for line in lines]


def best_rates(results: Iterable[Result], mode: Mode, tuning_seeds: Sequence[int]) -> dict[str, float]:
    """Each method's learning rate with the best mean validation metric, over the seeds with results for all its rates.

    A rate at which a run diverged is chosen only if this holds for all rates.

    Args:
        results: results of any methods, rates and seeds.
        mode: whether a lower or a higher metric is better.
        tuning_seeds: the seeds by which rates are compared.
    """
    by_method: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        if result.seed in tuning_seeds:
            by_method[result.method][result.learning_rate][result.seed] = result.value(mode)
    best = {}
    for method, by_rate in by_method.items():
        shared = set.intersection(*(set(values) for values in by_rate.values()))
        means = {rate: statistics.fmean(values[seed] for seed in shared or values) for rate, values in by_rate.items()}
        best[method] = (min if mode == "min" else max)(means, key=lambda rate: means[rate])
    return best


def at_best_rates(results: Sequence[Result], mode: Mode, tuning_seeds: Sequence[int]) -> dict[str, list[Result]]:
    """The results of each method at its best rate, by method, in the order of their seeds."""
    ordered = sorted(results, key=lambda result: result.seed)
    return {
        method: [result for result in ordered if (result.method, result.learning_rate) == (method, rate)]
        for method, rate in best_rates(results, mode, tuning_seeds).items()
    }


def warning_about(results: Mapping[str, Sequence[Result]]) -> str:
    """What else than the methods may explain a difference between them, one sentence each; empty if nothing is known."""
    runs = [result for method_results in results.values() for result in method_results if result.validation is not None]
    sentences = []
    for name, text in UNEQUAL.items():
        seeds = [seed for seed, value in {(result.seed, getattr(result, name)) for result in runs} if value is not None]
        if several := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            sentences.append(f"The runs of seed {', '.join(map(str, several))} did not {text}.")
    return " ".join(sentences)
