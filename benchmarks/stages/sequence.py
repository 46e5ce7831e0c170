"""A sequence of tasks: its rows, its model, what a row's loss is, and how long it trains."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning import AdaptedModel, LoRAConfig

Row = Any  # what a sequence reads for one example
Data = Mapping[str, Mapping[str, Sequence[Row]]]  # a task's rows for train, validation and test
Run = dict[str, Any]  # the arm, the order's index, the seed and the learning rate


@dataclass(frozen=True)
class TaskSequence(ABC):
    """Tasks that are trained one after another, in several orders.

    Attributes:
        name: that of its file of lines.
        tasks: the tasks' titles, by name.
        orders: the orders of the tasks.
        seeds: how many there are.
        rates: the learning rates that each arm tries first.
        steps: of each stage.
        batch_size: rows of a step.
        eval_batch_size: rows that are evaluated at once.
        n_test: rows of each task for test.
        n_validation: rows of each task for validation.
        n_rows: all rows of a task that are used, at most.
        max_tokens: of a row.
        targets: the names of the layers that are adapted.
        model: where the model's files are.
        autocast: the dtype in which the model computes; None: float32.
        decimals: of a row's losses in the lines.
        chains: the folder with the chains of finished runs, for the scales; it is not in git.
        more_scores: the titles of what the lines have besides the losses, by name: a mean for each stage and task.
    """

    name: str
    tasks: Mapping[str, str]
    orders: Sequence[Sequence[str]]
    seeds: int
    rates: Sequence[float]
    steps: int
    batch_size: int
    eval_batch_size: int
    n_test: int
    n_validation: int
    n_rows: int
    max_tokens: int
    targets: Sequence[str]
    model: Mapping[str, Any]
    chains: Path
    rank: int = 8
    alpha: float = 16
    autocast: torch.dtype | None = torch.bfloat16
    decimals: int = 4
    more_scores: Mapping[str, str] | None = None

    @property
    def file(self) -> Path:
        """Its lines."""
        return Path(__file__).with_name(f"{self.name}.jsonl")

    @abstractmethod
    def read_data(self, folder: Path) -> Data:
        """The rows of all tasks; which are for test and validation depends on no seed of a run."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The base, all of it frozen."""

    @abstractmethod
    def row_scores(self, model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Values for each row: ``loss``, the sum of the losses of all that is predicted, and those of ``more_scores``."""

    @abstractmethod
    def sizes(self, rows: Sequence[Row]) -> list[int]:
        """How many predictions of each row have a loss: its tokens, or 1."""

    @abstractmethod
    def length(self, row: Row) -> int:
        """How many tokens a row has in all."""

    def adapted_model(self, seed: int) -> AdaptedModel:
        """The model with its first link."""
        config = LoRAConfig(list(self.targets), rank=self.rank, alpha=self.alpha, finished_links="merge")
        return AdaptedModel(self.build_model, config, seed=seed, is_saved=True)

    def chain_folder(self, run: Run) -> Path:
        """Where a run's chain is stored."""
        return self.chains / f"{run['arm']}-{run['order']}-{run['seed']}-{run['rate']:g}"
