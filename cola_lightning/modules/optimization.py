"""Optimization of the current link: an optimizer and a learning-rate schedule for each link."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.rules import check_state, keep_state
from cola_lightning.chain.schedule import LRSchedule, RunLength, lr_factor, warmup_length
from cola_lightning.errors import UserError
from cola_lightning.lora.inject import lies_in
from cola_lightning.lora.layer import LoRALayer, lora_layers
from cola_lightning.modules.run import Run

log = logging.getLogger(__name__)

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]


class LinkLR(LRScheduler):
    """The learning rates of a link: those that its optimizer was made with, times a factor of the step.

    A parameter group that is added later, as BaseFinetuning does, retains the rate that it is given.

    Args:
        optimizer: of the link.
        factor: of the link's k-th step.
        last_epoch: the step before the first, as in torch.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], last_epoch: int = -1) -> None:
        self.factor = factor
        super().__init__(optimizer, last_epoch)

    @override
    def get_lr(self) -> list[float | Tensor]:
        factor = self.factor(self.last_epoch)
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        return [rate * factor for rate in self.base_lrs] + [group["lr"] for group in added]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "factor"}


@dataclass
class LinkOptimization:
    """Makes an optimizer and a learning-rate schedule for each link.

    Raises:
        UserError: for invalid values.

    Attributes:
        make_optimizer: makes an optimizer from parameters, or from parameter groups.
        modules_to_save_lr: the initial learning rate of fully trained modules; None: the links'.
        lr_schedule: see :class:`~cola_lightning.modules.COLAModule`, as for the next two.
        warmup_steps: a number of steps, or a share below 1.
        schedule_scope: ``link`` or ``run``.
        knot_warmup_steps: of a schedule over the run: a number of steps, or a share of the link below 1.
        kept_optimizer_state: the share of an optimizer's state that a knot retains.
        run: the state of the run.
    """

    make_optimizer: OptimizerCallable
    modules_to_save_lr: float | None
    lr_schedule: LRSchedule
    warmup_steps: float
    schedule_scope: Literal["link", "run"]
    knot_warmup_steps: float
    kept_optimizer_state: float
    run: Run
    _optimizer: Optimizer | None = None
    _scheduler: LinkLR | None = None
    _first_step: int | None = None  # at which the schedule's first value was computed
    _horizon: tuple[float, float] | None = None
    _groups: Sequence[dict[str, Any]] = ()  # hyperparameters, as requested

    def __post_init__(self) -> None:
        if self.modules_to_save_lr is not None and not 0 <= self.modules_to_save_lr < math.inf:
            raise UserError(f"model.modules_to_save_lr: expected a number of at least 0, received {self.modules_to_save_lr}")
        if self.lr_schedule not in (names := get_args(LRSchedule)):
            raise UserError(f"model.lr_schedule: expected {', '.join(names)}, received {self.lr_schedule}")
        for name, steps in (("warmup_steps", self.warmup_steps), ("knot_warmup_steps", self.knot_warmup_steps)):
            if not 0 <= steps < math.inf:
                raise UserError(f"model.{name}: expected a number of steps, or a share below 1, received {steps}")
        if self.knot_warmup_steps and self.schedule_scope == "link":
            raise UserError(
                "model.knot_warmup_steps: expected 0 with model.schedule_scope link, where model.warmup_steps is each link's, "
                f"received {self.knot_warmup_steps}"
            )
        if not 0 <= self.kept_optimizer_state <= 1:
            raise UserError(f"model.kept_optimizer_state: expected a share from 0 to 1, received {self.kept_optimizer_state}")
        self.warmup_steps, self.knot_warmup_steps = float(self.warmup_steps), float(self.knot_warmup_steps)
        self.kept_optimizer_state = float(self.kept_optimizer_state)

    def __getstate__(self) -> dict[str, Any]:
        """All but the optimizer and its learning-rate schedule, which belong to a fit."""
        return vars(self) | {"_optimizer": None, "_scheduler": None}

    def configure(
        self, trained: Sequence[tuple[str, nn.Parameter]], modules_to_save: Sequence[str], step: int
    ) -> OptimizerLRScheduler:
        """A new optimizer and learning-rate schedule.

        Args:
            trained: the parameters, with their names in the module.
            modules_to_save: names of the fully trained modules.
            step: step of the run at which the schedule continues.

        Raises:
            UserError: for values that the optimizer does not accept, or that are incompatible with it.
        """
        groups = self._parameter_groups(trained, modules_to_save)
        try:
            optimizer = self.make_optimizer(groups)
        except (TypeError, ValueError) as error:  # an optimizer's own message for an invalid value
            raise UserError(f"model.optimizer: expected values that it takes, received: {error}") from error
        for group in optimizer.param_groups:  # a schedule modifies a tensor rate in place: the next link's, too
            group["lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        self._groups = [_without_parameters(group) for group in optimizer.param_groups]
        self._optimizer, self._scheduler = optimizer, self._make_scheduler(optimizer, step)
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def _parameter_groups(self, trained: Sequence[tuple[str, nn.Parameter]], modules_to_save: Sequence[str]) -> list[Any]:
        """The trained parameters: in one group, or in two if fully trained modules have their own learning rate."""
        if self.modules_to_save_lr is None:
            return [p for _, p in trained]
        is_saved = {name: lies_in(name, modules_to_save) for name, _ in trained}
        others, saved = ([p for name, p in trained if is_saved[name] is wanted] for wanted in (False, True))
        if not others or not saved:
            raise UserError("model.modules_to_save_lr: expected modules_to_save beside other trained parameters, received none")
        return [{"params": others}, {"params": saved, "lr": self.modules_to_save_lr}]

    def _make_scheduler(self, optimizer: Optimizer, step: int) -> LinkLR | None:
        """The learning-rate schedule from a step of the run on; None for an optimizer that sets its own rates."""
        if self.lr_schedule == "constant" and any(group["lr"] is None for group in optimizer.param_groups):
            return None
        for group in optimizer.param_groups:
            rate = group["lr"]
            group["initial_lr"] = rate.clone() if isinstance(rate, Tensor) else rate
        self._first_step = self._horizon = None
        done = max(0, step - self.run.link_start.global_step)  # by an earlier fit of the same Trainer
        return LinkLR(optimizer, self._lr_factor, last_epoch=done - 1)

    def _lr_factor(self, step: int) -> float:
        """The learning-rate factor at the link's k-th step. It determines its horizon when that is first needed.

        At step 0 of a run the data is not set up yet, and reading its length from Lightning there would make a resumed loader
        start over.
        """
        is_run, start = self.schedule_scope == "run", self.run.link_start
        if self._horizon is None and self.run.length is not None:
            self._horizon = self._horizon_in(self.run.length)
        if (horizon := self._horizon) is None and self._first_step in (None, step):
            self._first_step = step  # before training: the first value, or one that a resume replaces
            return 0.0 if self.warmup_steps else 1.0
        if horizon is None and (length := self.run.known_length()) is not None:
            horizon = self._horizon_in(length)
        end, rise = (math.inf, 0) if horizon is None else horizon  # in a loop without a Trainer there is none
        value = lr_factor(self.lr_schedule, start.global_step + step if is_run else step, end, self.warmup_steps)
        return value * step / rise if step < rise else value

    def _horizon_in(self, length: RunLength) -> tuple[float, float]:
        """The end of the schedule, and the steps of the warm-up after a knot; the run's first link has the run's warm-up."""
        start = self.run.link_start
        link_steps = self.run.schedule.link_steps(start, length)
        rise = warmup_length(self.knot_warmup_steps, link_steps) if start.global_step else 0
        return length.end_step if self.schedule_scope == "run" else link_steps, rise

    @property
    def _share_of_length(self) -> str | None:
        """What the schedule computes from a length, in words; None for a constant rate with a warm-up in steps."""
        if self.lr_schedule != "constant":
            return self.lr_schedule
        return f"a warm-up of {self.warmup_steps:g} of it" if 0 < self.warmup_steps < 1 else None

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Refuses a link that is shorter than its warm-up; the last one may be.

        Args:
            lengths: optimizer steps of the remaining links of a fit, the current one first.
        """
        warmup = self.warmup_steps if self.schedule_scope == "link" else 0
        if (shortest := min(lengths[:-1], default=math.inf)) < warmup:
            raise UserError(
                f"model.warmup_steps: expected at most {shortest}, the steps of the shortest link, received {warmup:g}"
            )
        if (shortest := min(lengths[1:-1], default=math.inf)) < self.knot_warmup_steps:
            raise UserError(
                f"model.knot_warmup_steps: expected at most {shortest}, the steps of the shortest link after a knot, "
                f"received {self.knot_warmup_steps:g}"
            )

    def check_without_horizon(self, run: RunLength) -> None:
        """Refuses a learning-rate schedule that needs a length that is not known beforehand: a link's, or the run's.

        Args:
            run: length of the fit, if it has an end; the lengths of its links are decided during training.
        """
        if self._scheduler is None:  # an overridden configure_optimizers may have none
            return
        is_known = self.schedule_scope == "run" and run.end_step < math.inf
        if not is_known and (received := self._share_of_length) is not None:
            raise UserError(
                "model.lr_schedule: expected constant, or model.schedule_scope run with max_epochs or max_steps, where a link's"
                " length is not known beforehand (chain.patience, an overridden should_tie, endless data), received "
                f"{received}"
            )
        if 0 < self.knot_warmup_steps < 1:
            raise UserError(
                "model.knot_warmup_steps: expected a number of steps where a link's length is not known beforehand, received "
                f"{self.knot_warmup_steps:g} of it"
            )

    def keep_state(self, before: Sequence[Optimizer], now: Sequence[Optimizer], adapted: AdaptedModel) -> None:
        """Copies optimizer state to a new link's optimizers: the retained share of the factors', all of other parameters'."""
        if self.kept_optimizer_state:
            for old, new in zip(before, now, strict=True):
                keep_state(old, new, self.kept_optimizer_state, _used_entries(adapted))

    def check_state(self, optimizers: Sequence[Optimizer], adapted: AdaptedModel) -> None:
        """Refuses optimizers of whose state a knot cannot retain the requested share, after their first step."""
        for optimizer in optimizers:
            check_state(optimizer, self.kept_optimizer_state, _factors(adapted.layers))

    def resume(self, trainer: Trainer) -> None:
        """Applies the present hyperparameters to a resumed link's optimizer, where they differ from the checkpoint's.

        Its state does not change. With the same hyperparameters, and as many remaining steps, nothing changes. Optimizers of a
        subclass' ``configure_optimizers`` are not modified.
        """
        scheduler, schedulers = self._scheduler, [config.scheduler for config in trainer.lr_scheduler_configs]
        if trainer.optimizers != [self._optimizer] or schedulers != ([scheduler] if scheduler else []):
            return
        groups = zip(trainer.optimizers[0].param_groups, self._groups, strict=False)  # a callback may have added others
        for k, (group, wanted) in enumerate(groups):
            before = group | {"lr": group.get("initial_lr", group["lr"])}
            if changed := {name: value for name, value in wanted.items() if not _is_same(before.get(name), value)}:
                changes = ", ".join(f"{name} {before.get(name)} -> {value}" for name, value in changed.items())
                log.info("model.optimizer: from here on %s", changes)
            if scheduler is None:
                group |= wanted
                continue
            rate = wanted["lr"]
            group |= wanted | {"initial_lr": rate, "lr": rate * self._lr_factor(scheduler.last_epoch)}
            scheduler.base_lrs[k] = rate


def _used_entries(adapted: AdaptedModel) -> dict[int, tuple[slice, ...]]:
    """By the id of each factor: the entries that the last finished link and the current one share, up to their rank."""
    entries: dict[int, tuple[slice, ...]] = {}
    for layer in adapted.layers.values():
        used = slice(min([layer.rank, *(link.rank for link in adapted.chain.links[-1:])]))
        entries |= {id(layer.lora_A): (used,), id(layer.lora_B): (slice(None), used)}
    return entries


def _factors(layers: Mapping[str, LoRALayer]) -> set[int]:
    return {id(factor) for layer in layers.values() for factor in (layer.lora_A, layer.lora_B)}


def check_new_optimizers(before: Sequence[Optimizer], now: Sequence[Optimizer]) -> None:
    """Refuses an overridden ``configure_optimizers`` that returns an optimizer again: a link begins with a new one.

    LightningCLI's ``--optimizer`` overrides it so.
    """
    if any(new is old for new in now for old in before):
        raise UserError(
            "configure_optimizers: expected a new optimizer from each call, one for each link, received the same twice (of "
            "LightningCLI's --optimizer there is one: --model.optimizer makes as many as there are links)"
        )


def warn_of_half_precision(model: nn.Module) -> None:
    """Warns of fully trained parameters in half precision."""
    factors = _factors(lora_layers(model))
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad and id(p) not in factors}
    if half := sorted(str(dtype).removeprefix("torch.") for dtype in dtypes & {torch.bfloat16, torch.float16}):
        log.warning(
            "fully trained parameters are in %s, which rounds small steps away: model.dtype float32 with trainer.precision "
            "bf16-mixed keeps them in float32",
            half[0],
        )


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's hyperparameters, with tensors cloned: a tensor rate is modified in place later."""
    copies = ((name, value.clone() if isinstance(value, Tensor) else value) for name, value in group.items())
    return {name: value for name, value in copies if name != "params"}


def _is_same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(mine, theirs)
    return bool(mine == theirs)
