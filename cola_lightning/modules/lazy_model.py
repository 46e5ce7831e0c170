"""The model of a module, made once: when Lightning configures the module, or when it is accessed before that."""

import logging
from typing import Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from cola_lightning.adapted_model import AdaptedModel, Placement
from cola_lightning.errors import UserError
from cola_lightning.lora.inject import inject_lora
from cola_lightning.modules.compilation import compile_model
from cola_lightning.modules.contract import COLAParts, trainer_of
from cola_lightning.modules.seed import choose_seed
from cola_lightning.modules.trained_state import TrainedState
from cola_lightning.seeding import seeded_build
from cola_lightning.sharded import tensors
from cola_lightning.sharded.strategy import shard_module

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
        is_configuring: whether a subclass' own ``configure_model`` is running.
        is_on_meta: whether the module was made inside ``torch.device("meta")``, to measure its size for example.
    """

    def __init__(self, module: COLAParts) -> None:
        self.module = module
        self.adapted: AdaptedModel | None = None
        self.state: TrainedState | None = None
        self.is_made = self.is_being_made = self.is_configuring = self._is_compiled = self._is_configured = False
        self.is_on_meta = torch.empty(0).device.type == "meta"

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
            self.module.seed_choice.check_shared()
            shard_module(trainer.strategy, self.module)
        if self.module.should_compile and not self._is_compiled:
            compile_model(self.module.model)
            self._is_compiled = True

    def make(self) -> None:
        """Makes the model, if there is none; one on the meta device is rebuilt for a run.

        Raises:
            UserError: if another one was assigned, ``build_model`` reads it, or a property hides a child of the module.
        """
        if self.is_on_meta and trainer_of(self.module) is not None:
            self._forget()
            self.is_made = self.is_on_meta = False
        if self.is_made:
            return
        name = type(self.module).__name__
        if "model" in _children(self.module):
            raise UserError(
                f"{name}: expected a base that build_model() returns, to be adapted, received one that was assigned to "
                "self.model"
            )
        for child in _children(self.module):  # torch registers it there, but the property is what one reads
            own = getattr(type(self.module), child, None)
            if isinstance(own, property) and own.fget.__module__.startswith("cola_lightning."):
                raise UserError(f"{name}.{child}: expected another name than a COLAModule's property has, received a module")
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
        """Makes the model if it is accessed before Lightning configures it, in a run or outside of one."""
        if self.is_made or self.is_being_made:
            return
        if trainer_of(self.module) is None and not self.is_configuring:
            self.module.configure_model()
        else:  # configure_model is still to be called, or is running
            self.make()

    def ensure_unless_lightning_asks(self, hook: str | None) -> None:
        """Makes the model, unless Lightning iterates over the module: before ``setup``, or after a run that failed before it.

        A callback that iterates over it in its own ``setup`` (such as BaseFinetuning) needs the model. Lightning never
        configures a module inside another one, which makes its optimizers from what it finds there.

        Args:
            hook: the hook that Lightning is calling.
        """
        trainer = trainer_of(self.module)
        is_own = trainer is not None and cast(object, trainer.lightning_module) is self.module
        if trainer is None or not is_own or (hook == "setup" and trainer.state.status == TrainerStatus.RUNNING):
            self.ensure()

    # ------------------------------------------------------------------ how

    def _prepare(self) -> None:
        """Builds the base, adapts it, and begins a link, ready for a precision of the default dtype."""
        module = self.module
        self.choose_seed()
        how = {"is_saved": module.save_base, "is_known": not self.is_on_meta}
        adapted = self.adapted = AdaptedModel(self._make_base, self._seed, module.base_name, **how)
        module.model, adapted.placement = adapted.model, self.placement
        adapted.trained_factors = module.trained_factors
        state = self.state = TrainedState(module, adapted)
        self._cast(torch.get_default_dtype())
        if not self.is_on_meta:
            state.remember_outside()
            adapted.chain.base["outside"] = state.frozen_outside()
            adapted.chain.base |= module.facts_of_base
        if module.first_chain is not None:
            state.start_from(module.first_chain)
            adapted.start_from(module.first_chain)
        if module.target_modules is not None:
            module.link_plan.begin(adapted)
            if module.pending is None:
                _log_memory_of_merge(adapted)
        if module.activation_checkpointing:
            names = list(adapted.layers)
            module.checkpoint_activations()
            if list(adapted.layers) != names:
                raise UserError("checkpoint_activations: expected the names of the model's layers to stay, received others")
        if not module.training:  # eval() came first
            module.model.eval()

    def choose_seed(self) -> None:
        """Chooses the module's seed if none was given."""
        if self.module.seed_choice.value is None:
            pending = self.module.pending
            self.module.seed_choice = choose_seed(None if pending is None else pending.state.seed)

    def _make_base(self) -> nn.Module:
        module, registries = self.module, _registries(self.module)
        before = [registry.copy() for registry in registries]
        with seeded_build(self._seed, "meta" if self.is_on_meta else "cpu"):
            model = module.build_model()
            if self.is_made:  # a rebuild: what else build_model assigns to the module stays as it was
                for registry, entries in zip(registries, before, strict=True):
                    registry.clear()
                    registry.update(entries)
            if not isinstance(model, nn.Module):
                raise UserError(f"{type(module).__name__}.build_model: expected an nn.Module, received {type(model).__name__}")
            if (targets := module.target_modules) is not None:
                plan, saved = module.link_plan, module.modules_to_save
                numbers = plan.max_rank, plan.alpha, plan.dropout
                inject_lora(model, targets, *numbers, saved, plan.init, module.finished_links)
        return model

    @property
    def _seed(self) -> int:
        assert self.module.seed_choice.value is not None
        return self.module.seed_choice.value

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
        is_own = trainer is not None and cast(object, trainer.strategy.lightning_module) is self.module
        wrapped = trainer.strategy.model if trainer is not None and is_own else None
        device = trainer.strategy.root_device if trainer else self.module.device
        is_sharded = tensors.is_model_sharded(model) or self.module.is_wrapped_by_fsdp1
        return Placement(model if wrapped is None else wrapped, device, is_sharded)

    def check_has_values(self) -> None:
        """Refuses to apply a chain to a model on the meta device."""
        if self.is_on_meta:
            raise UserError(
                "model: expected a module made outside of torch.device('meta') to apply a chain to, received one whose base "
                "has no values"
            )


def check_own_model(module: COLAParts) -> None:
    """Refuses another model in the place of the one that was adapted: a checkpoint's links would be those of neither."""
    if module.model is not module.adapted.model and not module.is_wrapped_by_fsdp1:
        raise UserError(
            "model: expected what build_model() returned, received another that was assigned to self.model: "
            f"{type(module.model).__name__} (a wrapper goes into build_model; model.compile: true compiles in place)"
        )


def _children(module: COLAParts) -> dict[str, nn.Module | None]:
    """The children of a module by name, writable: torch's public iterators skip second names."""
    children: dict[str, nn.Module | None] = _registries(module)[0]
    return children


def _registries(module: COLAParts) -> list[Any]:
    """Where torch registers a module's children, parameters and buffers, writable: there is no public way to restore them."""
    return [vars(module)[name] for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")]


@rank_zero_only
def _log_memory_of_merge(adapted: AdaptedModel) -> None:
    upcast = [layer for layer in adapted.layers.values() if layer.stack is None and layer.source_dtype.endswith("16")]
    if upcast:
        log.info(
            "model.finished_links: merge stores the adapted weights in float32, %.0f MB more than in %s; stack does not",
            sum(layer.weight.numel() for layer in upcast) * 2 / 1e6,
            upcast[0].source_dtype,
        )
