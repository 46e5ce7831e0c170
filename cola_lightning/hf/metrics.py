"""Metrics of labels or options that are chosen, and of answers that are generated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryF1Score, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.text import SQuAD
from typing_extensions import override


class Mean(MeanMetric):
    """A mean that is accumulated in float32 under every precision: a count in bfloat16 soon stops growing."""

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float32)


class Accuracy(Mean):
    """The share of predictions that equal their targets."""

    @override
    def update(self, predictions: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update((predictions == targets).float())


class AnswerMetric(SQuAD):
    """One of SQuAD's two metrics of answers, from 0 to 1.

    ``f1`` is the mean over rows of an answer's F1 in words, without case, punctuation and articles; ``exact_match`` the share
    of answers that are right except for these and blanks. If neither an answer nor a reference has a word left ("the" and
    "A"), both are 1, as in SQuAD's evaluation since version 2; the protocol's code, like version 1, has an F1 of 0 there.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @override
    def update(self, texts: list[str], references: list[list[str]]) -> None:  # type: ignore[override]
        """Takes answers, and the references of each; the best match counts."""
        predictions = [{"prediction_text": text, "id": str(k)} for k, text in enumerate(texts)]
        answers = ({"text": accepted, "answer_start": [0] * len(accepted)} for accepted in references)
        targets: list[Any] = [{"answers": answer, "id": str(k)} for k, answer in enumerate(answers)]
        super().update(predictions, targets)

    @override
    def compute(self) -> torch.Tensor:  # type: ignore[override]
        return super().compute()[self.name] / 100


# By their names: of the number of options, a metric of predictions and targets; and one of generated answers and references.
METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda n_options: Accuracy(),
    "f1": lambda n_options: BinaryF1Score() if n_options == 2 else MulticlassF1Score(n_options, average="macro"),
    "matthews_corrcoef": MulticlassMatthewsCorrCoef,
}
ANSWER_METRICS = {name: partial(AnswerMetric, name) for name in ("f1", "exact_match")}
