"""The results of a study's runs, a line each, and what is read off them."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cola_lightning.errors import UserError
from cola_lightning.writing import whole_file

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Run:
    """What a run is to be, and what it is known by in its study.

    Attributes:
        method: its name.
        learning_rate: of the optimizer.
        seed: of ``seed_everything``.
    """

    method: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        method: its name.
        seed: of ``seed_everything``.
        learning_rate: of the optimizer.
        rank: of its links, the largest; None where all was trained.
        links: how many; 0 where all was trained.
        validation: the metric on the rows of validation, at the end; None where the run diverged, as for ``test``.
        test: the metric on the rows of test, at the end.
        steps: optimizer steps taken.
        seconds: of the fit, its validations included.
        peak_memory: the most that the process, or its GPU, has held, in MB.
        trainable_parameters: of the first link, or of the model where all was trained.
        knots: the optimizer steps before which a link was finished.
        curve: optimizer steps and the metric on the rows of validation, whenever it was measured.
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

    @property
    def run(self) -> Run:
        """The run that it is of."""
        return Run(self.method, self.learning_rate, self.seed)


def write(results: Iterable[Result], path: Path) -> None:
    """Writes the results as JSON, a line each; the file changes as a whole."""
    with whole_file(path, is_shared=True) as partial:
        partial.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))


def read(path: Path) -> list[Result]:
    """Reads what :func:`write` has written; none where there is no file.

    Raises:
        UserError: for a line that is none of its lines.
    """
    results = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            results.append(Result(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise UserError(f"output: expected a run's result in {path}, line {number}, received {line[:60]!r}") from error
    return results


def best_rates(results: Sequence[Result], mode: Mode, tuning_seeds: Sequence[int]) -> dict[str, float]:
    """The learning rate of each method that is best on validation, in the mean over the seeds that are there for all its rates.

    A rate at which a run diverged is taken only where all did.

    Args:
        results: of any methods, rates and seeds.
        mode: whether a lower or a higher metric is better.
        tuning_seeds: those by which rates are compared.
    """
    best = {}
    for method in dict.fromkeys(result.method for result in results):
        by_rate: dict[float, dict[int, float]] = {}
        for result in results:
            if result.method == method and result.seed in tuning_seeds:
                worst = math.inf if mode == "min" else -math.inf
                value = worst if result.validation is None else result.validation
                by_rate.setdefault(result.learning_rate, {})[result.seed] = value
        if not by_rate:
            continue
        shared = set.intersection(*(set(values) for values in by_rate.values())) or set(tuning_seeds)
        means = {
            rate: statistics.fmean(kept)
            for rate, values in by_rate.items()
            if (kept := [value for seed, value in values.items() if seed in shared])
        }
        best[method] = (min if mode == "min" else max)(means, key=lambda rate: means[rate])
    return best


def at_best_rates(results: Sequence[Result], mode: Mode, tuning_seeds: Sequence[int]) -> dict[str, list[Result]]:
    """The results of each method at its best rate, by method, in the order of their seeds."""
    best = best_rates(results, mode, tuning_seeds)
    chosen: dict[str, list[Result]] = {method: [] for method in best}
    for result in sorted(results, key=lambda result: result.seed):
        if best.get(result.method) == result.learning_rate:
            chosen[result.method].append(result)
    return chosen
