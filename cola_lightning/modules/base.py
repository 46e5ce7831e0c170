"""The Lightning module that owns a base model and its chain."""

import functools
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW
from typing_extensions import override

from cola_lightning.adapted_model import AdaptedModel, seeded_build
from cola_lightning.chain import Chain, Link
from cola_lightning.chain.files import read_chain
from cola_lightning.chain.schedule import ChainSchedule, LRSchedule
from cola_lightning.errors import UserError
from cola_lightning.lora.inject import check_numbers, inject_lora
from cola_lightning.lora.linear4bit import is_quantized_model
from cola_lightning.lora.registry import FinishedLinks, Init
from cola_lightning.modules.guard import ChainKeeper
from cola_lightning.modules.pending import is_reading_checkpoint, seed_of_checkpoint
from cola_lightning.modules.running import checkpoint_activations, compile_model, keep_activations
from cola_lightning.modules.training import LinkTraining, OptimizerCallable
from cola_lightning.sharded import processes, tensors
from cola_lightning.sharded.strategy import (
    configure_fsdp1,
    hidden,
    shard_by_blocks,
    shards,
)

log = logging.getLogger(__name__)


class COLAModule(LinkTraining):
    """A pretrained model that is tuned by a chain of low-rank links.

    A subclass writes ``build_model`` and ``training_step``. ``self.model`` is what ``build_model`` returned, with its target
    layers adapted in place; ``self.chain`` holds the finished links. When a link is finished is
    :class:`~cola_lightning.callbacks.ChainOfLoRA`'s to say; without it the run is one link: plain LoRA.

    Args:
        target_modules: layers to adapt, by PEFT's rule: a regular expression for the whole name, a list of (endings of) names,
            or ``all-linear`` (the default). ``null`` trains every parameter without links: full fine-tuning, for comparisons.
        rank: largest rank of a link.
        alpha: a link's update is scaled by ``alpha / rank``.
        dropout: probability of dropping an input of A while training.
        init: how A is drawn: ``kaiming`` (uniform, a = sqrt(5), PEFT's default) or ``gaussian`` (std 1 / rank).
        modules_to_save: names (or their endings) of modules that are trained whole, as a new head must be.
        modules_to_save_lr: the first learning rate of ``modules_to_save``; ``null``: the optimizer's, as for the links.
        seed: from which each link's A, each batch's dropout and what ``build_model`` draws come. ``null``: the seed of
            ``seed_everything``, else one is drawn and stored.
        optimizer: called with the trainable parameters, anew for each link. Default: AdamW with a learning rate of 1e-3.
        lr_schedule: ``constant``, ``linear`` or ``cosine`` decay to 0, by transformers' formulas.
        warmup_steps: optimizer steps over which the rate rises from 0; below 1, a share of the schedule's length.
        schedule_scope: whether the schedule runs over each ``link`` or once over the whole ``run``.
        finished_links: ``merge`` adds a finished link to the frozen weights, which are kept in float32 for that; ``stack``, for
            bases in half precision or 4 bits, never writes a weight, and keeps the finished links beside them as one frozen
            low-rank pair a layer.
        init_chain: where to start from: a chain folder, a checkpoint, or the folder of an ordinary PEFT LoRA, whose links are
            taken up before training begins; ``null``: from the base. A checkpoint of the run holds them, too.
        init_links: how many links of ``init_chain``, from the first; ``null``: all.
        save_base: store the adapted base's weights in each checkpoint, for a base that cannot be made again bit for bit.
        compile: ``torch.compile`` the model: once for each rank, and for training and validation.
        activation_checkpointing: keep only the inputs of the model's blocks, and compute what is inside again in the backward
            pass: less memory, more time, the same gradients.

    Raises:
        UserError: for values that cannot be right.

    Source: Xia et al., "Chain of LoRA" (arXiv 2401.04151), algorithm 1.
    """

    def __init__(
        self,
        *,
        target_modules: str | list[str] | None = "all-linear",
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        init: Init = "kaiming",
        modules_to_save: Sequence[str] = (),
        modules_to_save_lr: float | None = None,
        seed: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-3),
        lr_schedule: LRSchedule = "linear",
        warmup_steps: float = 0,
        schedule_scope: Literal["link", "run"] = "link",
        finished_links: FinishedLinks = "merge",
        init_chain: str | None = None,
        init_links: int | None = None,
        save_base: bool = False,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_numbers(rank, alpha, dropout)
        if seed is not None and not 0 <= seed < 2**32:
            raise UserError(f"model.seed: expected a whole number from 0 to 2**32 - 1, received {seed}")
        if not 0 <= warmup_steps < math.inf:
            raise UserError(f"model.warmup_steps: expected a number of steps, or a share below 1, received {warmup_steps}")
        if modules_to_save_lr is not None and not 0 <= modules_to_save_lr < math.inf:
            raise UserError(f"model.modules_to_save_lr: expected a number of at least 0, received {modules_to_save_lr}")
        if finished_links not in get_args(FinishedLinks):
            raise UserError(
                f"model.finished_links: expected {' or '.join(get_args(FinishedLinks))}, received {finished_links!r}"
            )
        # Plain numbers: jsonargparse's restricted types would make a checkpoint unreadable for torch.load(weights_only=True).
        self.target_modules, self.modules_to_save = target_modules, list(modules_to_save)
        self.rank, self.alpha, self.dropout, self.init = int(rank), float(alpha), float(dropout), init
        self.seed = self._given_seed = None if seed is None else int(seed)
        self.optimizer, self.modules_to_save_lr = optimizer, modules_to_save_lr
        self.lr_schedule, self.warmup_steps, self.schedule_scope = lr_schedule, float(warmup_steps), schedule_scope
        self.finished_links, self.save_base = finished_links, save_base
        self.should_compile, self.activation_checkpointing = compile, activation_checkpointing
        self.init_chain = None if init_chain is None else str(init_chain)
        self.init_links = None if init_links is None else int(init_links)
        self._first_chain: Chain | None = None
        if init_links is not None and init_chain is None:
            raise UserError(f"model.init_links: expected null, or model.init_chain beside it, received {init_links} alone")
        if init_chain is not None and not is_reading_checkpoint():  # here: before any time is lost
            self._first_chain = read_chain(init_chain, init_links, "model.init_chain")
            if target_modules is None:
                raise UserError(
                    "model.init_chain: expected null without links (model.target_modules is null), received a chain"
                )
        self.schedule = ChainSchedule()
        self.run_length = None  # known while training
        self.is_made = self._is_being_made = self._is_configuring = self._is_compiled = False
        self._is_seed_of_one = False  # drawn by this process alone

    # ------------------------------------------------------------------ what a subclass writes

    def build_model(self) -> nn.Module:
        """Makes the base model.

        It is called under the default dtype float32, with the global generators of Python, numpy and torch seeded by
        ``self.seed``.
        """
        raise UserError(f"model: expected a class with a build_model() that returns its base, received {type(self).__name__}")

    def checkpoint_activations(self) -> None:
        """What ``activation_checkpointing`` does to ``self.model``; to be overridden for a model that is not Hugging Face's.

        Its layers must keep their names (a module around them changes those), and it must stay one that can be copied (a method
        that knows this very model would go along): set a flag that the blocks' own ``forward`` reads, say.
        """
        checkpoint_activations(self.model)

    # ------------------------------------------------------------------ the model

    @override
    def configure_model(self) -> None:
        """Makes the model and its first link, once; lays it out for the Trainer's precision and strategy, where there is one.

        What a subclass' own does comes first, and needs no ``super()``.
        """
        self._make_model()
        dtype = torch.get_default_dtype()  # what Lightning's precision sets it to, and will cast the model to
        if dtype != torch.float32:
            self._cast(dtype)
        self._lay_out()
        if self.should_compile and not self._is_compiled:
            compile_model(self.model)
            self._is_compiled = True

    def _make_model(self) -> None:
        if self._is_on_meta and self._attached_trainer is not None:  # now it is to be run
            self._modules.pop("model", None)
            self.is_made, self._is_on_meta, self._adapted = False, False, None
        if self.is_made:
            return
        if "model" in self._modules:
            raise UserError(
                f"{type(self).__name__}: expected a base that build_model() returns, to be adapted, received one that was "
                "assigned to self.model"
            )
        if self._is_being_made:
            raise UserError(
                f"{type(self).__name__}.build_model: expected one that makes the base, received one that reads self.model"
            )
        self._choose_seed()
        self._is_being_made = True
        try:
            with torch.device("cpu"):
                self._prepare(torch.get_default_dtype())
            self.is_made = True
        except BaseException:  # so that a second call does not take it for ready
            self._modules.pop("model", None)
            self._adapted = None
            raise
        finally:
            self._is_being_made = False

    def _ensure_model(self) -> None:
        """Makes the model where it is asked for before Lightning does, in a run or outside of one."""
        if self.is_made or self._is_being_made:
            return
        if self._attached_trainer is None and not self._is_configuring:
            self.configure_model()
        else:  # Lightning will call that, or is about to have called it
            self._make_model()

    @override
    def __getattr__(self, name: str) -> Any:
        if name == "model" and "is_made" in self.__dict__:  # after __init__, that is
            if "model" not in self._modules:
                self._make_model() if self._is_being_made else self._ensure_model()
            return self._modules["model"]
        return super().__getattr__(name)

    @override
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._ensure_model()
        return super().named_parameters(*args, **kwargs)

    @override
    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        self._ensure_model_unless_lightning_asks()
        found: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return found

    @override
    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        self._ensure_model_unless_lightning_asks()
        return super().named_children()

    @override
    def children(self) -> Iterator[nn.Module]:
        return (child for _, child in super().named_children())  # Lightning asks when a Trainer takes the module

    @override
    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        self._ensure_model_unless_lightning_asks()
        return super().apply(fn)

    def _ensure_model_unless_lightning_asks(self) -> None:
        """In a run, Lightning goes through a module's parts before its ``setup``, and after a run that failed before it.

        What a callback's ``setup`` goes through (BaseFinetuning's, say) is to hold the model. Which of them it is, Lightning
        says by a private name alone.
        """
        trainer = self._attached_trainer
        if trainer is None or (self._current_fx_name == "setup" and trainer.state.status == TrainerStatus.RUNNING):
            self._ensure_model()

    def _choose_seed(self) -> None:
        if self.seed is not None:
            return
        given = os.environ.get("PL_GLOBAL_SEED")  # what seed_everything was told
        self._given_seed = None if given is None else int(given)
        seed = seed_of_checkpoint()
        self.seed = self._given_seed if seed is None else seed
        if self.seed is None:
            self.seed = processes.draw_seed()
            self._is_seed_of_one = not processes.has_processes()
            log.info("model.seed: %d was drawn, for none was given", self.seed)

    def _prepare(self, dtype: torch.dtype) -> None:
        """Makes what ``build_model`` gives, adapts it, and begins a link, ready for training in a precision of this dtype."""
        assert self.seed is not None
        how = {"is_saved": self.save_base, "is_known": not self._is_on_meta}
        self._adapted = adapted = AdaptedModel(self._make_adapted_base, self.seed, self.base_name, **how)
        self.model, adapted.placement = adapted.model, self._placement
        self._cast(dtype)
        if not self._is_on_meta:
            self.note_outside()
            self.chain.base["outside"] = self._frozen_outside()
        if self._first_chain is not None:
            self._start_from(self._first_chain)
        if self.target_modules is not None:
            self._begin_link()
            self._tell_of_memory()
        if self.activation_checkpointing:
            names = list(self._layers)
            self.checkpoint_activations()
            if list(self._layers) != names:
                raise UserError("checkpoint_activations: expected the names of the model's layers to stay, received others")
        if not self.training:  # eval() came first
            self.model.eval()

    def _cast(self, dtype: torch.dtype) -> None:
        """Casts what a checkpoint's values will be loaded into as Lightning will: its own cast comes only after them."""
        if dtype == torch.float64 and not tensors.is_model_sharded(self.model):
            self.model.double()
        self.adapted.cast(dtype)

    def _lay_out(self) -> None:
        """Lays the model out over processes, where the strategy shards it and it is not yet."""
        trainer = self._attached_trainer
        if trainer is None:
            return
        if self._is_seed_of_one and len(seeds := set(processes.gather_objects(self.seed))) > 1:
            raise UserError(
                "model.seed: expected a number, or seed_everything, for a model that is asked for before processes are joined, "
                f"each of which drew its own; received null and {len(seeds)} processes"
            )
        if not shards(trainer.strategy):
            return
        if is_quantized_model(self.model):
            raise UserError(
                "trainer.strategy: expected ddp, or one device, for a base in 4 bits, which is not sharded; received "
                f"{type(trainer.strategy).__name__}"
            )
        if isinstance(trainer.strategy, FSDPStrategy):
            if not self.is_wrapped_by_fsdp1:
                configure_fsdp1(trainer.strategy, self, torch.get_default_dtype())
            self.is_wrapped_by_fsdp1 = True
        elif not tensors.is_model_sharded(self.model):
            mesh = cast(ModelParallelStrategy, trainer.strategy).device_mesh["data_parallel"]
            with hidden(self.model) if self.target_modules is not None else nullcontext():
                self.shard_model(mesh)

    def shard_model(self, mesh: DeviceMesh) -> None:
        """Shards ``self.model`` over the processes of a one-dimensional mesh; called once, under FSDP2, the links in place.

        As it is, any Hugging Face decoder is sharded by its repeated blocks, and another model by those of its ``ModuleList``
        that hold more than single layers. Override it with ``fully_shard`` calls of your own: what is trained is out of its
        sight then, and stays whole on each process.
        """
        shard_by_blocks(self.model, mesh)

    @property
    def base_name(self) -> str:
        """What the base is called, in messages and beside its fingerprint."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def _make_adapted_base(self) -> nn.Module:
        assert self.seed is not None
        parts = dict(self._modules)
        with seeded_build(self.seed, "meta" if self._is_on_meta else "cpu"):
            model = self.build_model()
            if self.is_made:  # again: what else build_model assigns here stays what it was
                self._modules.clear()
                self._modules.update(parts)
            if not isinstance(model, nn.Module):
                raise UserError(f"{type(self).__name__}.build_model: expected an nn.Module, received {type(model).__name__}")
            if self.target_modules is not None:
                inject_lora(
                    model,
                    self.target_modules,
                    self.rank,
                    self.alpha,
                    self.dropout,
                    self.modules_to_save,
                    init=self.init,
                    finished_links=self.finished_links,
                )
        return model

    @rank_zero_only
    def _tell_of_memory(self) -> None:
        widened = [layer for layer in self._layers.values() if layer.stack is None and layer.source_dtype.endswith("16")]
        if widened and not is_reading_checkpoint():
            log.info(
                "model.finished_links: merge keeps the adapted weights in float32, %.0f MB more than in %s; stack does not",
                sum(layer.weight.numel() for layer in widened) * 2 / 1e6,
                widened[0].source_dtype,
            )

    @override
    def _scheduled(self, link: int) -> list[float]:
        return [self.schedule.rank(link, self.rank), self.schedule.alpha(link, self.alpha)]

    @property
    @override
    def _origin(self) -> list[str | int | None]:
        path = self.init_chain and str(Path(self.init_chain).expanduser().absolute())
        return [path, self.init_links]

    @override
    def _begin_link(self, rank: int | None = None, alpha: float | None = None) -> None:
        asked = self._scheduled(self.link)
        self.adapted.begin_link(int(asked[0]) if rank is None else rank, asked[1] if alpha is None else alpha)
        self._forget_metrics()

    def tie_knot(self, *, rank: int | None = None, alpha: float | None = None) -> Link:
        """Finishes the live link and begins the next: merges or stacks it, records it, draws a new A, drops the optimizer.

        While training, the optimizer and its schedule are made anew; their state begins empty.

        Args:
            rank: the next link's rank; None: what the schedule says.
            alpha: the next link's alpha; None: what the schedule says.

        Returns:
            The finished link.

        Raises:
            UserError: if the module trains without links, or the rank is above ``self.rank``.

        Source: Xia et al., arXiv 2401.04151, section 3, "Tie a knot" and "Extend the chain".
        """
        if self.target_modules is None:
            raise UserError("model.target_modules: expected layers to adapt for a chain with knots, received null")
        if rank is not None and rank not in range(1, self.rank + 1):
            raise UserError(f"rank: expected 1 to {self.rank}, the largest rank of a link (model.rank), received {rank}")
        if alpha is not None and not 0 < alpha < math.inf:
            raise UserError(f"alpha: expected a number above 0, received {alpha}")
        self.configure_model()
        asked = self._scheduled(self.link + 1)
        self._is_tying = True
        link = self.adapted.tie_knot(
            int(asked[0]) if rank is None else rank, asked[1] if alpha is None else alpha, **self._facts_of_link()
        )
        self._forget_metrics()
        self.link_start = self._now
        self._is_tying = False  # not in a finally: after a knot that failed halfway nothing may be written
        trainer = self._attached_trainer
        # In a validation inside fit, too: trainer.training is False there.
        if trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running":
            trainer.strategy.setup_optimizers(trainer)
        return link

    def live_link(self) -> Link:
        """The live link as it is now: what a knot would record."""
        return self.adapted.live_link(**self._facts_of_link())

    def _facts_of_link(self) -> dict[str, Any]:
        """What this module knows of the live link beside the model's part."""
        return {
            "start_step": self.link_start.global_step,
            "end_step": self._now.global_step,
            "metrics": self._metrics(),
            "outside": self._outside(),
        }

    def merged_model(self, links: int | None = None) -> nn.Module:
        """A plain copy of the model with the chain in its weights: no LoRA layers, nothing left at inference.

        What is trained outside of ``self.model`` is not in the copy, and a warning says so. Where the model is sharded, the
        copy is made on the CPU, of the base made anew; nothing is gathered for it. (Where all is trained, all is gathered:
        every process must ask for it.)

        Args:
            links: how many links, the finished ones first and then the live one; None: all. 0 is the base.

        Returns:
            The model in float32, whatever it was trained in (in float64 where that was float64); where ``target_modules`` is
            null, in the dtype that it has.

        Raises:
            UserError: if there are not as many links.
        """
        self.configure_model()
        self._check_not_on_meta()
        model = self.adapted.merged_model(links)
        values = self.values()
        if outside := [name for name, p in values.items() if not name.startswith("model.") and p.requires_grad]:
            log.warning("merged_model: %s is trained outside of self.model, and not in the copy", " and ".join(outside))
        if self.activation_checkpointing:
            keep_activations(model)
        return model

    # ------------------------------------------------------------------ the callback that comes along

    @override
    def configure_callbacks(self) -> Sequence[Callback]:
        return []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lets the module's own callback and model come along whatever a subclass' hooks return or forget."""
        super().__init_subclass__(**kwargs)
        if cls.configure_model is not COLAModule.configure_model and not hasattr(cls.configure_model, "comes_before_ours"):
            cls.configure_model = _then_ours(cls.configure_model)  # type: ignore[method-assign, assignment]
        own = cls.configure_callbacks

        def configure_callbacks(self: COLAModule) -> Sequence[Callback]:
            callbacks = own(self)
            callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
            return callbacks if any(isinstance(c, ChainKeeper) for c in callbacks) else [ChainKeeper(self), *callbacks]

        cls.configure_callbacks = configure_callbacks  # type: ignore[method-assign]


# Pickle finds a function by its name, and jsonargparse a default's values in the signature, if that has a lambda.
default_optimizer = inspect.signature(COLAModule.__init__).parameters["optimizer"].default
default_optimizer.__qualname__ = "default_optimizer"


def _then_ours(own: Callable[[COLAModule], None]) -> Callable[[COLAModule], None]:
    """A subclass' ``configure_model`` and then ours, which does nothing twice."""

    @functools.wraps(own)
    def configure_model(self: COLAModule) -> None:
        before, self._is_configuring = self._is_configuring, True
        try:
            own(self)
        finally:
            self._is_configuring = before
        COLAModule.configure_model(self)

    configure_model.comes_before_ours = True  # type: ignore[attr-defined]
    return configure_model
