"""The Lightning module that owns a base model and its chain."""

import copy
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from cola_lightning import distributed
from cola_lightning.adapt import check_numbers, inject_lora, lora_layers, strip_lora
from cola_lightning.chain import Link, begin_link, describe_base, finish_link
from cola_lightning.errors import UserError
from cola_lightning.layers import Init
from cola_lightning.modules.checkpoint import CheckpointedChain, frozen_weights
from cola_lightning.modules.keeper import ChainKeeper
from cola_lightning.schedule import ChainSchedule, Counters, LRSchedule, RunLength, lr_factor

log = logging.getLogger(__name__)

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]


class COLAModule(CheckpointedChain):
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
        seed: from which each link's A, each batch's dropout and what ``build_model`` draws come. ``null``: the seed of
            ``seed_everything``, else one is drawn and stored.
        optimizer: called with the trainable parameters, anew for each link. Default: AdamW with a learning rate of 1e-3.
        lr_schedule: ``constant``, ``linear`` or ``cosine`` decay to 0, by transformers' formulas.
        warmup_steps: optimizer steps over which the rate rises from 0; below 1, a share of the schedule's length.
        schedule_scope: whether the schedule runs over each ``link`` or once over the whole ``run``.
        finished_links: ``merge`` adds a finished link to the frozen weights.
        save_base: store the adapted base's weights in each checkpoint, for a base that cannot be made again bit for bit.

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
        seed: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-3),
        lr_schedule: LRSchedule = "linear",
        warmup_steps: float = 0,
        schedule_scope: Literal["link", "run"] = "link",
        finished_links: Literal["merge"] = "merge",
        save_base: bool = False,
    ) -> None:
        super().__init__()
        check_numbers(rank, alpha, dropout)
        if not 0 <= warmup_steps < math.inf:
            raise UserError(f"model.warmup_steps: expected a number of steps, or a share below 1, received {warmup_steps}")
        # Plain numbers: jsonargparse's restricted types would make a checkpoint unreadable for torch.load(weights_only=True).
        self.target_modules, self.modules_to_save = target_modules, list(modules_to_save)
        self.rank, self.alpha, self.dropout, self.init = int(rank), float(alpha), float(dropout), init
        self.seed = None if seed is None else int(seed)
        self.optimizer = optimizer
        self.lr_schedule, self.warmup_steps, self.schedule_scope = lr_schedule, float(warmup_steps), schedule_scope
        self.finished_links, self.save_base = finished_links, save_base
        self.schedule = ChainSchedule()
        self.run_length: RunLength | None = None  # known while training

    # ------------------------------------------------------------------ what a subclass writes

    def build_model(self) -> nn.Module:
        """Makes the base model, in float32. Called under a seed of its own: what it draws depends on ``self.seed`` alone."""
        raise NotImplementedError(f"{type(self).__name__} needs a build_model() that returns its base model")

    # ------------------------------------------------------------------ the model

    @override
    def configure_model(self) -> None:
        """Makes the model and its first link, once; a second call changes nothing."""
        if hasattr(self, "model"):
            return
        if self.seed is None:
            given = os.environ.get("PL_GLOBAL_SEED")  # what seed_everything was told
            self.seed = distributed.draw_seed() if given is None else int(given)
            if given is None:
                log.info("model.seed: %d was drawn, for none was given", self.seed)
        dtype = torch.get_default_dtype()  # float64 under Lightning's 64-true
        self.model = self._make_adapted_base()
        self.chain.base = describe_base(self.model)
        self._cast_adapted(dtype)
        if self.save_base:
            self._base_weights = frozen_weights(self.model)
        if self.target_modules is not None:
            self._begin_link()

    def _make_adapted_base(self) -> nn.Module:
        assert self.seed is not None
        # Whatever the caller is in: build_model may train, and the base must not depend on the device or the precision.
        with torch.inference_mode(False), torch.enable_grad(), _default_dtype(torch.float32), torch.device("cpu"):
            with _seeded(self.seed):
                model = self.build_model()
            if not isinstance(model, nn.Module):
                raise UserError(f"{type(self).__name__}.build_model: expected an nn.Module, received {type(model).__name__}")
            if self.target_modules is not None:
                inject_lora(
                    model, self.target_modules, self.rank, self.alpha, self.dropout, self.modules_to_save, init=self.init
                )
        return model

    def _begin_link(self, rank: int | None = None, alpha: float | None = None) -> None:
        rank = self.schedule.rank(self.link, self.rank) if rank is None else rank
        alpha = self.schedule.alpha(self.link, self.alpha) if alpha is None else alpha
        assert self.seed is not None
        begin_link(self._layers, self.seed, self.link, rank, alpha)

    def tie_knot(self, *, rank: int | None = None, alpha: float | None = None) -> Link:
        """Finishes the live link and begins the next: merges it, records it in the chain, draws a new A, drops the optimizer.

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
        if rank is not None and not 1 <= rank <= self.rank:
            raise UserError(f"rank: expected 1 to {self.rank}, the largest rank of a link (model.rank), received {rank}")
        link = self.live_link()
        for layer in self._layers.values():
            layer.merge()
        self.chain.append(link)
        self._begin_link(rank, alpha)
        self.link_start = self._now
        trainer = self._attached_trainer
        if trainer is not None and trainer.training:
            trainer.strategy.setup_optimizers(trainer)
        return link

    def live_link(self) -> Link:
        """The live link as it is now: what a knot would record."""
        trainer = self._attached_trainer
        return finish_link(
            self._layers,
            index=self.link,
            start_step=self.link_start.global_step,
            end_step=self._now.global_step,
            extras=self._extras(),
            metrics={name: float(value) for name, value in trainer.callback_metrics.items()} if trainer else {},
        )

    @property
    def _now(self) -> Counters:
        trainer = self._attached_trainer
        return Counters(trainer.current_epoch, trainer.global_step) if trainer else self.link_start

    def _extras(self) -> dict[str, Tensor]:
        """What is trained whole, by name in the model."""
        factors = {f"{name}.lora_{f}" for name in self._layers for f in "AB"}
        named = self.model.named_parameters()
        return {name: distributed.gather(p) for name, p in named if p.requires_grad and name not in factors}

    def merged_model(self, links: int | None = None) -> nn.Module:
        """A plain copy of the model with the chain in its weights: no LoRA layers, nothing left at inference.

        Args:
            links: how many links, the finished ones first and then the live one; None: all. 0 is the base.

        Raises:
            UserError: if there are not as many links.
        """
        total = self.link + 1
        if links is not None and not 0 <= links <= total:
            raise UserError(f"links: expected 0 to {total}, {self.link} finished and the live one, received {links}")
        if links is None or links == total:
            model = copy.deepcopy(self.model)
        else:
            model = self._make_adapted_base()
            self._write_base(model)
            self.chain.truncate(links).replay(lora_layers(model), self.device)
            with torch.no_grad():
                for name, value in (self.chain.links[links - 1].extras if links else {}).items():
                    model.get_parameter(name).copy_(value)
        strip_lora(model, merge=True)
        return model.requires_grad_()

    # ------------------------------------------------------------------ the optimizer, one for each link

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """A new optimizer and learning-rate schedule for the live link; called again at each knot."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._lr_lambda()), "interval": "step"},
        }

    def _lr_lambda(self) -> Callable[[int], float]:
        """The learning-rate factor at the link's k-th step. It asks for its horizon when that is first needed.

        At step 0 of a run the data is not set up yet, and asking Lightning for its length there would make a resumed loader
        start over. (A function and not an object: LambdaLR would store an object's attributes.)
        """
        start = self.link_start
        offset = start.global_step if self.schedule_scope == "run" else 0
        horizon: float | None = None

        def factor(step: int) -> float:
            nonlocal horizon
            if horizon is None and self.run_length is not None and self._needs_horizon:
                is_run = self.schedule_scope == "run"
                horizon = self.run_length.end_step if is_run else self.schedule.link_steps(start, self.run_length)
            if horizon is None and self._needs_horizon:  # before training: the first value, or one that a resume replaces
                return 0.0 if self.warmup_steps else 1.0
            return lr_factor(self.lr_schedule, offset + step, math.inf if horizon is None else horizon, self.warmup_steps)

        return factor

    @property
    def _needs_horizon(self) -> bool:
        return self.lr_schedule != "constant" or 0 < self.warmup_steps < 1

    # ------------------------------------------------------------------ the run

    @override
    def configure_callbacks(self) -> Sequence[Callback]:
        return []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lets the module's own callback come along whatever a subclass' ``configure_callbacks`` returns."""
        super().__init_subclass__(**kwargs)
        own = cls.configure_callbacks

        def configure_callbacks(self: COLAModule) -> Sequence[Callback]:
            callbacks = own(self)
            callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
            return callbacks if any(isinstance(c, ChainKeeper) for c in callbacks) else [ChainKeeper(self), *callbacks]

        cls.configure_callbacks = configure_callbacks  # type: ignore[method-assign]

    def start_run(self, run_length: RunLength, now: Counters | None) -> None:
        """Takes note of a fit that begins, and refuses what cannot go well; called once the data's length is known.

        Args:
            run_length: how far the fit goes.
            now: its counters; None for a resumed one, which has them from its checkpoint.

        Raises:
            UserError: if the learning-rate schedule needs a length that is not known, if ``ranks`` or ``alphas`` are
                too short, or if a link is shorter than its warm-up.
        """
        self.run_length = run_length
        if now is None and self._had_knots and not self.schedule.has_knots:
            raise UserError("chain: expected a chain with knots, as the run that wrote the checkpoint had, received none")
        if now is not None:
            self.link_start = now
            is_untouched = not self.link and all(not layer.lora_B.any() for layer in self._layers.values())
            if self.target_modules is not None and is_untouched:  # a model that is older than the schedule
                self._begin_link()
        if not self.schedule.is_open and run_length.end_step < math.inf:
            self._check_links(self.schedule.links(self.link_start, run_length))
            return
        for field, values in (("ranks", self.schedule.ranks), ("alphas", self.schedule.alphas)):
            if values is not None:
                log.warning("chain.%s: from link %d on its last entry holds, %s", field, len(values) - 1, values[-1])
        if self._needs_horizon:
            received = self.lr_schedule if self.lr_schedule != "constant" else f"a warm-up of {self.warmup_steps:g} of it"
            raise UserError(
                "model.lr_schedule: expected constant where a link's length is not known beforehand (no max_epochs or "
                f"max_steps, endless data, or a should_tie of one's own), received {received}"
            )

    def _check_links(self, lengths: list[int]) -> None:
        """Refuses or warns of what does not fit this fit's links: their lengths in optimizer steps, the live one first."""
        total = self.link + len(lengths)
        for field, values in (("ranks", self.schedule.ranks), ("alphas", self.schedule.alphas)):
            if values is not None and len(values) < total:
                raise UserError(
                    f"chain.{field}: expected {total} entries, one for each link of this run, received {len(values)}"
                )
        if len(lengths) < 2:
            if self.schedule.has_knots and not self.link:
                log.warning("the run ends before its first knot: it is one link, plain LoRA")
            return
        shortest = min(lengths[:-1])
        if self.schedule_scope == "link" and shortest < self.warmup_steps:
            raise UserError(
                f"model.warmup_steps: expected at most {shortest}, the steps of the shortest link, "
                f"received {self.warmup_steps:g}"
            )
        if lengths[-1] < shortest / 2:
            log.warning("the last link has %d optimizer steps, the others at least %d", lengths[-1], shortest)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A seed for torch's generators inside the block; outside they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
