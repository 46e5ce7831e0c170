"""The Lightning module that owns a base model and its chain."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW
from typing_extensions import override

from cola_lightning.chain.chain import Chain, Link, number_of_links
from cola_lightning.chain.checkpoint import OpenedCheckpoint, StoredState
from cola_lightning.chain.schedule import Knot
from cola_lightning.constants import Dtype
from cola_lightning.export.options import ExportOptions, Format
from cola_lightning.module.adopt import adopt, check_constructor
from cola_lightning.module.arguments import RecordsArguments, rebuilt
from cola_lightning.module.exports import export
from cola_lightning.module.late import LateModel
from cola_lightning.module.optimization import LinkConfig, OptimizerCallable
from cola_lightning.module.run import ExpectedState, InitChain, Run
from cola_lightning.module.state import prepare_checkpoint, prepare_loading, state_of

log = logging.getLogger(__name__)


class COLAModule(LateModel, RecordsArguments):
    """A pretrained model that is fine-tuned with a chain of low-rank links.

    A subclass defines ``build_model`` and ``training_step``. ``self.model`` is what ``build_model`` returned, with its target
    layers adapted in place; ``self.chain`` contains the finished links. The callback
    :class:`~cola_lightning.ChainOfLoRA` decides when a link is finished; without it the run is one link: plain LoRA.

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
        compile: Apply ``torch.compile`` to the model. It compiles once per rank, for training and for validation.
        activation_checkpointing: Store only the inputs of the model's blocks and recompute the rest in the backward pass. It
            needs less memory and more time, and the gradients are the same.
        **link: which layers get links, what the links are like, and how they are optimized: the arguments of
            :class:`~cola_lightning.LoRAConfig` and of :class:`~cola_lightning.module.optimization.LinkConfig`, such as
            ``target_modules``, ``rank``, ``alpha`` and ``lr_schedule``.

    Attributes:
        run: where training stands: the schedule, the current link and its optimization.
        step_loss: weighs the losses of an optimizer step's batches.

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
        compile: bool = False,
        activation_checkpointing: bool = False,
        **link: Any,
    ) -> None:
        super().__init__()
        check_constructor(self, COLAModule, received={*link} | ({"seed"} if seed is not None else set()))
        start = InitChain.of(init_chain, init_links, init_continues, init_knot)
        # Plain numbers: jsonargparse's restricted types would make a checkpoint unreadable for torch.load(weights_only=True).
        seed = None if seed is None else int(seed)
        self.run = Run(self, self.constructor_arguments, LinkConfig(**link), optimizer, seed, start)
        self.step_loss, self.should_compile = self.run.step_loss, compile
        self.activation_checkpointing = activation_checkpointing
        self.register_load_state_dict_pre_hook(prepare_loading)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------ defined or overridden by a subclass

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
        if self.run.made is None:  # a rebuild needs the base alone
            adopt(self, task, COLAModule)
        return task

    def on_knot(self, link: Link) -> None:
        """Called with the finished link after each knot that ``ChainOfLoRA`` ties, before the next link's first step.

        A callback's ``on_knot(trainer, pl_module, link)`` is called after it. On several processes each one calls it.
        """

    # ------------------------------------------------------------------ its parts

    @property
    def chain(self) -> Chain:
        """The finished links, without the current one, which :meth:`full_chain` adds; none before the model is made."""
        return Chain() if self.run.made is None else self.run.made.chain

    def full_chain(self) -> Chain:
        """The finished links and the current one as it is now: all that has been trained; ``chain`` holds the finished ones."""
        self.make_model()
        self.run.note_progress()
        return self.adapted.full_chain()

    def live_link(self) -> Link:
        """The current link as it is now: what a knot would record.

        Raises:
            UserError: if the module trains without links.
        """
        self.make_model()
        self.run.note_progress()
        return self.adapted.live_link()

    @property
    def link_names(self) -> list[str | None]:
        """The name of each link's stage, the current link's last."""
        return [*(link.name for link in self.adapted.chain.links), self.run.current.name]

    @property
    def n_finished(self) -> int:
        """How many links are finished, which is also the index of the current one."""
        return len(self.chain)

    @property
    def seed(self) -> int | None:
        """The seed of every random draw; if none was given, None until the model is made."""
        return self.run.seed

    @property
    def link_steps(self) -> float:
        """Optimizer steps of the current link, for a learning-rate schedule of your own in ``configure_optimizers``.

        If the optimizer goes on over the knots (``half``, ``record``), these are the steps of the run. ``math.inf`` if nothing
        ends the link, or its end is not known beforehand, and outside of a fit. In a fit it sets up the training data, as
        Lightning's ``trainer.estimated_stepping_batches`` does, which counts the steps of the whole run.
        """
        return self.run.link_steps()

    def named_trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters for the optimizer, with their names: the current link's, fully trained modules', and others'."""
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
        self.make_model()
        return self.run.tie_knot(rank, alpha)

    def restart_link(self, *, rank: int | None = None, alpha: float | None = None) -> None:
        """Starts the current link again, before its first step, with another rank or alpha: in :meth:`on_knot`, for example.

        Its optimizer is new; with ``kept_optimizer_state`` it has that share of the last link's state.

        Args:
            rank: of the link; None: as it is.
            alpha: of the link; None: as it is.

        Raises:
            UserError: if the module trains without links, the rank is above ``model.rank``, or the link has been trained.
        """
        self.make_model()
        self.run.restart_link(rank, alpha)

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
            verify: load the export, and compare its logits with the module's.
            overwrite: replace a folder that is not empty.

        Returns:
            The lines that the command prints: how closely the logits agree, and what a user of the folder must know.

        Raises:
            UserError: for incompatible options, a folder that is not empty, or a model that cannot be exported in this format.
            ExportError: if the export cannot be loaded or, in float32, gives other logits; it is removed.
        """
        return export(self, ExportOptions(Path(folder), format, dtype, max_rank, verify, overwrite))

    # ------------------------------------------------------------------ optimizer, and state

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A new optimizer and learning-rate schedule for the current link; called again at each knot that merges."""
        return self.run.configure(self.named_trained_parameters())

    @override
    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """What training changes: links, fully trained modules, buffers, and the module's other parameters; no frozen weight.

        Its entries ``chain.*`` hold the finished links and all else with which ``load_state_dict`` restores the module: it
        replays or removes links. All entries are tensors, and a checkpoint of Lightning's contains them.
        """
        self.make_model()
        state = self.adapted.trained.state(prefix, keep_vars=keep_vars, into=destination)
        state |= state_of(self.run, prefix)
        return state

    def expect_state(
        self, state: StoredState, *, links: int | str | None = None, scale: Mapping[int | str, float] | None = None
    ) -> None:
        """Prepares the module, before its model is made, for the state that ``load_state_dict`` will load.

        The model is made with the state's seed, and without ``init_chain``.

        Args:
            state: a checkpoint's.
            links: how many of its links are loaded, or the name of the last stage; None: all.
            scale: factors of the links' updates, see :meth:`load_from_checkpoint`.
        """
        live = {} if state.live is None else state.live.factors
        earlier = [name for name in state.chain.base.weight_norms if name not in live]
        self.run.expected, self.run.first_chain = ExpectedState(links, scale or {}, state.facts.seed, earlier), None
        self.run.restore_held_out(state.facts.held_out)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes a checkpoint of weights alone, for which Lightning calls no callback: see :func:`prepare_checkpoint`."""
        if "callbacks" not in checkpoint:
            prepare_checkpoint(self.run, checkpoint)

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]  # it reads no file of hyperparameters
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        *,
        strict: bool | None = None,
        weights_only: bool | None = None,
        links: int | str | None = None,
        scale: Mapping[int | str, float] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a module onto the CPU, as in Lightning; its class and arguments are read from the checkpoint.

        For what another person's checkpoint can do, see docs/guarantees.md.

        Args:
            checkpoint_path: a file that a fit wrote: its path, its URL, or an open file.
            map_location: a device to move the module to; None: it stays on the CPU.
            strict: whether the module's trained values and the checkpoint's must have the same names; None: as
                ``strict_loading`` says, which is true unless it was set.
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
        opened = checkpoint_path
        if not isinstance(opened, OpenedCheckpoint):
            opened = OpenedCheckpoint.open(opened, weights_only=weights_only is not False)
        # Not by Lightning's method, which unpickles what is at a URL, and calls what the hyperparameters name.
        module: Self = rebuilt(cls, opened.state.facts.module, kwargs)
        module.expect_state(opened.state, links=links, scale=scale)
        module.make_model()
        module.on_load_checkpoint(opened.contents)
        strict = module.strict_loading if strict is None else strict
        keys = module.load_state_dict(opened.contents["state_dict"], strict=strict)
        if any(keys):
            rank_zero_warn(f"checkpoint: the module alone has {keys.missing_keys}, the checkpoint alone {keys.unexpected_keys}")
        return module if map_location is None else module.to(map_location)
