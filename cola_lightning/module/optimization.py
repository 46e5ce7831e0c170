"""Optimization of the current link: an optimizer and a learning-rate schedule for each link."""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.current import CurrentLink
from cola_lightning.chain.schedule import START, ChainSchedule, FitPosition, RunLength
from cola_lightning.errors import UserError
from cola_lightning.lora.config import LoRAConfig
from cola_lightning.lora.inject import is_in_matching_modules
from cola_lightning.module.progress import FitProgress, trainer_of

log = logging.getLogger(__name__)

OF_SCHEDULES = ("lr_schedule", "warmup_steps", "decay_steps", "schedule_scope", "knot_warmup_steps")  # options of LinkConfig
DECAY_STEPS = 0.4  # of a stable schedule: the share of its steps

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedule = Literal["constant", "linear", "cosine", "stable"]

# From the share of the decay to the factor on the learning rate.
DECAY: dict[LRSchedule, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: max(0.0, 1.0 - progress),
    "cosine": lambda progress: max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
    "stable": lambda progress: max(0.0, min(1.0, 1.0 - progress)),
}


def lr_factor(schedule: LRSchedule, step: int, horizon: float, warmup_steps: float, decay_steps: float = DECAY_STEPS) -> float:
    """The factor on the learning rate at a step of a schedule of ``horizon`` steps.

    ``warmup_steps`` and ``decay_steps`` below 1 are shares of the horizon. The rate rises from 0 over the warm-up, then stays
    (``constant``), or decays to 0 linearly (``linear``) or along half a cosine (``cosine``); or it stays until the last
    ``decay_steps``, in which it decays to 0 linearly (``stable``).

    Example:
        >>> [lr_factor("linear", step, horizon=4, warmup_steps=0) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
        >>> [lr_factor("stable", step, horizon=4, warmup_steps=0, decay_steps=2) for step in range(5)]
        [1.0, 1.0, 1.0, 0.5, 0.0]

    Source: the formulas of ``transformers.get_{constant,linear,cosine,wsd}_schedule`` (``wsd`` with a linear decay).
    """
    warmup = phase_length(warmup_steps, horizon)
    if step < warmup:
        return step / max(1, warmup)
    start = max(warmup, horizon - phase_length(decay_steps, horizon)) if schedule == "stable" else warmup
    return DECAY[schedule]((step - start) / max(1, horizon - start))


def phase_length(steps: float, horizon: float) -> int:
    """A phase of a schedule in steps: as given, or rounded up from a share of the horizon; never longer than the horizon.

    A share of an unknown horizon, which is infinite, has not begun: it is 0.
    """
    if horizon == math.inf and steps < 1:
        return 0
    whole = steps if steps >= 1 or steps == 0 else math.ceil(steps * horizon)
    return int(min(whole, horizon))


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


@dataclass(frozen=True)
class LinkConfig(LoRAConfig):
    """Which layers get links, what the links are like, and how they are optimized.

    Args:
        modules_to_save_lr: Initial learning rate of ``modules_to_save``. ``null`` uses the optimizer's, as for the links.
        lr_ratio_B: B learns this many times as fast as everything else (LoRA+ uses 2 to 16).
        lr_schedule: ``constant``, ``linear`` or ``cosine`` decay to 0, or ``stable``, which is constant and then decays
            linearly to 0 over the last ``decay_steps``. The formulas are transformers'.
        warmup_steps: The rate rises from 0 over this many optimizer steps. A number below 1 is a share of the schedule's
            length.
        decay_steps: Length of the decay of a ``stable`` schedule, in optimizer steps. A number below 1 is a share of the
            schedule's length.
        schedule_scope: ``link`` restarts the schedule with each link. ``run`` uses one schedule over the whole run.
        knot_warmup_steps: With a schedule over the ``run``, the rate rises from 0 again over this many optimizer steps after
            each knot (ReLoRA's jagged rate). A number below 1 is a share of the link's length.
        kept_optimizer_state: Share of the optimizer state of A and B that a knot of ``cola`` keeps, as in ReLoRA (0.001 to
            0.1): the entries with the largest first moments. 0 starts a new optimizer, and 1 keeps everything. A state that is
            8-bit or factored (AdamW8bit, Adafactor) is kept completely with any share above 0.
        **lora: the arguments of :class:`~cola_lightning.LoRAConfig`.

    Raises:
        UserError: for invalid values.

    Source: ``lr_ratio_B``: Hayou et al., "LoRA+" (arXiv 2402.12354).
    """

    modules_to_save_lr: float | None = None
    lr_ratio_B: float = 1
    lr_schedule: LRSchedule = "linear"
    warmup_steps: float = 0
    decay_steps: float = DECAY_STEPS
    schedule_scope: Literal["link", "run"] = "link"
    knot_warmup_steps: float = 0
    kept_optimizer_state: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, is_valid, valid in (
            ("kept_optimizer_state", 0 <= self.kept_optimizer_state <= 1, "between 0 and 1"),
            ("lr_ratio_B", 0 < self.lr_ratio_B < math.inf, "a number above 0"),
            ("decay_steps", 0 < self.decay_steps < math.inf, "a number above 0"),
        ):
            if not is_valid:
                raise UserError(f"model.{name}: must be {valid}, got {getattr(self, name)}")


@dataclass
class LinkOptimization:
    """Makes an optimizer and a learning-rate schedule for each link.

    Attributes:
        make_optimizer: makes an optimizer from parameters, or from parameter groups.
        config: how links are optimized.
        progress: where the fit stands, with its schedule of knots and its length.
        current: the current link, which knows where it began.
    """

    make_optimizer: OptimizerCallable
    config: LinkConfig
    progress: FitProgress
    current: CurrentLink
    _optimizer: Optimizer | None = None
    _scheduler: LinkLR | None = None
    _horizon: tuple[float, float] | None = None
    _groups: Sequence[dict[str, Any]] = ()  # hyperparameters, as requested

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
            UserError: for a learning rate of fully trained modules where there are none.
        """
        parameters = self._parameter_groups(trained, modules_to_save)
        try:
            optimizer = self.make_optimizer(parameters)
        except ValueError as error:  # an optimizer's own message for a mistyped value
            raise UserError(f"model.optimizer: {error}") from error
        # Torch's GradScaler has a fused optimizer unscale the gradients in its step, and Lightning then refuses to clip them
        # (16-mixed). Without this mark they are unscaled before, as for any other optimizer.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        self._optimizer, self._scheduler, self._horizon = optimizer, None, None
        for group in optimizer.param_groups:
            # numpy's numbers, of np.logspace for example, would make a checkpoint unreadable for torch.load(weights_only=True)
            group |= {name: value.item() for name, value in group.items() if isinstance(value, np.generic)}
            group["lr"] = copy.deepcopy(group["lr"])  # a copy: a schedule modifies a rate that is a tensor in place
        if self.config.lr_ratio_B != 1:
            if optimizer.param_groups[1]["lr"] is None:
                raise UserError(
                    f"model.lr_ratio_B: needs an optimizer with a learning rate, and {type(optimizer).__name__} has none"
                )
            optimizer.param_groups[1]["lr"] *= self.config.lr_ratio_B
        groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        self._groups = copy.deepcopy(groups)
        if self.config.lr_schedule == "constant" and any(group["lr"] is None for group in groups):  # it sets its own rates
            return optimizer
        for group in optimizer.param_groups:
            group["initial_lr"] = copy.deepcopy(group["lr"])
        done = max(0, step - self._links()[1].global_step)  # by an earlier fit of the same Trainer
        self._scheduler = LinkLR(optimizer, self._lr_factor, last_epoch=done - 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def _parameter_groups(self, trained: Sequence[tuple[str, nn.Parameter]], modules_to_save: Sequence[str]) -> list[Any]:
        """The trained parameters: in one group, or in more if B or fully trained modules have their own learning rates."""
        if self.config.modules_to_save_lr is None and self.config.lr_ratio_B == 1:
            return [p for _, p in trained]
        others, factors_B, saved = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
        for name, p in trained:
            if self.config.modules_to_save_lr is not None and is_in_matching_modules(name, modules_to_save):
                saved.append(p)
            else:
                (factors_B if self.config.lr_ratio_B != 1 and name.endswith(".lora_B") else others).append(p)
        groups = [{"params": others}, *([{"params": factors_B}] if self.config.lr_ratio_B != 1 else [])]
        if self.config.modules_to_save_lr is None:
            return groups
        if not saved:
            raise UserError("model.modules_to_save_lr: needs model.modules_to_save")
        return [*groups, {"params": saved, "lr": self.config.modules_to_save_lr}]

    def _links(self) -> tuple[ChainSchedule, FitPosition]:
        """The links that have an optimizer each, and where the present one begins: one link, if it goes on over knots."""
        progress = self.progress
        return (ChainSchedule(), START) if progress.schedule.goes_on else (progress.schedule, self.current.start)

    @property
    def _is_over_run(self) -> bool:
        """Whether one schedule of the learning rate lasts over the run."""
        return self.config.schedule_scope == "run" or self.progress.schedule.goes_on

    def link_steps(self, run: RunLength) -> float:
        """Optimizer steps of the present optimizer: those of the link or, if it goes on over knots, of the run.

        Args:
            run: length of the fit.
        """
        schedule, start = self._links()
        return schedule.in_run(run, self.stable_share(run)).link_steps(start, run)

    def _lr_factor(self, step: int) -> float:
        """The learning-rate factor at the optimizer's k-th step.

        The horizon is determined when it is first needed: before a fit the length of its data is not known, and in a loop
        without a Trainer never.
        """
        horizon, length = self._horizon, self.progress.known_length()
        if horizon is None and length is not None:
            horizon = self._horizon_in(length)
            self._horizon = horizon if length is self.progress.length else None
        if horizon is None and step == 0:  # whatever the length is
            return 0.0 if self.config.warmup_steps else 1.0
        if horizon is None and 0 < self.config.warmup_steps < 1:
            raise UserError(
                f"model.warmup_steps: must be a number of steps, because a loop without a Trainer has no known length, got the "
                f"share {self.config.warmup_steps:g}"
            )
        end, rise = horizon or (math.inf, 0)
        place = self._links()[1].global_step + step if self._is_over_run else step
        value = lr_factor(self.config.lr_schedule, place, end, self.config.warmup_steps, self.config.decay_steps)
        return value * step / rise if step < rise else value

    def _horizon_in(self, length: RunLength) -> tuple[float, float]:
        """The end of the schedule, and the steps of the warm-up after a knot; the run's first link has the run's warm-up."""
        link_steps, (_, start) = self.link_steps(length), self._links()
        rise = phase_length(self.config.knot_warmup_steps, link_steps) if start.global_step else 0
        return length.end_step if self._is_over_run else link_steps, rise

    def stable_share(self, run: RunLength) -> float | None:
        """The share of a run before its rate decays, if the schedule is a stable one over a run of known length; else None."""
        if self.config.lr_schedule != "stable" or not self._is_over_run or run.end_step == math.inf:
            return None
        return 1 - phase_length(self.config.decay_steps, run.end_step) / run.end_step

    def check_lengths(self, run: RunLength) -> None:
        """Refuses a link that is shorter than its warm-up; the last one may be.

        Args:
            run: length of the fit, of whose links the lengths are known.
        """
        schedule, start = self._links()
        lengths = schedule.link_lengths(start, run)
        link_warmup = 0 if self._is_over_run else self.config.warmup_steps
        checks = (
            ("warmup_steps", link_warmup, lengths[:-1]),
            ("knot_warmup_steps", self.config.knot_warmup_steps, lengths[1:-1]),
        )
        for name, steps, links in checks:
            shortest = min(links, default=math.inf)
            if shortest < steps:
                raise UserError(f"model.{name}: must be at most {shortest}, the steps of the shortest link, got {steps:g}")

    def check_used(self, trainer: Trainer) -> None:
        """Refuses options without an effect, because a ``configure_optimizers`` makes an optimizer or a schedule of its own.

        Raises:
            UserError: which names them.
        """
        schedulers, unused = [config.scheduler for config in trainer.lr_scheduler_configs], list[str]()
        if self._optimizer not in trainer.optimizers:
            unused = ["lr_ratio_B", "modules_to_save_lr", *OF_SCHEDULES]
        elif self._scheduler is not None and self._scheduler not in schedulers:
            unused = list(OF_SCHEDULES)
        defaults = {field.name: field.default for field in fields(LinkConfig)}
        given = [f"model.{name}" for name in unused if getattr(self.config, name) != defaults[name]]
        if self._optimizer not in trainer.optimizers and not is_default_optimizer(self.make_optimizer):
            given.insert(0, "model.optimizer")
        if given:
            name = type(trainer.lightning_module).__name__
            raise UserError(
                f"{', '.join(given)}: no effect, because configure_optimizers of {name} sets this itself. Set it there"
            )

    def check_without_horizon(self, run: RunLength) -> None:
        """Refuses a learning-rate schedule that needs a length that is not known beforehand: a link's, or the run's.

        Args:
            run: length of the fit, if it has an end; the lengths of its links are decided during training.
        """
        if self._scheduler is None:
            return
        missing = ["trainer.max_steps"] if run.end_step == math.inf else []
        schedule, _ = self._links()
        if not self._is_over_run and schedule.has_unknown_lengths(run):
            missing.append("model.schedule_scope run")
        lr_schedule, warmup_steps = self.config.lr_schedule, self.config.warmup_steps
        needs_length = lr_schedule != "constant" or 0 < warmup_steps < 1
        if needs_length and (missing or not self._is_over_run):
            raise UserError(
                f"model.lr_schedule: {lr_schedule} with warmup_steps {warmup_steps:g} needs {' and '.join(missing)}, "
                "because the length of the run or of its links is unknown. Or use constant, with model.warmup_steps in steps"
            )
        if 0 < self.config.knot_warmup_steps < 1 and schedule.has_knots:
            raise UserError(
                "model.knot_warmup_steps: must be a number of steps, because the length of a link is unknown, got the share "
                f"{self.config.knot_warmup_steps:g}"
            )

    def renew(self, module: LightningModule, adapted: AdaptedModel) -> None:
        """Makes new optimizers and learning-rate schedules for a link that begins, in a fit or after it.

        In a fit they get the retained share of the factors' state, and all of the other parameters' state. After a fit they are
        those of the checkpoint that its Trainer may write, without state, as in a next fit. None is made for an optimizer that
        goes on over knots.

        Args:
            module: the module of the run.
            adapted: its adapted model.

        Raises:
            UserError: if a subclass' ``configure_optimizers`` returns the same optimizer again.
        """
        if self.progress.schedule.goes_on:
            return
        trainer = trainer_of(module)
        is_fitting = trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"
        trainer = trainer if is_fitting else self.progress.trainer  # also in a validation of the fit
        if trainer is None or trainer.lightning_module is not module or not (is_fitting or trainer.optimizers):
            return
        before = trainer.optimizers
        trainer.strategy.setup_optimizers(trainer)
        if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            for old, new in zip(before, trainer.optimizers, strict=True):
                add_groups_of(old, new)
        if is_fitting and any(new is old for new in trainer.optimizers for old in before):  # its moments would outlive the link
            raise UserError(
                "configure_optimizers: must return a new optimizer for each link, but returned the same one twice. On the "
                "command line, use model.optimizer and not LightningCLI's optimizer"
            )
        if is_fitting and self.config.kept_optimizer_state:
            for old, new in zip(before, trainer.optimizers, strict=True):
                copy_state(old, new, self.config.kept_optimizer_state, _used_entries(adapted))

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
            if changed := {name: value for name, value in wanted.items() if before.get(name) != value}:
                changes = ", ".join(f"{name} {before.get(name)} -> {value}" for name, value in changed.items())
                log.info("model.optimizer: continuing with %s", changes)
            group |= wanted
            if scheduler is not None:
                rate = scheduler.base_lrs[k] = group["initial_lr"] = wanted["lr"]
                group["lr"] = rate * self._lr_factor(scheduler.last_epoch)


def is_default_optimizer(make_optimizer: OptimizerCallable) -> bool:
    """Whether a function makes the optimizer that a module has by default; the command line always passes one."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    default = AdamW([parameter], lr=1e-3, fused=True)
    with suppress(Exception):  # of a user's function, which may need other parameters
        made = make_optimizer([parameter])
        return type(made) is AdamW and made.defaults == default.defaults
    return False


def check_no_averaging(trainer: Trainer | None) -> None:
    """Refuses a knot in a fit that averages weights: those before a merge and after it.

    Raises:
        UserError: which names the callback.
    """
    is_fitting = trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"
    for callback in trainer.callbacks if is_fitting else ():  # type: ignore[union-attr]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} cannot be combined with knots. (You can average merged models "
                "of several runs.)"
            )


def add_groups_of(old: Optimizer, new: Optimizer) -> None:
    """Adds to a link's new optimizer the parameter groups that BaseFinetuning has added to the old one.

    They keep their hyperparameters. A checkpoint is resumed with as many groups as the callback remembers.
    """
    added = old.param_groups[len(new.param_groups) :]
    moved = {id(parameter) for group in added for parameter in group["params"]}
    for group in new.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    for group in added:
        new.add_param_group({**group})


def _used_entries(adapted: AdaptedModel) -> dict[int, tuple[Any, ...]]:
    """By the id of each factor: the entries that the last finished link and the current one share, up to their rank."""
    entries: dict[int, tuple[Any, ...]] = {}
    for name, layer in adapted.layers.items():
        used = slice(min([layer.rank, *(link.factors[name][0].shape[-2] for link in adapted.chain.links[-1:])]))
        entries |= {id(layer.lora_A): (..., used, slice(None)), id(layer.lora_B): (..., used)}
    return entries


@torch.no_grad()
def copy_state(old: Optimizer, new: Optimizer, share: float, factors: Mapping[int, tuple[Any, ...]]) -> None:
    """Copies optimizer state over a knot: some entries of the factors' moments, and the whole state of other parameters.

    Those are the entries with the largest first moments, and each moment retains the same: a first moment without its second
    would be divided by zero, as A's gradient is 0 while the new B is. Step counts are copied too, and all of a state
    that has no number for each entry: of 8-bit codes, or of sums over rows.

    Args:
        old: the previous link's optimizer.
        new: the next link's optimizer, on the same parameters.
        share: the share of entries that the factors' moments retain, above 0.
        factors: by the id of each factor, the entries that both links use: a factor has those of the largest rank.

    Source: Lialin et al., "ReLoRA" (arXiv 2307.05695), section 3: a partial reset of the optimizer by magnitude.
    """
    for group in new.param_groups:
        for parameter in group["params"]:
            state = old.state.get(parameter)
            if state:
                used = factors.get(id(parameter))
                new.state[parameter] = {**state} if used is None else _share_of_state(state, parameter, share, used)


def _share_of_state(state: dict[str, Any], parameter: Tensor, share: float, used: tuple[Any, ...]) -> dict[str, Any]:
    """A state whose moments are 0 except for the used entries with the largest first moments; all else is unchanged."""
    is_used = torch.zeros_like(parameter, dtype=torch.bool)
    is_used[used] = True
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
    moments = [name for name, value in tensors.items() if value.shape == parameter.shape]
    if not moments or (share == 1 and is_used.all()):
        return {**state}
    sizes = state[moments[0]].abs()  # the first moment, in torch's optimizers
    n_kept = max(1, round(share * int(is_used.sum())))
    is_kept = is_used & (sizes >= sizes[is_used].topk(n_kept).values[-1])
    return {name: torch.where(is_kept, value, 0) if name in moments else value for name, value in state.items()}
