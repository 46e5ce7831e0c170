"""The model of a module, made once: when Lightning configures the module, or when it is accessed before that."""

import logging
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from cola_lightning.adapted_model import AdaptedModel, Placement
from cola_lightning.errors import UserError
from cola_lightning.lora.inject import inject_lora
from cola_lightning.modules.compilation import compile_model
from cola_lightning.modules.run import trainer_of
from cola_lightning.modules.trained_state import TrainedState
from cola_lightning.seeding import seeded_build
from cola_lightning.sharded import tensors
from cola_lightning.sharded.strategy import shard_module

if TYPE_CHECKING:
    from cola_lightning.modules.base import COLAModule

log = logging.getLogger(__name__)


class LazyModel:
    """Makes ``module.model`` once, with its chain and its state.

    Lightning expects a model to be made in ``configure_model``, but many of its users' calls need parameters before.

    Args:
        module: the module that owns the model.

    Attributes:
        adapted: the adapted model and its chain; None before it is made.
        state: the part of the module's state that training changes; None before the model is made.
        is_made: whether the model is made.
        is_being_made: whether it is being made.
    """

    def __init__(self, module: "COLAModule") -> None:
        self.module = module
        self.adapted: AdaptedModel | None = None
        self.state: TrainedState | None = None
        self.is_made = self.is_being_made = self._is_compiled = self._is_configured = False

    # ------------------------------------------------------------------ when

    def configure(self) -> None:
        """Makes the model, and prepares it for the Trainer's precision and strategy, if there is one."""
        self.make()
        check_own_model(self.module)
        if not self._is_configured and self.adapted is not None:  # a subclass' own configure_model may have frozen more
            self.adapted.remember_trained()
            self._is_configured = True
        dtype = torch.get_default_dtype()  # what Lightning's precision sets it to, and will cast the model to
        if dtype != torch.float32:
            self._cast(dtype)
        if (trainer := trainer_of(self.module)) is not None:
            shard_module(trainer.strategy, self.module)
        if self.module.should_compile and not self._is_compiled:
            compile_model(self.module.model)
            self._is_compiled = True

    def make(self) -> None:
        """Makes the model, if there is none.

        Raises:
            UserError: if another one was assigned, ``build_model`` reads it, or the module is inside another one in a fit.
        """
        if self.is_made:
            return
        name = type(self.module).__name__
        if "model" in _children(self.module):
            raise UserError(
                f"{name}: expected a base that build_model() returns, to be adapted, received one that was assigned to "
                "self.model"
            )
        trainer = trainer_of(self.module)
        if trainer is not None and trainer.lightning_module not in (None, self.module):
            raise UserError(
                f"{name}: expected to be the Trainer's own module, received one inside a "
                f"{type(trainer.lightning_module).__name__}: AdaptedModel is made for that"
            )
        if self.is_being_made:
            raise UserError(f"{name}.build_model: expected one that makes the base, received one that reads self.model")
        self.is_being_made = True
        try:
            with torch.device("cpu"):
                self._prepare()
            self.is_made = True
        except BaseException:  # so that a second call does not take it for ready
            self._forget()
            raise
        finally:
            self.is_being_made = False

    def ensure(self) -> None:
        """Makes the model where it is accessed before Lightning configures it; inside of ``build_model`` there is none."""
        if not self.is_being_made:
            self.make()

    # ------------------------------------------------------------------ how

    def _prepare(self) -> None:
        """Builds the base, adapts it, and begins a link, ready for a precision of the default dtype."""
        module = self.module
        self.choose_seed()
        adapted = self.adapted = AdaptedModel(self._make_base, self._seed, module.base_name, is_saved=module.save_base)
        module.model, adapted.placement = adapted.model, self.placement
        adapted.trained_factors = module.trained_factors
        state = self.state = TrainedState(module, adapted)
        self._cast(torch.get_default_dtype())
        state.remember_outside()
        adapted.chain.base["outside"] = state.frozen_outside()
        adapted.chain.base |= module.facts_of_base
        if module.first_chain is not None:
            state.start_from(module.first_chain)
            adapted.start_from(module.first_chain)
        if module.target_modules is not None:
            adapted.begin_link(module.schedule.rank(module.link), module.schedule.alpha(module.link))
            if module.pending is None:
                _log_memory_of_merge(adapted)
        if module.activation_checkpointing:
            module.checkpoint_activations()
        if not module.training:  # eval() came first
            module.model.eval()

    def choose_seed(self) -> None:
        """Chooses the module's seed if none was given."""
        pending = self.module.pending
        self.module.run.choose_seed(None if pending is None else pending.state.seed)

    def _make_base(self) -> nn.Module:
        module = self.module
        before = {name: dict(vars(module)[name]) for name in ("_modules", "_parameters", "_buffers")}
        with seeded_build(self._seed):
            model = module.build_model()
            if self.is_made:  # a rebuild: what else build_model assigns to the module stays as it was
                for name, entries in before.items():
                    vars(module)[name].update(entries)
            if not isinstance(model, nn.Module):
                raise UserError(f"{type(module).__name__}.build_model: expected an nn.Module, received {type(model).__name__}")
            if (targets := module.target_modules) is not None:
                saved = module.modules_to_save
                inject_lora(model, targets, modules_to_save=saved, finished_links=module.finished_links, **module.link_options)
        return model

    @property
    def _seed(self) -> int:
        assert self.module.run.seed is not None
        return self.module.run.seed

    def _forget(self) -> None:
        _children(self.module).pop("model", None)
        self.adapted = self.state = None
        self._is_configured = False

    def _cast(self, dtype: torch.dtype) -> None:
        """Casts the model as Lightning will: its own cast comes only after a checkpoint's values are loaded."""
        assert self.adapted is not None
        self.adapted.cast(dtype)

    # ------------------------------------------------------------------ where

    def placement(self) -> Placement:
        """The placement of the model: in all of a strategy's wrappers, on the training device."""
        trainer, model = trainer_of(self.module), self.module.model
        is_own = trainer is not None and trainer.strategy.lightning_module is self.module
        wrapped = trainer.strategy.model if trainer is not None and is_own else None
        device = trainer.strategy.root_device if trainer else self.module.device
        is_sharded = tensors.is_model_sharded(model) or self.module.is_wrapped_by_fsdp1
        return Placement(model if wrapped is None else wrapped, device, is_sharded)


def check_own_model(module: "COLAModule") -> None:
    """Refuses another model in the place of the one that was adapted: a checkpoint's links would be those of neither."""
    if module.model is not module.adapted.model and not module.is_wrapped_by_fsdp1:
        raise UserError(
            "model: expected what build_model() returned, received another that was assigned to self.model: "
            f"{type(module.model).__name__} (a wrapper goes into build_model; model.compile: true compiles in place)"
        )


def _children(module: "COLAModule") -> dict[str, nn.Module | None]:
    """The children of a module by name, writable: torch's public iterators skip second names."""
    children: dict[str, nn.Module | None] = vars(module)["_modules"]
    return children


@rank_zero_only
def _log_memory_of_merge(adapted: AdaptedModel) -> None:
    upcast = [layer for layer in adapted.layers.values() if layer.stack is None and layer.source_dtype.endswith("16")]
    if upcast:
        log.info(
            "model.finished_links: merge stores the adapted weights in float32, %.0f MB more than in %s; stack does not",
            sum(layer.weight.numel() for layer in upcast) * 2 / 1e6,
            upcast[0].source_dtype,
        )
