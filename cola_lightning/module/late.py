"""A Lightning module whose model is made when it is first read."""

import functools
import inspect
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from typing_extensions import override

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.errors import UserError
from cola_lightning.module.arguments import class_path
from cola_lightning.module.fit import attach
from cola_lightning.module.fsdp import repeated_blocks, shard_module
from cola_lightning.module.run import Run, trainer_of
from cola_lightning.pretrained import TransformersBase


class LateModel(LightningModule):
    """A module that builds its base, and adapts it, when the model is first read.

    Lightning makes a model late, in ``configure_model``, and much reads it before: optimizers, summaries, a subclass' own
    ``__init__``.

    Attributes:
        run: what the module's training is.
        should_compile: whether the model is compiled.
        activation_checkpointing: whether the inputs of the model's blocks alone are stored for the backward pass.
        labels_of_base: a classifier's labels, which are a part of the base's identity; None: not known.
    """

    run: Run
    should_compile: bool
    activation_checkpointing: bool
    labels_of_base: list[str] | None = None
    _is_making = _is_configured = False

    # ------------------------------------------------------------------ defined or overridden by a subclass

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Builds the base model.

        It is called under the default dtype float32, with the global generators of Python, numpy and torch seeded by
        ``self.seed``. It may be called again, for example to go back to an earlier link, and must then build an identical
        model, of new parameters.

        Returns:
            The base, with its pretrained weights; its target layers are then adapted in place. What links are like,
            ``self.run.config``, may be replaced before, to choose ``modules_to_save``.
        """
        raise UserError(f"model: {type(self).__name__} needs a build_model() that returns its base")

    def checkpoint_activations(self) -> None:
        """Applies ``activation_checkpointing`` to ``self.model``; override it for a model that is not Hugging Face's.

        The names of its layers must not change (a wrapper module changes them), and copies of it must work (a closure over
        this model would also use it in its copies). For example, set a flag that the blocks' own ``forward`` reads.
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
    def named_base(self) -> TransformersBase | None:
        """For exports: the base that transformers and PEFT load by its name; None: they know no name of it."""
        return None

    # ------------------------------------------------------------------ how the model is made

    @property
    def adapted(self) -> AdaptedModel:
        """The adapted model and its chain, without Lightning."""
        self._ensure_model()
        return self.run.adapted

    @override
    def configure_model(self) -> None:
        """Makes the model and its first link, once, and prepares it for the Trainer's precision and strategy, if there is one.

        A subclass' own ``configure_model`` must call ``super().configure_model()``, and what it freezes before that counts as
        frozen in the base.
        """
        self._ensure_model()
        if self.model is not self.adapted.model and not self.run.is_wrapped_by_fsdp1:
            raise UserError(
                f"model: self.model is a {type(self.model).__name__} and not what build_model() returned. With adopt(), return "
                "all of the task's model: target_modules and modules_to_save choose its parts. A wrapper belongs in "
                "build_model, and model.compile true compiles in place"
            )
        if not self._is_configured:  # a subclass' own configure_model may have frozen more
            self.adapted.trained.record_trainable()
        if (dtype := torch.get_default_dtype()) != torch.float32:  # what Lightning's precision will cast the model to
            self.adapted.cast(dtype)
        if (trainer := trainer_of(self)) is not None:
            shard_module(trainer.strategy, self.run, self.shard_model)
        if self.should_compile and not self._is_configured:
            # A model is compiled for each rank of a chain, in training and in evaluation; torch's limit is 8.
            can_set_limit = "recompile_limit" in inspect.signature(torch.compile).parameters  # for one model
            self.compile_model(**({"recompile_limit": 64} if can_set_limit else {}))
        self._is_configured = True

    def make_model(self) -> None:
        """Makes and configures the model where no Trainer has done so; a second call changes nothing.

        Raises:
            UserError: for a subclass whose ``configure_model`` leaves ``super()`` out.
        """
        if not self._is_configured:
            self.configure_model()
        if not self._is_configured:
            raise UserError(f"{type(self).__name__}.configure_model must call super().configure_model()")

    def _ensure_model(self) -> None:
        """Makes the model, unless it is made or is being made."""
        if self._is_making or "run" not in vars(self) or self.run.made is not None:  # the second: inside of __init__
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
            self.run.made = None
            raise
        finally:
            self._is_making = False

    def _make_model(self) -> None:
        """Builds the base, adapts it, and begins a link, ready for a precision of the default dtype."""
        run = self.run
        chain = run.first_chain
        adapted = run.made = AdaptedModel(
            self._build_base,
            functools.partial(getattr, run, "config"),  # in which build_model may choose modules_to_save
            seed=run.choose_seed(),
            name=self.base_name,
            placement=run.placement,
            outer_module=self,
            current=run.current,
            earlier_layers=run.expected.layers if chain is None else chain.layers,
        )
        if self._modules.get("model") is None:  # else one that was assigned, which configure_model refuses
            self.model = adapted.model
        adapted.cast(torch.get_default_dtype())  # now: Lightning casts only after a checkpoint's values are loaded
        adapted.trained.record_initial()
        adapted.chain.base = replace(adapted.chain.base, labels=self.labels_of_base)
        has_rest = False
        if chain is not None:
            has_rest = run.start.knot != "cola" and len(chain) > 0
            if has_rest and run.size_of(len(chain)) != (last := (chain[-1].rank, chain[-1].alpha)):
                rank, alpha = run.size_of(len(chain))
                raise UserError(
                    f"model.init_knot: with {run.start.knot}, the rank and alpha must be those of the last link of "
                    f"{run.start.sources!r}, {last[0]} and {last[1]:g}, got {rank} and {alpha:g}"
                )
            adapted.start_from(chain, run.start.knot)
            run.first_link = len(chain)
        if adapted.layers and not has_rest:
            adapted.begin_link(*run.size_of(adapted.n_finished))
        if self.activation_checkpointing:
            self.checkpoint_activations()
        if not self.training:  # the module was put in evaluation mode before it had a model
            self.model.eval()

    def _build_base(self) -> nn.Module:
        before = {name: dict(vars(self)[name]) for name in ("_modules", "_parameters", "_buffers")}
        model = self.build_model()
        if self.run.made is not None:  # a rebuild: what else build_model assigns to the module stays as it was
            for name, entries in before.items():
                vars(self)[name].update(entries)
        return model

    # ------------------------------------------------------------------ who reads it early

    @LightningModule.trainer.setter  # type: ignore[attr-defined, untyped-decorator]
    def trainer(self, trainer: Trainer | None) -> None:
        """Attaches a Trainer, and to the Trainer this module's callback; a subclass may override ``configure_callbacks``."""
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if isinstance(trainer, Trainer) and trainer.lightning_module is self:
            attach(self.run, trainer)

    @override
    def __getattr__(self, name: str) -> Any:
        if name == "model":
            self._ensure_model()
        return super().__getattr__(name)

    @override
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._ensure_model()
        return super().named_parameters(*args, **kwargs)
