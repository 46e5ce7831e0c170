"""Metrics of labels or options that are chosen, and of answers that are generated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score, multiclass_matthews_corrcoef
from torchmetrics.text import SQuAD
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override


class Accuracy(MeanMetric):
    """The share of predictions that equal their targets."""

    @override
    def update(self, predictions: Tensor, targets: Tensor, n_options: int = 0) -> None:  # type: ignore[override]
        super().update((predictions == targets).float())


class AllRowsMetric(Metric):
    """A metric that is no mean over rows, so it stores the predictions and targets of all rows.

    Args:
        value: the metric of predictions, targets and the largest number of options.
    """

    predictions: list[Tensor]
    targets: list[Tensor]
    n_options: Tensor

    def __init__(self, value: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.value = value
        self.add_state("n_options", torch.tensor(2), dist_reduce_fx="max")
        self.add_state("predictions", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    @override
    def update(self, predictions: Tensor, targets: Tensor, n_options: int) -> None:
        self.predictions.append(predictions)
        self.targets.append(targets)
        self.n_options = self.n_options.clamp(min=n_options)

    @override
    def compute(self) -> Tensor:
        return self.value(dim_zero_cat(self.predictions), dim_zero_cat(self.targets), int(self.n_options))


def f1(predictions: Tensor, targets: Tensor, n_options: int) -> Tensor:
    """The F1 of the second of two options; of more options, the mean of their F1."""
    if n_options == 2:
        return binary_f1_score(predictions, targets)
    return multiclass_f1_score(predictions, targets, n_options, average="macro")


def matthews_corrcoef(predictions: Tensor, targets: Tensor, n_options: int) -> Tensor:
    """Matthews' correlation coefficient, from -1 to 1; 0 where all predictions or all targets are equal, as in scikit-learn."""
    if bool((predictions == predictions[0]).all() | (targets == targets[0]).all()):
        return torch.zeros((), device=predictions.device)
    return multiclass_matthews_corrcoef(predictions, targets, n_options)


class OfAnswers(SQuAD):
    """One of SQuAD's two metrics of answers, from 0 to 1.

    ``f1`` is the mean over rows of an answer's F1 in words, without case, punctuation and articles; ``exact_match`` the share
    of answers that are right but for these and blanks. Where neither an answer nor a reference has a word left ("the" and "A"),
    both are 1, as in SQuAD's evaluation since version 2; the protocol's code, like that of version 1, has an F1 of 0 there.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @override
    def update(self, texts: list[str], references: list[list[str]]) -> None:  # type: ignore[override]
        """Takes answers, and the references of each; the best match counts."""
        predictions = [{"prediction_text": text, "id": str(k)} for k, text in enumerate(texts)]
        answers = ({"text": some, "answer_start": [0] * len(some)} for some in references)
        targets: list[Any] = [{"answers": some, "id": str(k)} for k, some in enumerate(answers)]
        super().update(predictions, targets)

    @override
    def compute(self) -> torch.Tensor:  # type: ignore[override]
        return super().compute()[self.name] / 100


# By their names: of predictions, targets and the number of options, and of generated answers and their references.
METRICS: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy,
    "f1": partial(AllRowsMetric, f1),
    "matthews_corrcoef": partial(AllRowsMetric, matthews_corrcoef),
}
ANSWER_METRICS = {name: partial(OfAnswers, name) for name in ("f1", "exact_match")}
