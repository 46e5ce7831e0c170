"""A Lightning module around an adapted model, which is made when it is first needed."""

import functools
import inspect
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parameter import is_lazy
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.adapted_model import AdaptedModel, Placement
from cola_lightning.chain.base import weight_of
from cola_lightning.chain.chain import OUTSIDE, Chain
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.schedule import FitPosition, TrainedFactors
from cola_lightning.errors import UserError
from cola_lightning.export.contract import NamedBase
from cola_lightning.lora.config import LoRAConfig
from cola_lightning.module.arguments import RecordsArguments, class_path
from cola_lightning.module.fsdp import repeated_blocks, shard_module
from cola_lightning.module.run import Run, StepLoss, run_of, trainer_of


class BaseCOLAModule(LightningModule, RecordsArguments):
    """The part of a :class:`~cola_lightning.COLAModule` that makes its model, and knows what it consists of.

    Lightning makes a model late, in ``configure_model``, and much reads it before: optimizers, summaries, a subclass' own
    ``__init__``. So it is made when it is first read.

    Args:
        lora_config: which layers get links, and what the links are like. ``build_model`` may replace it.
        run: the state of the module's run.

    Attributes:
        labels_of_base: a classifier's labels, which are a part of the base's identity; None: not known.
        trained_factors: these and the following are arguments of :class:`~cola_lightning.COLAModule`, which sets them.
    """

    labels_of_base: list[str] | None = None
    trained_factors: TrainedFactors
    init_chain: str | None
    init_links: int | None
    save_base: bool
    should_compile: bool
    activation_checkpointing: bool

    def __init__(self, lora_config: LoRAConfig, run: Run) -> None:
        super().__init__()
        self.lora_config, self._cola_run, self.step_loss = lora_config, run, StepLoss()
        self._adapted: AdaptedModel | None = None  # made by configure_model, or where the model is read before that
        self._is_making = self._is_configured = self.is_wrapped_by_fsdp1 = False

    # ------------------------------------------------------------------ defined by a subclass

    def build_model(self) -> nn.Module:
        """Builds the base model.

        It is called under the default dtype float32, with the global generators of Python, numpy and torch seeded by
        ``self.seed``. It may be called again, for example to go back to an earlier link, and must then build an identical
        model, of new parameters.

        Returns:
            The base, with its pretrained weights; its target layers are then adapted in place.
        """
        raise UserError(f"model: {type(self).__name__} needs a build_model() that returns its base")

    def checkpoint_activations(self) -> None:
        """Applies ``activation_checkpointing`` to ``self.model``; override it for a model that is not Hugging Face's.

        The names of its layers must not change (a wrapper module changes them), and copies of it must work (a closure over
        this model would use it in its copies, too): set a flag that the blocks' own ``forward`` reads, for example.
        """
        model: Any = self.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # before 5.24
        enable({"use_reentrant": False})
        model.disable_input_require_grads()  # needed by reentrant checkpointing alone; it costs a gradient of the embeddings

    def compile_model(self, **options: Any) -> None:
        """Applies ``compile`` to ``self.model``; override it to compile a part.

        Args:
            **options: of ``torch.compile``.
        """
        self.model.compile(**options)

    def shard_model(self, mesh: DeviceMesh) -> None:
        """Shards ``self.model`` over the processes of a one-dimensional mesh; called once, under FSDP2, with links injected.

        By default, a Hugging Face decoder is sharded by its repeated blocks, and another model by the blocks of its
        ``ModuleList`` that hold more than single layers. Override it with your own ``fully_shard`` calls: trainable parameters
        are hidden from them, and replicated.
        """
        for block in repeated_blocks(self.model):  # each is gathered when it computes, the rest once a step
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    @property
    def base_name(self) -> str:
        """The base's name, in messages and next to its fingerprint."""
        return class_path(type(self))

    @property
    def named_base(self) -> NamedBase | None:
        """For exports: the base that transformers and PEFT load by its name; None: they know no name of it."""
        return None

    # ------------------------------------------------------------------ its parts

    @property
    def adapted(self) -> AdaptedModel:
        """The adapted model and its chain, without Lightning."""
        self._ensure_model()
        assert self._adapted is not None
        return self._adapted

    @property
    def is_made(self) -> bool:
        """Whether the model is made."""
        return self._adapted is not None

    @functools.cached_property
    def first_chain(self) -> Chain | None:
        """The chain that a run begins from (``init_chain``); None if it begins from the base, or a checkpoint is loaded.

        Raises:
            UserError: if there is no such chain.
        """
        if self.init_chain is None or run_of(self).pending is not None:
            return None
        return read_chain(self.init_chain, self.init_links, "model.init_chain")

    @property
    def chain(self) -> Chain:
        """The finished links, without the current one, which :meth:`full_chain` adds; none before the model is made."""
        return Chain() if self._adapted is None else self._adapted.chain

    @property
    def link(self) -> int:
        """Index of the current link: how many are finished."""
        return len(self.chain)

    @property
    def link_start(self) -> FitPosition:
        """Epoch and optimizer step at which the current link began."""
        return run_of(self).link_start

    @property
    def seed(self) -> int | None:
        """The seed of every random draw; if none was given, None until the model is made."""
        return run_of(self).seed

    @property
    def is_base_in_checkpoint(self) -> bool:
        """For ``build_model``: whether only shapes matter, as the base's weights come from a checkpoint."""
        pending = run_of(self).pending
        is_pending = pending is not None and "base_weights" in pending.state.facts
        return is_pending or (self._adapted is not None and self._adapted.base_weights is not None)

    @property
    def init_chain_source(self) -> list[str | int | None]:
        """The path of ``init_chain``, and how many of its links were requested."""
        path = self.init_chain and str(Path(os.path.expanduser(self.init_chain)).absolute())
        return [path, self.init_links]

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 or FSDP1 has sharded the model."""
        return self._placement().is_sharded

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimizer: the current link's, fully trained modules', and those outside of the model."""
        return [parameter for _, parameter in self.named_trained_parameters()]

    def named_trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The :meth:`trained_parameters` with their names in the module."""
        frozen = {id(factor) for factor in self.adapted.frozen_factors()}
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad and id(p) not in frozen]

    # ------------------------------------------------------------------ the model

    @override
    def configure_model(self) -> None:
        """Makes the model and its first link, once, and prepares it for the Trainer's precision and strategy, if there is one.

        A subclass' own ``configure_model`` must call ``super().configure_model()``, and what it freezes before that counts as
        frozen in the base.
        """
        self._ensure_model()
        if self.model is not self.adapted.model and not self.is_wrapped_by_fsdp1:
            raise UserError(
                f"model: a {type(self.model).__name__} was assigned to self.model, in place of what build_model() returned. A "
                "wrapper belongs in build_model, and model.compile true compiles in place"
            )
        if not self._is_configured:  # a subclass' own configure_model may have frozen more
            self.adapted.trained.remember()
        if (dtype := torch.get_default_dtype()) != torch.float32:  # what Lightning's precision will cast the model to
            self.adapted.cast(dtype)
        if (trainer := trainer_of(self)) is not None:
            shard_module(trainer.strategy, self)
        if self.should_compile and not self._is_configured:
            self.compile_model(**_compile_options())
        self._is_configured = True

    def make_model(self) -> None:
        """Makes and configures the model where no Trainer has done so; a second call changes nothing.

        Raises:
            UserError: for a subclass whose ``configure_model`` leaves ``super()`` out.
        """
        if not self._is_configured:
            self.configure_model()
        if not self._is_configured:
            raise UserError(
                f"{type(self).__name__}.configure_model must call super().configure_model(), which casts, shards and compiles "
                "the model"
            )

    def _ensure_model(self) -> None:
        """Makes the model, unless it is made or is being made: Lightning calls configure_model late; many read it before."""
        if vars(self).get("_is_making", True) or self._adapted is not None:  # that is, after __init__
            return
        trainer = trainer_of(self)
        if trainer is not None and trainer.lightning_module not in (None, self):
            raise UserError(f"{type(self).__name__}: cannot be used inside another LightningModule. Use an AdaptedModel there")
        self._is_making = True
        try:
            with torch.device("cpu"):
                self._make_model()
        except BaseException:  # so that a second call does not take it for ready
            self._modules.pop("model", None)
            self._adapted = None
            raise
        finally:
            self._is_making = False

    def _make_model(self) -> None:
        """Builds the base, adapts it, and begins a link, ready for a precision of the default dtype."""
        run = run_of(self)
        run.choose_seed(None if run.pending is None else run.pending.state.facts["seed"])
        assert run.seed is not None
        adapted = self._adapted = AdaptedModel(
            self._build_base,
            functools.partial(getattr, self, "lora_config"),  # in which build_model may choose modules_to_save
            seed=run.seed,
            name=self.base_name,
            is_saved=self.save_base,
            placement=self._placement,
            outside=functools.partial(values_outside, self),
            trained_factors=self.trained_factors,
        )
        if "model" not in self._modules:  # else one that was assigned, which configure_model refuses
            self.model = adapted.model
        adapted.cast(torch.get_default_dtype())  # now: Lightning casts only after a checkpoint's values are loaded
        adapted.trained.remember_first()
        adapted.chain.base = replace(adapted.chain.base, labels=self.labels_of_base)
        if self.first_chain is not None:
            adapted.start_from(self.first_chain)
        if adapted.layers:
            adapted.begin_link(run.schedule.rank(self.link), run.schedule.alpha(self.link))
        if self.activation_checkpointing:
            self.checkpoint_activations()

    def _build_base(self) -> nn.Module:
        before = {name: dict(vars(self)[name]) for name in ("_modules", "_parameters", "_buffers")}
        model = self.build_model()
        if self.is_made:  # a rebuild: what else build_model assigns to the module stays as it was
            for name, entries in before.items():
                vars(self)[name].update(entries)
        return model

    def _placement(self) -> Placement:
        """The placement of the model: in all of a strategy's wrappers, on the training device."""
        trainer = trainer_of(self)
        root, device = None, self.device
        if trainer is not None:
            root = trainer.strategy.model if trainer.strategy.lightning_module is self else None
            device = trainer.strategy.root_device
        is_sharded = layout.is_model_sharded(self.model) or self.is_wrapped_by_fsdp1
        return Placement(self.model if root is None else root, device, is_sharded)

    @override
    def __getattr__(self, name: str) -> Any:
        if name == "model":
            self._ensure_model()
        return super().__getattr__(name)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass: ``module(x)`` is ``module.model(x)``."""
        return self.model(*args, **kwargs)

    @override
    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        self._ensure_model_for_reader()
        return super().named_children()

    @override
    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        self._ensure_model_for_reader()
        modules: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return modules

    @override
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._ensure_model()
        return super().named_parameters(*args, **kwargs)

    def _ensure_model_for_reader(self) -> None:
        """Makes the model for whoever goes through the module, except a Trainer, which has it made when it is due."""
        if trainer_of(self) is None:
            self._ensure_model()


# ---------------------------------------------------------------------- the values that its state dict contains


def values_of(module: BaseCOLAModule, prefix: str = "", *, keep_vars: bool = True, into: Any = None) -> dict[str, Any]:
    """The parameters, buffers and extra states of a module that training may change: no frozen ones of the model's.

    Args:
        module: the module.
        prefix: begins the names.
        keep_vars: see ``nn.Module.state_dict``.
        into: a state dict to add them to; None: a new one.
    """
    if layout.has_fsdp1(module):
        state = layout.state_dict(module, prefix, keep_vars=keep_vars)
    else:
        state = nn.Module.state_dict(module, destination=into, prefix=prefix, keep_vars=keep_vars)
    omitted = {*(f"model.{name}" for name in module.adapted.trained.frozen_names()), *aliases(module)}
    for name in list(state):
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and not omitted.isdisjoint({own, weight_of(own)}):
            del state[name]
    return state


def values_outside(module: BaseCOLAModule) -> dict[str, Tensor]:
    """The tensors that training changes outside of a module's model; lazy ones have no values yet."""
    first = module.adapted.trained.first
    return {
        name: value
        for key, value in values_of(module).items()
        if not key.startswith("model.") and isinstance(value, Tensor) and not is_lazy(value)
        if (name := OUTSIDE + key) in first or not is_frozen(value)
    }


def aliases(module: BaseCOLAModule) -> dict[str, str]:
    """Other names of the model's parameters and buffers, for a module that holds a part of the model a second time.

    Returns:
        By the other name, the value's name in the module's model.
    """
    found = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    named = list(zip(layout.plain_names(name for name, _ in found), (id(value) for _, value in found), strict=True))
    inside = {key: name for name, key in named if name.startswith("model.")}
    return {name: inside[key] for name, key in named if key in inside and not name.startswith("model.")}


def is_frozen(value: Any) -> bool:
    """Whether a value is a parameter that needs no gradient."""
    return isinstance(value, nn.Parameter) and not value.requires_grad


def _compile_options() -> dict[str, Any]:
    """Options for torch.compile: a model is compiled for each rank of a chain, in training and in evaluation.

    Torch's limit of 8 remains in versions in which it cannot be set for one model.
    """
    return {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
