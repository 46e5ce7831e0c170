"""What the files below need of a COLA module, whose class stands above them and is made of them."""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from cola_lightning.chain.current import CurrentLink
from cola_lightning.export.contract import ExportableModule
from cola_lightning.lora.config import LoRAConfig
from cola_lightning.module.optimization import LinkOptimization
from cola_lightning.module.progress import FitProgress
from cola_lightning.module.step_loss import StepLoss


class TrainedModule(ExportableModule, Protocol):
    """What a fit's callback, its log and its checkpoints need of their :class:`~cola_lightning.COLAModule`.

    Attributes:
        lora_config: which layers get links, and what the links are like.
        init_chain: the path of the chain that the run begins from.
        user_seed: what the user gave, by ``model.seed`` or ``seed_everything``; None: nothing.
        requested: which links of the expected state are loaded, and their factors.
        is_tying_knot: whether a knot has begun, and has not succeeded.
        fit_progress: where the fit stands.
        current: the current link's rank, alpha, start, stage and metrics.
        link_optimization: makes each link's optimizer.
        step_loss: of the optimizer step.
    """

    lora_config: LoRAConfig
    init_chain: str | None
    user_seed: int | None
    requested: tuple[int | str | None, Mapping[int | str, float]]
    is_tying_knot: bool
    is_wrapped_by_fsdp1: bool
    fit_progress: FitProgress
    current: CurrentLink
    link_optimization: LinkOptimization
    step_loss: StepLoss

    @property
    def is_made(self) -> bool:
        """Whether the model is made."""

    @property
    def link(self) -> int:
        """Index of the current link."""

    @property
    def seed(self) -> int | None:
        """The seed of every random draw."""

    @property
    def init_chain_source(self) -> list[str | int | None]:
        """The path of ``init_chain``, how many of its links were requested, and ``init_knot`` unless it is ``cola``."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimizer."""
