"""A sequence of tasks: its rows, its model, what a row's loss is, and how long it trains."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cola_lightning import AdaptedModel, LoRAConfig

Row = Any  # what a sequence reads for one example
Data = Mapping[str, Mapping[str, Sequence[Row]]]  # a task's rows for train, validation and test
Run = dict[str, Any]  # the arm, the order's index, the seed, and the settings that are tuned
SETTINGS = ("rate", "weight", "norms")  # the learning rate, and the weights of O-LoRA's penalty and of its factors' norms


@dataclass(frozen=True)
class TaskSequence(ABC):
    """Tasks that are trained one after another, in several orders."""

    name: str  # that of its file of lines
    tasks: Mapping[str, str]  # their titles by their names
    orders: Sequence[Sequence[str]]
    seeds: int  # how many
    rates: Sequence[float]  # the learning rates that each arm tries first
    rounds: Sequence[Sequence[str]]  # the arms, in the order in which they are tuned and repeated
    steps: int  # of a stage
    batch_size: int
    eval_batch_size: int
    n_test: int  # rows of each task, at most
    n_validation: int
    n_rows: int  # all rows of a task that are used, at most
    max_tokens: int  # of a row
    targets: Sequence[str]  # names of the layers that are adapted
    model: Mapping[str, Any]  # where its files are
    chains: Path  # the folder of the chains of finished runs, for the scales; not in git
    rank: int = 8
    alpha: float = 16
    autocast: torch.dtype | None = torch.bfloat16  # None: float32
    decimals: int = 4  # of a row's losses in the lines
    score: Literal["loss", "accuracy"] = "loss"  # what counts: the lines have it for each row
    more_scores: Mapping[str, str] = field(default_factory=dict)  # titles of other scores, of which the lines have the means
    n_between: int | None = None  # test rows of each task that are scored after a stage that is not the last; None: all
    candidates: Sequence[str] = ()  # tasks that are tried alone, to see which can be learned

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
        """Values for each row: ``loss``, the sum of the losses of what is predicted, ``score``, those of ``more_scores``."""

    @abstractmethod
    def sizes(self, rows: Sequence[Row]) -> list[int]:
        """How many predictions of each row have a loss: its tokens, or 1."""

    @abstractmethod
    def length(self, row: Row) -> int:
        """How many tokens a row has in all."""

    def adapted_model(self, seed: int) -> AdaptedModel:
        """The model with its first link."""
        config = LoRAConfig(list(self.targets), rank=self.rank, alpha=self.alpha, finished_links="merge")
        return AdaptedModel(self.build_model, config, seed=seed)

    def chain_folder(self, run: Run) -> Path:
        """Where a run's chain is stored."""
        settings = (f"{run[name]:g}" for name in SETTINGS if name in run)
        return self.chains / "-".join([run["arm"], str(run["order"]), str(run["seed"]), *settings])
