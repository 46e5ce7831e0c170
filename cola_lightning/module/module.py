"""The Lightning module that owns a base model and its chain."""

import copy
import functools
import inspect
import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.adapted_model import AdaptedModel, Placement
from cola_lightning.chain import Chain, Link
from cola_lightning.chain.chain import as_number, number_of_links
from cola_lightning.chain.checkpoint import OpenedCheckpoint, StoredState, read_chain_and_held_out
from cola_lightning.chain.current import CurrentLink
from cola_lightning.chain.schedule import FitPosition, Knot
from cola_lightning.chain.sources import sources_of
from cola_lightning.constants import Dtype
from cola_lightning.errors import UserError
from cola_lightning.export.model import TrainedModel
from cola_lightning.export.module import export_chain, export_model
from cola_lightning.export.options import ExportOptions, Format
from cola_lightning.module.arguments import RecordsArguments, class_path, device_of, read_arguments, rebuilt
from cola_lightning.module.fit import attach
from cola_lightning.module.fsdp import repeated_blocks, shard_module
from cola_lightning.module.optimization import LinkConfig, LinkOptimization, OptimizerCallable, check_no_averaging
from cola_lightning.module.progress import FitProgress, trainer_of
from cola_lightning.module.state import (
    StateDictError,
    data_facts,
    prepare_checkpoint,
    prepare_loading,
    state_of,
)
from cola_lightning.module.step_loss import StepLoss
from cola_lightning.pretrained import TransformersBase

log = logging.getLogger(__name__)


class COLAModule(LightningModule, RecordsArguments):
    """A pretrained model that is fine-tuned with a chain of low-rank links.

    A subclass defines ``build_model`` and ``training_step``. ``self.model`` is what ``build_model`` returned, with its target
    layers adapted in place; ``self.chain`` contains the finished links. The callback
    :class:`~cola_lightning.ChainOfLoRA` decides when a link is finished; without it the run is one link: plain LoRA.

    Lightning makes a model late, in ``configure_model``, and much reads it before: optimizers, summaries, a subclass' own
    ``__init__``. So the model is made when it is first read.

    Args:
        seed: Seed for initialising A, for dropout, and for anything random in ``build_model``. ``null`` uses that of
            ``seed_everything``, or a random one, which is stored.
        optimizer: Called with the trainable parameters, once for each link. Default: fused AdamW with a learning rate of 1e-3.
        init_chain: Start from the links of this chain folder, checkpoint, or folder of an ordinary PEFT LoRA, or from those of
            a list of them, in the order of their training. ``sft=out/sft`` names the links of a source. ``null`` starts from
            the base. Checkpoints of the run contain these links too.
        init_links: Use only the first N links of ``init_chain``, or those up to a stage's name. ``null`` uses all.
        init_continues: Names of sources in ``init_chain`` that are no new adapters: the adapter of the source before went on.
        init_knot: What happens to the last link of ``init_chain`` when the run begins, as at a knot (``chain.knot``). ``cola``
            merges it, and a new link begins. ``half`` merges half of it; A and the rest of B go on. ``record`` only records it;
            A and B go on: one LoRA over several runs. The optimizer and its learning-rate schedule are new in each run.
        save_base: Store the weights of the adapted base in each checkpoint. Use it if the base cannot be rebuilt bit for bit.
        compile: Apply ``torch.compile`` to the model. It compiles once per rank, for training and for validation.
        activation_checkpointing: Store only the inputs of the model's blocks and recompute the rest in the backward pass. It
            needs less memory and more time, and the gradients are the same.
        **link: which layers get links, what the links are like, and how they are optimized: the arguments of
            :class:`~cola_lightning.LoRAConfig` and of :class:`~cola_lightning.module.optimization.LinkConfig`, such as
            ``target_modules``, ``rank``, ``alpha`` and ``lr_schedule``.

    Attributes:
        lora_config: the :class:`~cola_lightning.LoRAConfig` of ``**link``; ``build_model`` may replace it.
        labels_of_base: a classifier's labels, which are a part of the base's identity; None: not known.
        user_seed: what the user gave, by ``seed`` or ``seed_everything``; None: nothing.
        fit_progress: where the present fit stands, or where the last one ended.
        current: the current link's rank, alpha, start, stage and metrics.
        link_optimization: makes each link's optimizer.
        step_loss: weighs the losses of an optimizer step's batches.
        requested: which links of the expected state are loaded, and their factors, see :meth:`expect_state`.

    Raises:
        UserError: for invalid values.

    Example:
        >>> class Regression(COLAModule):
        ...     def build_model(self):
        ...         return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return nn.functional.mse_loss(self.model(x), y)
        >>> module = Regression(target_modules=["0", "2"], rank=1, alpha=2, seed=0)
        >>> module.tie_knot()
        Link 0: rank 1, alpha 2, 2 layers, steps 0 to 0
        >>> module.n_finished, type(module.merged_model()[0]).__name__
        (1, 'Linear')

    Source: Xia et al., "Chain of LoRA" (arXiv 2401.04151), algorithm 1.
    """

    labels_of_base: list[str] | None = None

    # **link, against our rule for constructors: jsonargparse and --help follow it into LinkConfig, where each of its arguments
    # is defined, checked and documented once.
    def __init__(
        self,
        *,
        seed: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-3, fused=True),
        init_chain: tuple[str, ...] | str | None = None,  # of a list, jsonargparse would read the entries from the file
        init_links: int | str | None = None,
        init_continues: tuple[str, ...] = (),
        init_knot: Knot = "cola",
        save_base: bool = False,
        compile: bool = False,
        activation_checkpointing: bool = False,
        **link: Any,
    ) -> None:
        super().__init__()
        constructor = next(base for base in type(self).__mro__ if "__init__" in vars(base))
        if issubclass(constructor, LightningModule) and not issubclass(constructor, COLAModule) and not link and seed is None:
            name = type(self).__name__  # else no option could be given, and a link would be trained by default options
            raise UserError(
                f"model: {name} needs the line __init__ = COLAModule.__init__, because it has that of {constructor.__name__}"
            )
        self.lora_config = LinkConfig(**link)
        for name, is_set in {"links": init_links is not None, "knot": init_knot != "cola", "continues": init_continues}.items():
            if is_set and init_chain is None:
                raise UserError(f"model.init_{name}: needs model.init_chain")
        # Plain numbers: jsonargparse's restricted types would make a checkpoint unreadable for torch.load(weights_only=True).
        self.user_seed = None if seed is None else int(seed)
        self.save_base = save_base
        self.init_chain = list(map(str, init_chain)) if isinstance(init_chain, list | tuple) else init_chain and str(init_chain)
        self.init_links = None if init_links is None else as_number(init_links)
        self.init_knot, self.init_continues = init_knot, list(init_continues)
        self.should_compile, self.activation_checkpointing = compile, activation_checkpointing
        self.fit_progress, self.step_loss = FitProgress(), StepLoss()
        self.current = CurrentLink(self._position, self._logged)
        self.link_optimization = LinkOptimization(
            progress=self.fit_progress,
            current=self.current,
            config=self.lora_config,
            make_optimizer=optimizer,
        )
        self.requested: tuple[int | str | None, Mapping[int | str, float]] = (None, {})
        self._stored_seed: int | None = None
        self._is_base_stored = False
        self._adapted: AdaptedModel | None = None  # made by configure_model, or where the model is read before that
        self._is_making = self._is_configured = self.is_wrapped_by_fsdp1 = self.is_tying_knot = False
        self.register_load_state_dict_pre_hook(prepare_loading)  # type: ignore[no-untyped-call]

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

    def adopt(self, task: LightningModule) -> Any:
        """Takes over another LightningModule, for ``build_model``: its layers, metrics, hyperparameters and other attributes.

        The module's class is derived from the other module's class and from this one, in this order. So the other class' steps,
        hooks, optimizer and metrics are used::

            class Segmentation(SemanticSegmentationTask, COLAModule):
                __init__ = COLAModule.__init__

                def build_model(self):
                    return self.adopt(SemanticSegmentationTask(model="unet", backbone="resnet18", num_classes=2)).model

        Args:
            task: the other module. It is not used afterwards.

        Returns:
            The same module. ``build_model`` returns its ``model`` or, if it has none, another of its parts as the base. The
            other layers are fully trained.

        Raises:
            UserError: if the module's class is not derived from the other class first, or both have an attribute of a name.
        """
        classes = type(self).__mro__
        if type(task) not in classes[: classes.index(COLAModule)]:  # else this class' optimizer would be used without a word
            name = type(task).__name__
            raise UserError(f"adopt: {type(self).__name__} must be a class ({name}, COLAModule), with {name} first")
        if self.is_made:  # for a rebuild, which needs the base alone
            return task
        ours = {*vars(COLAModule), *vars(COLAModule())}.difference(dir(LightningModule()), vars(type(task)))
        if both := ours.intersection([*vars(task), *task._modules, *task._parameters, *task._buffers]):
            raise UserError(
                f"adopt: {type(task).__name__} has an attribute {min(both)!r}, which is COLAModule's own. Rename the task's, "
                "or delete it before adopt()"
            )
        self._modules.setdefault("model", None)  # first, so that its parameters have its name, and no other one
        initial = vars(LightningModule())
        for name, value in vars(task).items():
            if name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
                vars(self)[name].update(value)
            elif name not in initial or (not isinstance(initial[name], dict) and value != initial[name]):
                vars(self)[name] = value
        return task

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
        """The chain that a run begins from (``init_chain``); None if it begins from the base, or a state is expected.

        Raises:
            UserError: if there is no such chain.
        """
        if self.init_chain is None:
            return None
        chain, held_out = read_chain_and_held_out(self.init_chain, self.init_links, "model.init_chain", self.init_continues)
        self.fit_progress.restore_held_out(held_out)
        if not chain.links and self.init_links != 0:
            raise UserError(
                f"model.init_chain: {self.init_chain!r} has no links, because its model was trained without any. Export it "
                "(cola export --format merged), and use the folder as the model"
            )
        return chain

    @property
    def held_out(self) -> list[dict[str, Any] | None]:
        """Which rows were held out by the runs that trained this module, see :class:`~cola_lightning.data.split.HeldOut`.

        None among them is a run of which that is unknown.
        """
        _ = self.first_chain  # which knows it of earlier runs
        return self.fit_progress.held_out

    @property
    def chain(self) -> Chain:
        """The finished links, without the current one, which :meth:`full_chain` adds; none before the model is made."""
        return Chain() if self._adapted is None else self._adapted.chain

    @property
    def n_finished(self) -> int:
        """How many links are finished, which is also the index of the current one."""
        return len(self.chain)

    @property
    def link_steps(self) -> float:
        """Optimizer steps of the current link, for a learning-rate schedule of your own in ``configure_optimizers``.

        If the optimizer goes on over the knots (``half``, ``record``), these are the steps of the run. ``math.inf`` if nothing
        ends the link, or its end is not known beforehand, and outside of a fit. In a fit it sets up the training data, as
        Lightning's ``trainer.estimated_stepping_batches`` does, which counts the steps of the whole run.
        """
        trainer, progress = trainer_of(self), self.fit_progress
        if trainer is not None and trainer.state.fn == "fit" and trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        if (length := progress.known_length()) is None:
            return math.inf
        steps = self.link_optimization.link_steps(length)
        return steps if steps == math.inf else int(steps)

    @property
    def seed(self) -> int | None:
        """The seed of every random draw; if none was given, None until the model is made."""
        return self.user_seed if self._adapted is None else self._adapted.seed

    @property
    def is_base_in_checkpoint(self) -> bool:
        """For ``build_model``: whether only shapes matter, as the base's weights come from a checkpoint."""
        return self._is_base_stored or (self._adapted is not None and self._adapted.base_weights is not None)

    @property
    def init_chain_source(self) -> list[Any]:
        """The path of ``init_chain`` or its list, how many of its links were requested, and ``init_knot`` and others if set."""
        sources = [] if self.init_chain is None else sources_of(self.init_chain)
        paths = [str(source._replace(path=str(Path(os.path.expanduser(source.path)).absolute()))) for source in sources]
        options: list[Any] = [] if self.init_knot == "cola" else [self.init_knot]
        options += [self.init_continues] if self.init_continues else []
        return [paths if isinstance(self.init_chain, list) else next(iter(paths), None), self.init_links, *options]

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 or FSDP1 has sharded the model."""
        return self._placement().is_sharded

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimizer: the current link's, fully trained modules', and those outside of the model."""
        return [parameter for _, parameter in self.named_trained_parameters()]

    def named_trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The :meth:`trained_parameters` with their names in the module."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    # ------------------------------------------------------------------ links

    def tie_knot(self, *, rank: int | None = None, alpha: float | None = None) -> Link:
        """Finishes the current link and begins the next: merges or stacks it, records it, draws a new A.

        The optimizer and its schedule are created again, with empty state except for ``kept_optimizer_state``. With knots of
        ``half`` or ``record`` in the fit's schedule, A, the optimizer and its schedule go on instead. During training, call it
        between optimizer steps: in ``on_train_batch_start``, or in a callback's ``on_train_batch_end`` (a module's own runs
        after that step's checkpoint is written).

        Args:
            rank: the next link's rank; None: what the schedule says.
            alpha: the next link's alpha; None: what the schedule says.

        Returns:
            The finished link.

        Raises:
            UserError: if the module trains without links, or for a rank or alpha that no link of it can have.

        Source: Xia et al., arXiv 2401.04151, section 3, "Tie a knot" and "Extend the chain".
        """
        self.step_loss.check()  # before the link is recorded
        check_no_averaging(trainer_of(self))
        adapted, schedule = self.adapted, self.fit_progress.schedule
        planned = self.current.size if schedule.goes_on else schedule.rank_and_alpha(self.n_finished + 1, self.lora_config)
        rank, alpha = planned[0] if rank is None else rank, planned[1] if alpha is None else alpha
        following = adapted.checked_link(rank, alpha, schedule.knot)
        self.is_tying_knot = True
        link = adapted.tie_knot(*following, knot=schedule.knot, share=schedule.share)
        self.current.name = schedule.name
        self.link_optimization.renew(self, adapted)
        self.is_tying_knot = False  # not in a finally: after a knot that failed halfway nothing may be written
        return link

    def restart_link(self, *, rank: int | None = None, alpha: float | None = None) -> None:
        """Starts the current link again, before its first step, with another rank or alpha: in :meth:`on_knot`, for example.

        Its optimizer is new; with ``kept_optimizer_state`` it has that share of the last link's state.

        Args:
            rank: of the link; None: as it is.
            alpha: of the link; None: as it is.

        Raises:
            UserError: if the module trains without links, the rank is above ``model.rank``, or the link has been trained.
        """
        adapted, (old_rank, old_alpha) = self.adapted, self.current.size
        if adapted.has_begun:
            raise UserError("restart_link: the current link has been trained. Tie a knot to begin another one")
        adapted.begin_link(old_rank if rank is None else rank, old_alpha if alpha is None else alpha)
        self.link_optimization.renew(self, adapted)

    def on_knot(self, link: Link) -> None:
        """Called after each knot that ``ChainOfLoRA`` ties, before the next link's first step. By default it does nothing.

        A callback's ``on_knot(trainer, pl_module, link)`` is called after it. On several processes each one calls it.

        Args:
            link: the finished link.
        """

    def live_link(self) -> Link:
        """The current link as it is now: what a knot would record.

        Raises:
            UserError: if the module trains without links.
        """
        return self.adapted.live_link()

    def _position(self) -> FitPosition:
        """The epoch and optimizer step that the fit has reached, or had reached at its end."""
        trainer, start, end = trainer_of(self), self.current.start, self.fit_progress.end
        if trainer is not None and trainer.state.fn == "fit":
            return FitPosition(trainer.current_epoch, trainer.global_step)
        return start if end is None or end.global_step < start.global_step else end

    def _logged(self) -> Mapping[str, Tensor]:
        """The metrics that a fit has logged last; before the current link's first step they are the last link's."""
        trainer = trainer_of(self)
        if (
            trainer is None
            or trainer.state.fn != "fit"
            or (trainer.training and trainer.global_step == self.current.start.global_step)
        ):
            return {}
        return trainer.callback_metrics

    def full_chain(self) -> Chain:
        """The finished links and the current one as it is now: all that has been trained; ``chain`` holds the finished ones."""
        return self.adapted.full_chain()

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
                f"model: self.model is a {type(self.model).__name__} and not what build_model() returned. With adopt(), return "
                "all of the task's model: target_modules and modules_to_save choose its parts. A wrapper belongs in "
                "build_model, and model.compile true compiles in place"
            )
        if not self._is_configured:  # a subclass' own configure_model may have frozen more
            self.adapted.trained.record_trainable()
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
        seed = self._choose_seed()
        adapted = self._adapted = AdaptedModel(
            self._build_base,
            functools.partial(getattr, self, "lora_config"),  # in which build_model may choose modules_to_save
            seed=seed,
            name=self.base_name,
            is_saved=self.save_base,
            placement=self._placement,
            around=self,
            current=self.current,
        )
        if self._modules.get("model") is None:  # else one that was assigned, which configure_model refuses
            self.model = adapted.model
        adapted.cast(torch.get_default_dtype())  # now: Lightning casts only after a checkpoint's values are loaded
        adapted.trained.record_initial()
        adapted.chain.base = replace(adapted.chain.base, labels=self.labels_of_base)
        goes_on = False
        if self.first_chain is not None:
            goes_on = self.init_knot != "cola" and len(self.first_chain) > 0
            if goes_on:
                self._check_sizes(self.first_chain)
            adapted.start_from(self.first_chain, self.init_knot)
            self.fit_progress.first_link = len(self.first_chain)
        if adapted.layers and not goes_on:
            adapted.begin_link(*self.fit_progress.schedule.rank_and_alpha(self.n_finished, self.lora_config))
        if self.activation_checkpointing:
            self.checkpoint_activations()

    def _check_sizes(self, chain: Chain) -> None:
        """Refuses another rank or alpha than that of the last link, which goes on.

        Raises:
            UserError: for these.
        """
        rank, alpha = self.fit_progress.schedule.rank_and_alpha(len(chain), self.lora_config)
        if (rank, alpha) != (chain[-1].rank, chain[-1].alpha):
            raise UserError(
                f"model.init_knot: with {self.init_knot}, the rank and alpha must be those of the last link of "
                f"{self.init_chain!r}, {chain[-1].rank} and {chain[-1].alpha:g}, got {rank} and {alpha:g}"
            )

    def _choose_seed(self) -> int:
        """The seed that was given, that of the expected state, or a random one."""
        if self.user_seed is not None:
            return self.user_seed
        text = os.environ.get("PL_GLOBAL_SEED")  # what seed_everything was given
        self.user_seed = None if text is None else int(text)
        seed = self.user_seed if self._stored_seed is None else self._stored_seed
        if seed is None:
            seed = layout.gather_objects(secrets.randbits(31))[0]  # from no generator of torch's
            log.info("No seed given (model.seed); using %d", seed)
        return seed

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
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass: ``module(x)`` is ``module.model(x)``."""
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------ a copy, and files

    @contextmanager
    def at(self, links: int | str) -> Iterator[nn.Module]:
        """Inside the block, ``self.model`` is as it was after its first links: a reference or a teacher, and no second model.

        It is in evaluation mode, and no gradients are computed. Its outputs are those of :meth:`merged_model`, within rounding.
        After the block, also if it raises, everything is as it was before.

        Args:
            links: how many links, the finished ones first and then the current one: ``self.n_finished`` is the model without
                the current link. 0 is the base. Or the name of the last stage.

        Yields:
            The model.

        Raises:
            UserError: if there are fewer links, or the module trains without links.

        Example:
            >>> class Distillation(COLAModule):
            ...     def build_model(self):
            ...         return nn.Sequential(nn.Linear(4, 2))
            >>> module = Distillation(target_modules="all-linear", rank=1, alpha=2, seed=0)
            >>> x = torch.ones(1, 4)
            >>> with module.at(links=0) as base:
            ...     teacher = base(x)
            >>> torch.equal(teacher, module(x)), teacher.requires_grad
            (True, False)
        """
        with self.adapted.at(number_of_links(links, self.link_names)) as model:
            yield model

    @property
    def link_names(self) -> list[str | None]:
        """The name of each link's stage, the current link's last."""
        return [*(link.name for link in self.adapted.chain.links), self.current.name]

    def merged_model(
        self,
        links: int | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> nn.Module:
        """A plain copy of the model with the chain merged into its weights, without LoRA layers.

        Parameters trained outside of ``self.model`` are not in the copy; a warning names them. If the model is sharded, the
        copy is built on the CPU from a new base, without communication. (With full fine-tuning the parameters are gathered:
        every process must call this.)

        Args:
            links: how many links, the finished ones first and then the current one, or the name of the last stage; None: all. 0
                is the base.
            dtype: to which each weight is rounded once its links are added; None: float32, whatever the model was trained in
                (float64 where that was float64); if ``target_modules`` is null, its own.
            device: where the copy is; None: where the model is.

        Raises:
            UserError: if there are fewer links.
        """
        self.make_model()
        model = self.adapted.merged_model(number_of_links(links, self.link_names), dtype=dtype, device=device)
        values = self.adapted.trained.outside()
        if outside := [name for name, value in values.items() if value.requires_grad]:
            log.warning("merged_model: %s is trained outside of self.model, and not in the copy", " and ".join(outside))
        return model

    def export(
        self,
        folder: str | Path,
        format: Format = "merged",
        *,
        dtype: Dtype | None = None,
        max_rank: int | None = None,
        base_folder: str | Path | None = None,
        license: str | None = None,
        verify: bool = True,
        overwrite: bool = False,
    ) -> list[str]:
        """Exports the model, as ``cola export`` does for a checkpoint, from a copy on the CPU.

        A sharded model can only be exported as a chain, by one process; the other formats are exported from a checkpoint.

        Args:
            folder: a folder that does not exist, or is empty.
            format: ``merged`` writes a plain Hugging Face model or, for other modules, a state dict. ``peft`` writes the chain
                as one PEFT adapter. ``chain`` writes a chain folder, which keeps the links apart.
            dtype: Write the weights of a ``merged`` model in ``float32``, ``bfloat16`` or ``float16``. By default, they have
                the type of ``model.dtype``, or float32 for modules without this option.
            max_rank: Reduce a ``peft`` adapter to this rank. It becomes smaller, but its outputs change. The error of each
                layer is printed.
            base_folder: Also write the base of a ``peft`` adapter to this folder, which the adapter then names. It is needed if
                peft cannot load the base by its name.
            license: Write this license into the model card, as an identifier of the Hugging Face hub: ``apache-2.0``.
            verify: load the export, and compare its logits with the module's.
            overwrite: replace a folder that is not empty.

        Returns:
            The lines that the command prints: how closely the logits agree, and what a user of the folder must know.

        Raises:
            UserError: for incompatible options, a folder that is not empty, or a model that cannot be exported in this format.
            ExportError: if the export cannot be loaded or, in float32, gives other logits; it is removed.
        """
        base = None if base_folder is None else Path(base_folder)
        options = ExportOptions(Path(folder), format, dtype, max_rank, base, license, verify, overwrite)
        self.make_model()
        if format == "chain":
            return export_chain(self.full_chain(), options)
        if self.is_sharded:  # to compare logits, every process would have to write
            raise UserError(
                f"format: a sharded model can only be exported as chain, got {format}. Use `cola export`, or "
                "load_from_checkpoint in one process, on a checkpoint"
            )
        model = self.trained_model(*(data_facts(trainer_of(self), name) for name in ("prompt_format", "identity")))
        return export_model(replace(model, adapted=self.adapted.copy_on_cpu()), options)

    def trained_model(self, prompt_format: Mapping[str, Any], data: Mapping[str, Any]) -> TrainedModel:
        """The model as an export needs it, and would use up.

        Args:
            prompt_format: how the data module prompts the model (``EpochDataModule.prompt_format``); empty: it does not.
            data: which data the model was trained on (``EpochDataModule.identity``).
        """
        outside = [name for name, value in self.adapted.trained.outside().items() if value.requires_grad]
        return TrainedModel(
            self.adapted,
            self.full_chain(),
            self.base_name,
            self.named_base,
            tokenizer=copy.deepcopy(getattr(self, "image_processor", None) or getattr(self, "tokenizer", None)),
            example=self.example_input_array,
            arguments={name: self.constructor_arguments[name] for name in ("class_path", "init_args")},
            prompt_format=prompt_format,
            data=data,
            outside=outside,
        )

    # ------------------------------------------------------------------ training

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A new optimizer and learning-rate schedule for the current link; called again at each knot that merges."""
        step, saved = self.current.position.global_step, self.lora_config.modules_to_save
        return self.link_optimization.configure(self.named_trained_parameters(), saved, step)

    # ------------------------------------------------------------------ state

    @override
    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """What training changes: links, fully trained modules, buffers, and the module's other parameters; no frozen weight.

        Its entries ``chain.*`` hold the finished links and all else with which :meth:`load_state_dict` restores the module. All
        entries are tensors, and a checkpoint of Lightning's contains them.
        """
        self.make_model()
        state = self.adapted.trained.state(prefix, keep_vars=keep_vars, into=destination)
        state |= state_of(self, prefix)
        return state

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a :meth:`state_dict`; finished links are replayed, or removed.

        Args:
            state_dict: as :meth:`state_dict` returns it.
            strict: False leaves missing values unchanged, ignores unknown ones, and returns their names.
            assign: see ``nn.Module.load_state_dict``.

        Raises:
            UserError: if a name is missing or unknown, or the links were trained on another base.
        """
        names = super().load_state_dict(state_dict, strict=False, assign=assign)
        if strict and (names.missing_keys or names.unexpected_keys):
            raise StateDictError(
                "checkpoint: it does not contain exactly what this module trains. Missing key(s) in "
                f"state_dict: {sorted(names.missing_keys)}. Unexpected key(s) in state_dict: {sorted(names.unexpected_keys)}"
            )
        return names

    def expect_state(
        self, state: StoredState, *, links: int | str | None = None, scale: Mapping[int | str, float] | None = None
    ) -> None:
        """Prepares the module, before its model is made, for the state that :meth:`load_state_dict` will load.

        The model is made with the state's seed, without ``init_chain``, and without the base's weights if the state has them.

        Args:
            state: a checkpoint's.
            links: how many of its links are loaded, or the name of the last stage; None: all.
            scale: factors of the links' updates, see :meth:`load_from_checkpoint`.
        """
        self.requested, self.first_chain = (links, scale or {}), None
        self._stored_seed, self._is_base_stored = state.facts["seed"], "base_weights" in state.facts
        self.fit_progress.restore_held_out(state.facts.get("held_out", [None]))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes a checkpoint of weights alone, for which Lightning calls no callback: see :func:`prepare_checkpoint`."""
        if "callbacks" not in checkpoint:
            prepare_checkpoint(self, checkpoint)

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        links: int | str | None = None,
        scale: Mapping[int | str, float] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a module onto the CPU, as in Lightning; its class and arguments are read from the checkpoint.

        If the checkpoint contains its base, ``build_model`` need not make the base's weights first. For what another person's
        checkpoint can do, see docs/guarantees.md.

        Args:
            checkpoint_path: a file that a fit wrote: its path, its URL, or an open file.
            map_location: a device to move the module to, or a function or dict that gives it, as for ``torch.load`` of tensors
                on the CPU; None: it stays on the CPU.
            hparams_file: a YAML or CSV file with arguments of the class, in place of the checkpoint's.
            strict: whether the module's trained values and the checkpoint's must have the same names; None: as
                ``strict_loading`` says, which is true unless it was set, and which True may not contradict.
            weights_only: False unpickles any object in the file, which may run code: only for a trusted file.
            links: how many links, the finished ones first and then the current one, or the name of the last stage; None: all. 0
                is the base.
            scale: for evaluation: factors of links' updates, by a stage's name or a link's index. 0 leaves a link out. What
                else was trained, such as a head, is not scaled. A new link begins after the scaled ones.
            **kwargs: arguments of the class, in place of the checkpoint's. It has none that is not a plain value, and no
                ``optimizer``, ``compile``, ``activation_checkpointing``, ``attn_implementation`` or ``trust_remote_code``.

        Raises:
            UserError: for a path that is not a checkpoint, a damaged checkpoint, or another base.
        """
        given = {} if hparams_file is None else read_arguments(hparams_file, cls)
        opened, is_plain = checkpoint_path, weights_only is not False
        if not isinstance(opened, OpenedCheckpoint):
            opened = OpenedCheckpoint.open(opened, weights_only=is_plain)
        # Not by Lightning's method, which unpickles what is at a URL, and calls what the hyperparameters name.
        module: Self = rebuilt(cls, opened.state.facts["module"], given | kwargs)
        if strict and not module.strict_loading:
            raise UserError(f"strict: cannot be True, because {type(module).__name__}.strict_loading is False")
        module.expect_state(opened.state, links=links, scale=scale)
        module.make_model()
        module.on_load_checkpoint(opened.contents)
        strict = module.strict_loading if strict is None else strict
        keys = module.load_state_dict(opened.contents["state_dict"], strict=strict)
        if any(keys):
            rank_zero_warn(f"checkpoint: the module alone has {keys.missing_keys}, the checkpoint alone {keys.unexpected_keys}")
        return module if map_location is None else module.to(device_of(map_location))

    # ------------------------------------------------------------------ the model is made when it is first read

    @LightningModule.trainer.setter  # type: ignore[attr-defined, untyped-decorator]
    def trainer(self, trainer: Trainer | None) -> None:
        """Attaches a Trainer, and to the Trainer this module's callback; a subclass may override ``configure_callbacks``.

        Lightning goes through the children for that, for which the model need not be made.
        """
        is_making, self._is_making = self._is_making, True
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        self._is_making = is_making
        if isinstance(trainer, Trainer) and trainer.lightning_module is self:
            attach(self, trainer)

    @override
    def __getattr__(self, name: str) -> Any:
        if name == "model":
            self._ensure_model()
        return super().__getattr__(name)

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


# Pickle finds a function by its name, and jsonargparse a default's values in the signature, if that has a lambda.
default_optimizer = inspect.signature(COLAModule.__init__).parameters["optimizer"].default
default_optimizer.__qualname__ = "default_optimizer"


def _compile_options() -> dict[str, Any]:
    """Options for torch.compile: a model is compiled for each rank of a chain, in training and in evaluation.

    Torch's limit of 8 remains in versions in which it cannot be set for one model.
    """
    return {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
