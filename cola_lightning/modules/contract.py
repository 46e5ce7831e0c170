"""The interface of a COLA module that its parts use: they receive the module, and their layer is below its own."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain import Chain
from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.chain.rules import TrainedFactors
from cola_lightning.lora.registry import FinishedLinks
from cola_lightning.modules.link_metrics import LinkMetrics
from cola_lightning.modules.link_plan import LinkPlan
from cola_lightning.modules.optimization import LinkOptimization
from cola_lightning.modules.run_state import RunState
from cola_lightning.modules.seed import Seed
from cola_lightning.modules.trained_state import TrainedState


class COLAParts(Protocol):
    """Arguments and members of :class:`~cola_lightning.modules.COLAModule`."""

    target_modules: str | list[str] | None
    max_rank: int
    finished_links: FinishedLinks
    trained_factors: TrainedFactors
    modules_to_save: list[str]
    save_base: bool
    should_compile: bool
    activation_checkpointing: bool
    init_chain: str | None
    init_links: int | None
    pending: OpenedCheckpoint | None
    seed_choice: Seed
    run_state: RunState
    link_plan: LinkPlan
    link_metrics: LinkMetrics
    optimization: LinkOptimization
    is_wrapped_by_fsdp1: bool
    training: bool
    model: nn.Module

    # fmt: off
    @property
    def trainer(self) -> Trainer: ...
    @property
    def first_chain(self) -> Chain | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def is_sharded(self) -> bool: ...
    @property
    def is_made(self) -> bool: ...
    @property
    def adapted(self) -> AdaptedModel: ...
    @property
    def trained_state(self) -> TrainedState: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def link(self) -> int: ...
    @property
    def base_name(self) -> str: ...
    @property
    def facts_of_base(self) -> dict[str, Any]: ...
    @property
    def constructor_arguments(self) -> dict[str, Any]: ...
    @property
    def overrides_optimizers(self) -> bool: ...
    def build_model(self) -> nn.Module: ...
    def checkpoint_activations(self) -> None: ...
    def configure_model(self) -> None: ...
    def shard_model(self, mesh: DeviceMesh) -> None: ...
    def double(self) -> Any: ...
    def configure_optimizers(self) -> Any: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    # fmt: on


def trainer_of(module: COLAParts) -> Trainer | None:
    """The Trainer that a module is attached to; None if there is none."""
    try:
        trainer = module.trainer
    except RuntimeError:  # Lightning's way to report none
        return None
    return trainer if isinstance(trainer, Trainer) else None  # Fabric's stand-in for one has no counters


def origin_of(module: COLAParts) -> list[str | int | None]:
    """The path of the chain that a module's run started from, and how many of its links were requested."""
    path = module.init_chain and str(Path(os.path.expanduser(module.init_chain)).absolute())
    return [path, module.init_links]
