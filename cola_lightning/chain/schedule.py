"""When knots are tied, and each link's rank, alpha and length.

Everything here is a pure function, of counters (an epoch and a global step: optimizer steps since the start of the run, as
Lightning counts them) or of a metric's values. There is no state between calls, so a resumed run makes the same
decisions.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from cola_lightning.chain.chain import as_number
from cola_lightning.errors import UserError, check_name
from cola_lightning.lora.config import LoRAConfig, is_rank

Mode = Literal["min", "max"]
Knot = Literal["cola", "half", "record"]

KNOT_OPTIONS = ("every_n_epochs", "every_n_train_steps", "at_epochs", "at_steps", "knots", "patience")
SIZES = ("ranks", "alphas")
RESERVED = ("all", "start", "link")  # words for links, which no stage has as its name
UNTIL = 0.75  # of a run: the share over which ``knots`` are spread, if none is given


class FitPosition(NamedTuple):
    """A moment of a run: epochs finished and optimizer steps taken."""

    epoch: int
    global_step: int


START = FitPosition(0, 0)


@dataclass(frozen=True)
class RunLength:
    """The length of a run; ``math.inf`` for no limit.

    Attributes:
        steps_in_epoch: optimizer steps in the given epoch, including a shorter last accumulation window.
        max_epochs: the run ends before this epoch.
        max_steps: the run ends before this global step.
        epoch_start: the beginning of an epoch, from which steps and epochs are counted.

    Example:
        >>> run = RunLength(lambda epoch: 10, max_epochs=5, max_steps=math.inf)
        >>> run.step_at(2), run.end_step
        (20, 50)
    """

    steps_in_epoch: Callable[[int], float]
    max_epochs: float
    max_steps: float
    epoch_start: FitPosition = START

    def step_at(self, epoch: float) -> float:
        """The global step at which an epoch begins; for one beyond the run, the step at which that ends, or later."""
        if epoch == math.inf:
            return math.inf
        step: float = self.epoch_start.global_step
        e = self.epoch_start.epoch
        while e < min(epoch, self.max_epochs) and step < self.max_steps:
            step, e = step + self.steps_in_epoch(e), e + 1
        return step

    @property
    def end_step(self) -> float:
        """The global step at which the run ends."""
        return min(self.step_at(self.max_epochs), self.max_steps)


@dataclass(frozen=True)
class ChainSchedule:
    """When the knots of a chain are tied, and each link's rank and alpha: the options of :class:`~cola_lightning.ChainOfLoRA`.

    At most one of ``every_n_epochs``, ``every_n_train_steps``, ``at_epochs``, ``at_steps``, ``knots`` and ``patience`` may be
    given; with none of them the run is one link: plain LoRA. Steps are optimizer steps, counted over the whole run from 0.

    Args:
        every_n_epochs: Tie a knot after every N epochs.
        every_n_train_steps: Tie a knot after every N optimizer steps.
        at_epochs: Tie knots at the beginning of these epochs, an increasing list of numbers from 1.
        at_steps: Tie knots before these optimizer steps, an increasing list of numbers from 1.
        ranks: List of each link's rank, the first link's first, at most ``model.rank``. Later links use the last entry.
            ``null`` uses ``model.rank`` for all.
        alphas: List of each link's alpha. Later links use the last entry. ``null`` uses ``model.alpha`` for all.
        patience: Tie a knot after this many validations in a row without improvement of ``monitor``. Validations of one
            optimizer step count as one. The length of a link is then not known beforehand, so a learning rate that decays needs
            ``model.schedule_scope: run``.
        monitor: The metric that ``patience`` watches; validation must log it.
        min_delta: With ``patience``, a value is an improvement only if it is better than the link's best by more than this.
        mode: With ``patience``, ``min`` if a lower value of the metric is better, ``max`` if a higher one is.
        knots: Tie this many knots, evenly over the share ``until`` of the run. The run's length decides their steps.
        until: With ``knots``, the last of them is tied at the end of this share of the run. If it is left at 0.75 and
            ``model.lr_schedule`` is ``stable`` over the run, it is the share before the decay.
        name: Name of this stage, such as ``sft``. Its links get it, and ``--links``, ``init_links`` and ``--scale`` understand
            it. A link that an earlier run began keeps that run's name.
        knot: What a knot does. ``cola`` merges the link, draws a new A and starts a new optimizer, as in the paper. ``half``
            merges a share of the link; A, the rest of B, the optimizer and its learning-rate schedule go on. ``record`` changes
            nothing: it only records the link, so that ``--links`` can go back to it.
        share: The share of a link's B A that a knot of ``half`` merges. ``null`` is 0.5.

    Raises:
        UserError: for more than one rule for when knots are tied, and for invalid values.

    Example:
        >>> schedule = ChainSchedule(at_epochs=[3], ranks=[8, 2])
        >>> [schedule.is_due(START, FitPosition(epoch, 10 * epoch)) for epoch in range(5)]
        [False, False, False, True, True]
        >>> schedule.rank_and_alpha(1, LoRAConfig(rank=8, alpha=16))
        (2, 16.0)
    """

    every_n_epochs: int | None = None
    every_n_train_steps: int | None = None
    at_epochs: Sequence[int] | None = None
    at_steps: Sequence[int] | None = None
    ranks: Sequence[int] | None = None
    alphas: Sequence[float] | None = None
    patience: int | None = None
    monitor: str = "val_loss"
    min_delta: float = 0.0
    mode: Mode = "min"
    knots: int | None = None
    until: float = UNTIL
    name: str | None = None
    knot: Knot = "cola"
    share: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in KNOT_OPTIONS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"chain: {' and '.join(given)} cannot be combined. Use at most one of {', '.join(KNOT_OPTIONS)}")
        counts = ("every_n_epochs", "every_n_train_steps", "knots", "patience")
        for name, is_valid, valid in (
            *(
                (name, is_rank(1 if getattr(self, name) is None else getattr(self, name)), "a whole number from 1")
                for name in counts
            ),
            *((name, _increases(getattr(self, name) or ()), "whole, increasing from 1") for name in ("at_epochs", "at_steps")),
            ("until", 0 < self.until < 1, "between 0 and 1"),
            ("until", self.knots is not None or self.until == UNTIL, "left out without chain.knots"),
            ("name", self.name is None or is_stage_name(self.name), f"a text other than a number, {', '.join(RESERVED)}"),
            ("ranks", all(map(is_rank, self.ranks or ())), "whole numbers from 1"),
            ("alphas", all(0 < alpha < math.inf for alpha in self.alphas or ()), "positive"),
            *((name, not (self.continues_link and getattr(self, name)), f"null with chain.knot {self.knot}") for name in SIZES),
        ):
            if not is_valid:
                raise UserError(f"chain.{name}: must be {valid}, got {getattr(self, name)}")
        if self.patience is None and (self.monitor, self.min_delta, self.mode) != ("val_loss", 0.0, "min"):
            raise UserError("chain.monitor, chain.min_delta, chain.mode: need chain.patience")
        check_name("chain.mode", self.mode, get_args(Mode))
        merged_share(self.knot, self.share)

    @property
    def knots_unknown(self) -> bool:
        """Whether knots are decided while training, so that no link's length is known beforehand."""
        return self.patience is not None

    @property
    def continues_link(self) -> bool:
        """Whether A, the optimizer and its learning-rate schedule go on over the knots."""
        return self.knot != "cola"

    @property
    def merged_share(self) -> float:
        """The share of a link's B A that a knot merges."""
        return merged_share(self.knot, self.share)

    @property
    def has_knots(self) -> bool:
        """Whether a long enough run has more than one link."""
        return any(self._when) or self.knots is not None or self.knots_unknown

    @property
    def _when(self) -> tuple[int | None, Sequence[int]]:
        """The period of the knots, or the list of them, in epochs or steps, whichever the schedule counts."""
        return self.every_n_epochs or self.every_n_train_steps, self.at_epochs or self.at_steps or ()

    @property
    def _counts_epochs(self) -> bool:
        return bool(self.every_n_epochs or self.at_epochs)

    def has_unknown_lengths(self, run: RunLength) -> bool:
        """Whether the links' lengths are not known before the run: also of links of epochs, if an epoch's length is not."""
        return self.knots_unknown or (self._counts_epochs and run.steps_in_epoch(run.epoch_start.epoch) == math.inf)

    def is_due(self, start: FitPosition, now: FitPosition) -> bool:
        """Whether the link that began at ``start`` ends at ``now``."""
        return (now.epoch if self._counts_epochs else now.global_step) >= self.next_knot(start)

    def rank_and_alpha(self, link: int, config: LoRAConfig) -> tuple[int, float]:
        """The rank and alpha of a link; the last entry of ``ranks`` and ``alphas`` holds for all links after it.

        Args:
            link: the link's index.
            config: has the rank and alpha of a link for which the schedule has none.
        """
        rank = self.ranks[min(link, len(self.ranks) - 1)] if self.ranks else config.rank
        alpha = self.alphas[min(link, len(self.alphas) - 1)] if self.alphas else config.alpha
        return int(rank), float(alpha)

    def next_knot(self, start: FitPosition) -> float:
        """The epoch or global step (whichever the schedule counts) at which the link from ``start`` ends, if the run lasts."""
        now = start.epoch if self._counts_epochs else start.global_step
        every, knots = self._when
        if every:
            return (now // every + 1) * every
        return next((knot for knot in knots if knot > now), math.inf)

    def in_run(self, run: RunLength, stable_share: float | None = None) -> "ChainSchedule":
        """This schedule with the steps of its ``knots``, which the length of the run decides.

        Args:
            run: the length of the run.
            stable_share: the share of the run before the learning rate decays; None: it has no such phase.

        Raises:
            UserError: if the run has no known end.

        Example:
            >>> run = RunLength(lambda epoch: 10, max_epochs=5, max_steps=math.inf)
            >>> ChainSchedule(knots=3, until=0.6).in_run(run).at_steps
            [10, 20, 30]
        """
        if self.knots is None:
            return self
        if run.end_step == math.inf:
            raise UserError("chain.knots: needs to know how long the run is. Set trainer.max_steps or trainer.max_epochs")
        until = self.until if stable_share is None or self.until != UNTIL else stable_share
        knots = {round(until * run.end_step * k / self.knots) for k in range(1, self.knots + 1)}
        return replace(self, knots=None, until=UNTIL, at_steps=sorted(knots - {0}))  # fewer, in a short trial run

    def link_steps(self, start: FitPosition, run: RunLength) -> float:
        """Optimizer steps of the link that begins at ``start``; ``math.inf`` if nothing ends it, or its end is not known."""
        if self.has_unknown_lengths(run):
            return math.inf
        knot = self.next_knot(start)
        end = min(run.step_at(knot) if self._counts_epochs else knot, run.end_step)
        return max(0, end - start.global_step)

    def link_lengths(self, start: FitPosition, run: RunLength) -> list[int]:
        """Optimizer steps of each remaining link of a run from ``start``, in order; the run and its links have known lengths.

        Example:
            >>> run = RunLength(lambda epoch: 10, max_epochs=5, max_steps=math.inf)
            >>> ChainSchedule(every_n_epochs=2).link_lengths(FitPosition(0, 0), run)
            [20, 20, 10]
        """
        lengths, run = list[int](), replace(run, max_epochs=math.inf, max_steps=run.end_step)
        while start.global_step < run.max_steps:
            knot = self.next_knot(start)
            lengths.append(int(self.link_steps(start, run)))
            epoch = int(knot) if self._counts_epochs and knot < math.inf else start.epoch
            start = FitPosition(epoch, start.global_step + lengths[-1])
            if self._counts_epochs and epoch > run.epoch_start.epoch:  # each epoch is counted once: there may be many
                run = replace(run, epoch_start=start)
        return lengths


@dataclass(frozen=True)
class UserRule(ChainSchedule):
    """The schedule of a ChainOfLoRA whose ``should_tie`` is a user's own, which decides while training."""

    @property
    def knots_unknown(self) -> bool:  # noqa: D102
        return True


def merged_share(knot: Knot, share: float | None = None) -> float:
    """The share of a link's B A that a knot merges. The rest stays in B, where the next link begins with it.

    Args:
        knot: its kind, see :class:`ChainSchedule`.
        share: of ``half``; None: 0.5.

    Raises:
        UserError: for what no knot can do.

    Example:
        >>> merged_share("cola"), merged_share("half"), merged_share("half", 0.3), merged_share("record")
        (1.0, 0.5, 0.3, 0.0)
    """
    check_name("chain.knot", knot, get_args(Knot))
    if share is not None and (knot != "half" or not 0 < share <= 1):
        raise UserError(f"chain.share: must be above 0 and at most 1, with chain.knot half, got {share} with {knot}")
    if knot == "half":
        return 0.5 if share is None else share
    return 1.0 if knot == "cola" else 0.0


def is_stage_name(name: str) -> bool:
    """Whether a stage can have this name: ``links`` and ``reference`` would take some for something else."""
    return name.strip() not in ("", *RESERVED) and isinstance(as_number(name), str)


def _increases(knots: Sequence[int]) -> bool:
    return all(a < b and b % 1 == 0 for a, b in itertools.pairwise((0, *knots)))


def is_plateau(values: Iterable[float], patience: int, min_delta: float = 0.0, mode: Mode = "min") -> bool:
    """Whether a link's metric has not improved for ``patience`` validations in a row, as EarlyStopping ends a run.

    Args:
        values: the metric in the link's validations so far; the first one is an improvement if it is finite.
        patience: validations without improvement after which the link is finished.
        min_delta: a value is an improvement if it is better than the link's best by more than this.
        mode: whether a lower (``min``) or a higher (``max``) value is better.

    Example:
        >>> [is_plateau([1.0, 0.8, 0.75, 0.72][:n], patience=2, min_delta=0.1) for n in range(1, 5)]
        [False, False, False, True]
    """
    best, waited, sign = math.inf, 0, {"min": 1, "max": -1}[mode]
    for value in values:
        is_better = sign * value < best - min_delta  # NaN is no improvement
        best, waited = (sign * value, 0) if is_better else (best, waited + 1)
    return waited >= patience
