"""When knots are tied."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy

# No public name identifies the strategies whose child processes return only weights.
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from typing_extensions import override

from cola_lightning.chain.chain import Link
from cola_lightning.chain.schedule import ChainSchedule, FitPosition, UserRule, is_plateau
from cola_lightning.errors import UserError
from cola_lightning.module.module import COLAModule
from cola_lightning.module.rewind import can_validate
from cola_lightning.module.run import check_no_averaging

log = logging.getLogger(__name__)


class ChainOfLoRA(Callback):
    """Ties each knot at the first batch of the optimizer step at which it is due, before that batch's forward pass.

    At most one of ``every_n_epochs``, ``every_n_train_steps``, ``at_epochs``, ``at_steps``, ``knots`` and ``patience``; with
    none of them the run is one link: plain LoRA. Steps are optimizer steps, counted over the whole run. A checkpoint written at
    a knot contains the unfinished link, and resuming it ties the knot. The patience of EarlyStopping continues across knots.

    Args:
        **options: when knots are tied, and each link's rank and alpha: the arguments of
            :class:`~cola_lightning.ChainSchedule`, such as ``every_n_epochs``, ``knots`` and ``ranks``.

    Attributes:
        schedule: the :class:`~cola_lightning.ChainSchedule` of these arguments.

    Raises:
        UserError: for more than one rule for when knots are tied, and for invalid values.

    Example:
        >>> ChainOfLoRA(every_n_epochs=2, ranks=[8, 4, 2]).schedule.ranks
        [8, 4, 2]

    Source: Xia et al., "Chain of LoRA" (arXiv 2401.04151), algorithm 1: the knot comes before the forward pass of its step.
    """

    # **options: see COLAModule; each of them is defined, checked and documented once, in ChainSchedule.
    def __init__(self, **options: Any) -> None:
        self.schedule = ChainSchedule(**options)
        if self._has_user_rule:
            self.schedule = UserRule(**options)
        self._last_step: int | None = None  # global step at the last batch start
        self._values: dict[int, float] = {}  # the monitored metric's, by the first step at which each is known

    def should_tie(self, epoch: int, global_step: int) -> bool:
        """Whether a knot is due. Called once for each optimizer step except a link's first; override it for your own rule.

        On several processes all of them tie a knot if it is due on one.

        Args:
            epoch: epochs finished.
            global_step: optimizer steps taken.
        """
        start, schedule = self.module.run.current.start, self.schedule
        if schedule.patience is not None:  # a value known at a link's first step belongs to the previous link
            known = (value for step, value in self._values.items() if start.global_step < step <= global_step)
            return is_plateau(known, schedule.patience, schedule.min_delta, schedule.mode)
        return self.module.run.schedule.is_due(start, FitPosition(epoch, global_step))

    @property
    def _has_user_rule(self) -> bool:
        """Whether ``should_tie`` is a subclass' own."""
        return type(self).should_tie is not ChainOfLoRA.should_tie

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, COLAModule):
            raise UserError(f"model: ChainOfLoRA needs a COLAModule, got a {type(pl_module).__name__}")
        check_strategy(trainer.strategy)
        if self.schedule.has_knots:
            check_no_averaging(pl_module)
        ranks, largest = self.schedule.ranks or [], pl_module.run.config.rank
        if max(ranks, default=0) > largest:
            raise UserError(f"chain.ranks: must be at most {largest} (model.rank), got {max(ranks)}")
        self.module: COLAModule = pl_module
        self._last_step = None
        if stage == "fit":
            # Keeps the values of a fit that this Trainer continues; a checkpoint's replace them.
            self._values = {step: value for step, value in self._values.items() if step <= trainer.global_step}
        # A new list: the trainer is iterating over the old one. Checkpoint callbacks stay last, as Lightning orders them.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = FitPosition(trainer.current_epoch, trainer.global_step)
        is_inside_window, self._last_step = now.global_step == self._last_step, now.global_step
        if now.global_step == self.module.run.current.start.global_step:
            if now != self.module.run.current.start:  # a knot tied by hand at the end of an epoch counted that epoch
                self.module.run.count_from(now)
                self.module.run.renew()
            return
        if is_inside_window:  # of accumulated batches
            return
        is_due = self.should_tie(*now)
        if trainer.world_size > 1 and self._has_user_rule:  # which may read values that differ between the processes
            is_due = trainer.strategy.reduce_boolean_decision(bool(is_due), all=False)
        if is_due:
            link = self.module.tie_knot()
            self._report(link, trainer, "finished")
            self.module.on_knot(link)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "on_knot"):
                    callback.on_knot(trainer, self.module, link)

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.num_sanity_val_steps == math.inf:  # all validation batches, not only the first
            log.info("before training: %s", _of_validation(trainer.callback_metrics) or "no metric")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.schedule.has_knots:
            config = self.module.run.config
            self.module.adapted.checked_link(config.rank, config.alpha)  # refuses a module without links
        counts_steps = self.schedule.every_n_train_steps or self.schedule.at_steps or self.schedule.knots
        if counts_steps and (n := len(trainer.optimizers)) > 1:
            log.warning(
                "chain: each of the %d optimizers counts its own steps, as in trainer.max_steps, so knots by steps, or by "
                "chain.knots, come early. Use every_n_epochs or at_epochs",
                n,
            )
        if self.schedule.patience is not None and not can_validate(trainer):
            raise UserError("chain.patience: this run has no validation. It needs rows (data.val_size) and a validation_step")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.schedule.patience is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        logged, name = trainer.callback_metrics, self.schedule.monitor
        if name not in logged:
            raise UserError(
                f"chain.monitor: {name} is not logged in validation. Logged are {', '.join(sorted(logged)) or 'no metrics'}"
            )
        # The mean over the processes, so that all of them tie a knot or none does; of a copy, because reduce changes it.
        value = logged[name].detach().to(trainer.strategy.root_device, copy=True)
        # By step: a validation that a resumed run repeats counts once. Inside an accumulation window the value is known
        # only from the next step on, also in a run that resumes at the window's beginning.
        is_inside_window = trainer.global_step == self._last_step
        known_at = trainer.global_step + is_inside_window
        self._values[known_at] = float(trainer.strategy.reduce(value, reduce_op="mean"))

    @override
    def state_dict(self) -> dict[str, Any]:
        """The current link's values of the monitored metric; nothing before a run has begun."""
        if not self._values:
            return {}
        start = self.module.run.current.start.global_step
        values = {step: value for step, value in self._values.items() if step > start}
        return {"values": values, "monitor": self.schedule.monitor}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._values = state_dict["values"] if state_dict.get("monitor") == self.schedule.monitor else {}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.module.adapted.layers:
            self._report(self.module.live_link(), trainer, "live at the end")

    def _report(self, link: Link, trainer: Trainer, what: str) -> None:
        if not trainer.is_global_zero:
            return
        norm, base = link.at_end().norm(), math.hypot(*self.module.chain.base.weight_norms.values())
        metrics = _of_validation(link.metrics)
        log.info(
            "link %d %s: steps %d to %d, rank %d, update norm %.4g (%.2g of the base's)%s",
            *(link.index, what, link.start_step, link.end_step, link.rank, norm, norm / base if base else math.nan),
            f", {metrics}" if metrics else "",
        )
        for logger in trainer.loggers:
            logger.log_metrics({"link": float(link.index), "link_update_norm": norm}, step=trainer.global_step)


def _of_validation(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items() if name.startswith("val_"))


def check_strategy(strategy: Strategy) -> None:
    """Refuses a strategy under which a chain would be wrong or lost.

    Raises:
        UserError: for a strategy that owns the optimizer, or that starts its processes by fork or spawn.
    """
    if isinstance(strategy, DeepSpeedStrategy) or isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} cannot train a chain: DeepSpeed's engine owns the optimizer that a "
            "knot replaces, and processes that are forked or spawned do not return the chain. Use ddp, fsdp or "
            "ModelParallelStrategy (FSDP2: configs/overlays/fsdp2.yaml)"
        )
