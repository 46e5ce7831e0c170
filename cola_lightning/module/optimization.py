"""Optimization of the current link: an optimizer and a learning-rate schedule for each link."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.errors import UserError, check_name
from cola_lightning.lora.config import LoRAConfig
from cola_lightning.lora.inject import is_in_matching_modules

log = logging.getLogger(__name__)

OF_SCHEDULES = ("lr_schedule", "warmup_steps", "decay_steps", "schedule_scope", "knot_warmup_steps")  # options of LinkConfig
DECAY_STEPS = 0.4  # of a stable schedule: the share of its steps

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedule = Literal["constant", "linear", "cosine", "stable"]
Scope = Literal["link", "run"]

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
    schedule_scope: Scope = "link"
    knot_warmup_steps: float = 0
    kept_optimizer_state: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, is_valid, valid in (
            ("kept_optimizer_state", 0 <= self.kept_optimizer_state <= 1, "between 0 and 1"),
            ("lr_ratio_B", 0 < self.lr_ratio_B < math.inf, "a number above 0"),
            ("decay_steps", 0 < self.decay_steps < math.inf, "a number above 0"),
            ("warmup_steps", 0 <= self.warmup_steps < math.inf, "0 or a number above it"),
            ("knot_warmup_steps", 0 <= self.knot_warmup_steps < math.inf, "0 or a number above it"),
            ("modules_to_save_lr", 0 <= (self.modules_to_save_lr or 0) < math.inf, "0 or a number above it"),
        ):
            if not is_valid:
                raise UserError(f"model.{name}: must be {valid}, got {getattr(self, name)}")
        check_name("model.lr_schedule", self.lr_schedule, DECAY)
        check_name("model.schedule_scope", self.schedule_scope, get_args(Scope))


def parameter_groups(trained: Sequence[tuple[str, nn.Parameter]], config: LinkConfig) -> list[Any]:
    """Parameters, which have their names: in one group, or in more if B or fully trained modules have their own rates.

    Raises:
        UserError: for a learning rate of fully trained modules where there are none.
    """
    if config.modules_to_save_lr is None and config.lr_ratio_B == 1:
        return [parameter for _, parameter in trained]
    others, factors_B, saved = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in trained:
        if config.modules_to_save_lr is not None and is_in_matching_modules(name, config.modules_to_save):
            saved.append(parameter)
        else:
            (factors_B if config.lr_ratio_B != 1 and name.endswith(".lora_B") else others).append(parameter)
    groups = [{"params": others}, *([{"params": factors_B}] if config.lr_ratio_B != 1 else [])]
    if config.modules_to_save_lr is None:
        return groups
    if not saved:
        raise UserError("model.modules_to_save_lr: needs model.modules_to_save")
    return [*groups, {"params": saved, "lr": config.modules_to_save_lr}]


def is_default_optimizer(make_optimizer: OptimizerCallable) -> bool:
    """Whether a function makes the optimizer that a module has by default; the command line always passes one."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    default = AdamW([parameter], lr=1e-3, fused=True)
    with suppress(Exception):  # of a user's function, which may need other parameters
        made = make_optimizer([parameter])
        return type(made) is AdamW and made.defaults == default.defaults
    return False


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


def used_entries(adapted: AdaptedModel) -> dict[int, tuple[Any, ...]]:
    """By the id of each factor: the entries that the last finished link and the current one share, up to their rank."""
    entries: dict[int, tuple[Any, ...]] = {}
    for name, layer in adapted.live_layers.items():
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
