"""The Lightning module that owns a base model and its chain."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW
from typing_extensions import override

from cola_lightning.chain import Chain, Link
from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.chain.schedule import ChainSchedule, LRSchedule, TrainedFactors
from cola_lightning.constants import Dtype
from cola_lightning.errors import UserError
from cola_lightning.export.module import export_trained
from cola_lightning.export.options import ExportOptions, Format
from cola_lightning.lora.config import LoRAConfig
from cola_lightning.module.arguments import device_of, made_again, read_arguments
from cola_lightning.module.base import BaseCOLAModule, values_of
from cola_lightning.module.fit import attach
from cola_lightning.module.optimization import LinkOptimization, OptimizerCallable
from cola_lightning.module.run import Run, run_of, trainer_of
from cola_lightning.module.state import StateDictError, of_data, prepare_checkpoint, prepare_loading, state_of

log = logging.getLogger(__name__)


class COLAModule(BaseCOLAModule):
    """A pretrained model that is fine-tuned with a chain of low-rank links.

    A subclass defines ``build_model`` and ``training_step``. ``self.model`` is what ``build_model`` returned, with its target
    layers adapted in place; ``self.chain`` contains the finished links. The callback
    :class:`~cola_lightning.ChainOfLoRA` decides when a link is finished; without it the run is one link: plain LoRA.

    Args:
        modules_to_save_lr: the initial learning rate of ``modules_to_save``; ``null``: the optimizer's, as for the links.
        lr_ratio_B: the learning rate of the links' B, divided by that of all else (LoRA+: 2 to 16).
        seed: of each link's A, each batch's dropout and what ``build_model`` draws. ``null``: the seed of
            ``seed_everything``, or a random one, which is stored.
        optimizer: called with the trainable parameters, once per link. Default: AdamW, fused, with a learning rate of 1e-3.
        lr_schedule: ``constant``, ``linear`` or ``cosine`` decay to 0, by transformers' formulas.
        warmup_steps: optimizer steps over which the rate rises from 0; below 1, a share of the schedule's length.
        schedule_scope: whether the schedule runs over each ``link`` or once over the whole ``run``.
        knot_warmup_steps: optimizer steps over which the rate rises from 0 again after each knot, back onto a schedule over the
            ``run`` (ReLoRA's jagged rate); below 1, a share of the link's length.
        trained_factors: of each link: ``both``; ``B`` only, with A at its random initial values (asymmetric LoRA); or one
            of them chosen at ``random``, with the other at its initial values (RAC-LoRA).
        kept_optimizer_state: the share of the optimizer state of A and B, the entries with the largest first moments, that a
            knot retains, as in ReLoRA (0.001 to 0.1); 0: a new optimizer; 1: all, and so with every share above 0 for states
            that are 8-bit or factored (AdamW8bit, Adafactor).
        init_chain: a chain folder, a checkpoint, or the folder of an ordinary PEFT LoRA, whose links are applied before
            training starts; ``null``: start from the base. Checkpoints of the run contain these links too.
        init_links: how many links of ``init_chain``, from the first; ``null``: all.
        save_base: store the weights of the adapted base in each checkpoint, for a base that cannot be rebuilt bit for bit.
        compile: apply ``torch.compile`` to the model; it compiles once per rank, for training and for validation.
        activation_checkpointing: store only the inputs of the model's blocks and recompute the rest in the backward pass: less
            memory, more time, the same gradients.
        **lora: which layers get links, and what the links are like: the arguments of :class:`~cola_lightning.LoRAConfig`, such
            as ``target_modules``, ``rank`` and ``alpha``.

    Attributes:
        lora_config: the :class:`~cola_lightning.LoRAConfig` of these arguments.

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
        >>> module.link, type(module.merged_model()[0]).__name__
        (1, 'Linear')

    Source: Xia et al., "Chain of LoRA" (arXiv 2401.04151), algorithm 1. ``lr_ratio_B``: Hayou et al., "LoRA+" (arXiv
        2402.12354).
    """

    # **lora, against our rule for constructors: jsonargparse and --help follow it into LoRAConfig, where each of its arguments
    # is defined, checked and documented once.
    def __init__(
        self,
        *,
        modules_to_save_lr: float | None = None,
        lr_ratio_B: float = 1,
        seed: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-3, fused=True),
        lr_schedule: LRSchedule = "linear",
        warmup_steps: float = 0,
        schedule_scope: Literal["link", "run"] = "link",
        knot_warmup_steps: float = 0,
        trained_factors: TrainedFactors = "both",
        kept_optimizer_state: float = 0,
        init_chain: str | None = None,
        init_links: int | None = None,
        save_base: bool = False,
        compile: bool = False,
        activation_checkpointing: bool = False,
        **lora: Any,
    ) -> None:
        config = LoRAConfig(**lora)
        if init_links is not None and init_chain is None:
            raise UserError("model.init_links: needs model.init_chain")
        # Plain numbers: jsonargparse's restricted types would make a checkpoint unreadable for torch.load(weights_only=True).
        schedule = ChainSchedule(default_rank=int(config.rank), default_alpha=float(config.alpha))
        seed = None if seed is None else int(seed)
        run = Run(schedule, seed, seed)
        super().__init__(config, run)
        self.trained_factors, self.save_base = trained_factors, save_base
        self.init_chain = None if init_chain is None else str(init_chain)
        self.init_links = None if init_links is None else int(init_links)
        self.should_compile, self.activation_checkpointing = compile, activation_checkpointing
        run.optimization = LinkOptimization(
            optimizer,
            modules_to_save_lr,
            lr_ratio_B,
            lr_schedule,
            warmup_steps,
            schedule_scope,
            knot_warmup_steps,
            kept_optimizer_state,
            run,
        )
        self.register_load_state_dict_pre_hook(prepare_loading)  # type: ignore[no-untyped-call]

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

    # ------------------------------------------------------------------ links

    def tie_knot(self, *, rank: int | None = None, alpha: float | None = None) -> Link:
        """Finishes the current link and begins the next: merges or stacks it, records it, draws a new A.

        The optimizer and its schedule are created again, with empty state. During training, call it between optimizer steps: in
        ``on_train_batch_start``, or in a callback's ``on_train_batch_end`` (a module's own runs after that step's checkpoint is
        written).

        Args:
            rank: the next link's rank; None: what the schedule says.
            alpha: the next link's alpha; None: what the schedule says.

        Returns:
            The finished link.

        Raises:
            UserError: if the module trains without links, or the rank is above ``model.rank``.

        Source: Xia et al., arXiv 2401.04151, section 3, "Tie a knot" and "Extend the chain".
        """
        self.adapted.check_next(rank)
        self.step_loss.check()  # before the link is recorded
        adapted, run, trainer = self.adapted, run_of(self), trainer_of(self)
        run.is_tying = True
        rank = run.schedule.rank(self.link + 1) if rank is None else rank
        alpha = run.schedule.alpha(self.link + 1) if alpha is None else alpha
        link = adapted.tie_knot(rank, alpha, **run.metadata(trainer))
        run.optimization.begin_link(self, adapted, run.position(trainer))
        run.begin_metrics(trainer)
        run.is_tying = False  # not in a finally: after a knot that failed halfway nothing may be written
        return link

    def begin_link(self, *, rank: int | None = None, alpha: float | None = None) -> None:
        """Begins the current link again, before its first step, with another rank or alpha: in :meth:`on_knot`, for example.

        Its optimizer is new; with ``kept_optimizer_state`` it has that share of the last link's state.

        Args:
            rank: of the link; None: as it is.
            alpha: of the link; None: as it is.

        Raises:
            UserError: if the module trains without links, the rank is above ``model.rank``, or the link has been trained.
        """
        adapted, run = self.adapted, run_of(self)
        adapted.check_next(rank)
        if any(layer.has_begun for layer in adapted.layers.values()):
            raise UserError("begin_link: the current link has been trained; tie a knot to begin another one")
        assert adapted.live is not None
        before = adapted.live
        adapted.begin_link(before[0] if rank is None else rank, before[1] if alpha is None else alpha)
        run.optimization.begin_link(self, adapted, run.position(trainer_of(self)))

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
        return self.adapted.live_link(**run_of(self).metadata(trainer_of(self)))

    def full_chain(self) -> Chain:
        """The finished links and the current one as it is now: all that has been trained; ``chain`` holds the finished ones."""
        live = [] if self.adapted.live is None else [self.live_link()]
        return Chain([*self.chain.links, *live], self.chain.base)

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
            format: ``merged``: a plain Hugging Face model (of another module, its state dict); ``peft``: the chain as one PEFT
                adapter; ``chain``: a chain folder.
            dtype: for merged: ``float32``, ``bfloat16`` or ``float16``; None: ``model.dtype``, or float32 for other modules.
            max_rank: for peft: recompress to this rank, by SVD.
            base_folder: for peft: write the base there, and name that folder: for a base that peft cannot load by its name.
            license: for the model card: the Hugging Face hub's identifier, such as ``apache-2.0``.
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
        prompt_format, data = (of_data(trainer_of(self), name) for name in ("prompt_format", "identity"))
        return export_trained(self, options, prompt_format, data)

    def merged_model(
        self,
        links: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> nn.Module:
        """A plain copy of the model with the chain merged into its weights, without LoRA layers.

        Parameters trained outside of ``self.model`` are not in the copy; a warning names them. If the model is sharded, the
        copy is built on the CPU from a new base, without communication. (With full fine-tuning the parameters are gathered:
        every process must call this.)

        Args:
            links: how many links, the finished ones first and then the current one; None: all. 0 is the base.
            dtype: to which each weight is rounded once its links are added; None: float32, whatever the model was trained in
                (float64 where that was float64); if ``target_modules`` is null, its own.
            device: where the copy is; None: where the model is.

        Raises:
            UserError: if there are fewer links.
        """
        self.make_model()
        model = self.adapted.merged_model(links, dtype=dtype, device=device)
        values = self.adapted.trained.outside()
        if outside := [name for name, value in values.items() if value.requires_grad]:
            log.warning("merged_model: %s is trained outside of self.model, and not in the copy", " and ".join(outside))
        return model

    # ------------------------------------------------------------------ training

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A new optimizer and learning-rate schedule for the current link; called again at each knot."""
        run = run_of(self)
        step = run.position(trainer_of(self)).global_step
        trained, saved = self.named_trained_parameters(), self.lora_config.modules_to_save
        made: OptimizerLRScheduler = run.optimization.configure(trained, saved, step)
        return made

    # ------------------------------------------------------------------ state

    @override
    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """What training changes: links, fully trained modules, buffers, and the module's other parameters; no frozen weight.

        Its entries ``chain.*`` hold the finished links and all else with which :meth:`load_state_dict` restores the module. All
        entries are tensors, and a checkpoint of Lightning's contains them.
        """
        self.make_model()
        state = values_of(self, prefix, keep_vars=keep_vars, into=destination)
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
        links: int | None = None,
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
            links: how many links, the finished ones first and then the current one; None: all. 0 is the base.
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
        module: Self = made_again(cls, opened.state.facts["module"], given | kwargs)
        if strict and not module.strict_loading:
            raise UserError(f"strict: cannot be True, because {type(module).__name__}.strict_loading is False")
        run_of(module).pending = replace(opened, links=links)
        module.make_model()
        module.on_load_checkpoint(opened.contents)
        strict = module.strict_loading if strict is None else strict
        keys = module.load_state_dict(opened.contents["state_dict"], strict=strict)
        run_of(module).pending = None
        if any(keys):
            rank_zero_warn(f"checkpoint: the module alone has {keys.missing_keys}, the checkpoint alone {keys.unexpected_keys}")
        return module if map_location is None else module.to(device_of(map_location))


# Pickle finds a function by its name, and jsonargparse a default's values in the signature, if that has a lambda.
default_optimizer = inspect.signature(COLAModule.__init__).parameters["optimizer"].default
default_optimizer.__qualname__ = "default_optimizer"
