"""Metrics of chosen options and of generated answers."""

from abc import abstractmethod
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
    def update(self, predictions: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update((predictions == targets).float())


class _OfAllRows(Metric):
    """A metric that is not a mean over rows, and stores them all. Batches give the number of options."""

    predictions: list[Tensor]
    targets: list[Tensor]
    n_options: Tensor

    def __init__(self) -> None:
        super().__init__()
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

    @abstractmethod
    def value(self, predictions: Tensor, targets: Tensor, n_options: int) -> Tensor:
        """The metric over all rows."""


class OptionF1(_OfAllRows):
    """The F1 of the second of two options; of more options, the mean of their F1."""

    @override
    def value(self, predictions: Tensor, targets: Tensor, n_options: int) -> Tensor:
        if n_options == 2:
            return binary_f1_score(predictions, targets)
        return multiclass_f1_score(predictions, targets, n_options, average="macro")


class MatthewsCorrCoef(_OfAllRows):
    """Matthews' correlation coefficient, from -1 to 1; 0 where all predictions or all targets are equal, as in scikit-learn."""

    @override
    def value(self, predictions: Tensor, targets: Tensor, n_options: int) -> Tensor:
        if bool((predictions == predictions[0]).all() | (targets == targets[0]).all()):
            return torch.zeros((), device=predictions.device)
        return multiclass_matthews_corrcoef(predictions, targets, n_options)


class _SQuADShare(SQuAD):
    """One of SQuAD's two metrics of answers, from 0 to 1."""

    name: str

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


class TokenF1(_SQuADShare):
    """The mean over rows of an answer's F1 in words, without case, punctuation and articles.

    Where neither an answer nor a reference has a word left ("the" and "A"), it is 1, as the exact match is, and as in SQuAD's
    evaluation since version 2; the protocol's code, like that of version 1, has 0 there, beside an exact match of 1.
    """

    name = "f1"


class ExactMatch(_SQuADShare):
    """The share of answers that are right but for case, punctuation, articles and blanks."""

    name = "exact_match"
