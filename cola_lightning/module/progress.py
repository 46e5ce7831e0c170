"""Where a fit stands: its schedule of knots, its length, and where it ended."""

import math
import weakref
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from cola_lightning.chain.current import CurrentLink
from cola_lightning.chain.schedule import START, ChainSchedule, FitPosition, RunLength
from cola_lightning.errors import UserError


class FitProgress:
    """Where the present fit stands, or where the last one ended; a module has one, over all of its fits.

    Attributes:
        schedule: when knots fall, and each link's rank and alpha: that of the fit's ChainOfLoRA, else one link.
        end: the position at which the last fit ended, or at which the checkpoint was written that the module was loaded from; a
            next fit at the same position continues it. None before the first fit.
        first_link: index of the run's first link: how many links the model had when the run began.
        is_continued: whether the fit continues the Trainer's last one, so that it is no new run.
        n_earlier_fits: how many fits have trained the module before this one, which draws other numbers than they did.
        length: length of the present fit; None while it is not known.
        held_out: see :attr:`COLAModule.held_out`; the data module of a fit adds its own rows.
    """

    def __init__(self) -> None:
        self.schedule = ChainSchedule()
        self.end: FitPosition | None = None
        self.first_link = 0
        self.is_continued = False
        self.n_earlier_fits = 0
        self.length: RunLength | None = None
        self.held_out: list[dict[str, Any] | None] = []
        self._trainer: weakref.ref[Trainer] | None = None  # of the last fit; an evaluation by another may have followed

    def __getstate__(self) -> dict[str, Any]:
        """All but the length and the Trainer, which belong to a fit, and cannot be pickled."""
        return vars(self) | {"length": None, "_trainer": None}

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer of the last fit, if it still exists."""
        return None if self._trainer is None else self._trainer()

    def begin_fit(self, trainer: Trainer, schedule: ChainSchedule, current: CurrentLink) -> None:
        """Begins a fit, or continues the Trainer's last one.

        Args:
            trainer: the Trainer of the fit.
            schedule: the schedule of its knots.
            current: the current link, which a new fit begins.
        """
        self.schedule, self.length = schedule, None  # which is set when training starts
        self._trainer = weakref.ref(trainer)
        now = FitPosition(trainer.current_epoch, trainer.global_step)
        self.is_continued = now.global_step > 0 and now == self.end
        if not self.is_continued:
            current.start = now
            self.n_earlier_fits += self.end is not None and self.end.global_step > 0
        if not hasattr(getattr(trainer, "datamodule", None), "held_out") and None not in self.held_out:
            self.held_out.append(None)

    def known_length(self) -> RunLength | None:
        """The length of the fit; None if there is none, or its data is not set up.

        Lightning's batch-size finder removes the callbacks, one of which sets the length.
        """
        trainer = self.trainer
        if self.length is not None or trainer is None or trainer.train_dataloader is None:
            return self.length
        return run_length(trainer, START)

    def to_store(self) -> dict[str, Any]:
        """What a checkpoint stores of it, for JSON."""
        return {
            "n_before": self.n_earlier_fits,
            "first_link": self.first_link,
            "has_knots": self.schedule.has_knots,
            "knot": [self.schedule.knot, self.schedule.merged_share],
            "held_out": self.held_out,
        }

    def restore(self, stored: Mapping[str, Any], *, is_resumed: bool) -> None:
        """Restores what :meth:`to_store` returned, except for the schedule, which is an option of each fit.

        Args:
            stored: what it returned.
            is_resumed: whether the fit that stored it goes on.

        Raises:
            UserError: if the fit that goes on has held out other rows than this one does.
        """
        self.n_earlier_fits, self.first_link = stored["n_before"], stored.get("first_link", 0)
        held_out, earlier = self.held_out, stored.get("held_out", [None])
        self.restore_held_out(earlier)
        if is_resumed and any(run not in self.held_out for run in held_out if run is not None):
            raise UserError(
                "data: the run that is resumed has held out other rows of data.source. Use its data.split_seed and sizes"
            )

    def restore_held_out(self, earlier: list[dict[str, Any] | None]) -> None:
        """Restores which rows were held out, also before the other values are due; those that the present fit added stay."""
        known = {name for run in earlier if run is not None for name in run["contents"]}
        self.held_out = [*earlier, *(own for own in self.held_out if own is None or known.isdisjoint(own["contents"]))]


def run_length(trainer: Trainer, epoch_start: FitPosition) -> RunLength:
    """The length of the trainer's fit; known once its data is set up.

    Args:
        trainer: the Trainer of the fit.
        epoch_start: the beginning of an epoch, from which the lengths of epochs are counted.
    """
    schedulers = accumulation_schedulers(trainer)

    def steps_in_epoch(epoch: int) -> float:
        window = schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else trainer.accumulate_grad_batches
        batches = trainer.num_training_batches
        return batches if batches == math.inf else math.ceil(batches / window)

    max_epochs, max_steps = trainer.max_epochs, trainer.max_steps
    return RunLength(
        steps_in_epoch,
        max_epochs=math.inf if max_epochs is None or max_epochs < 0 else max_epochs,
        max_steps=math.inf if max_steps < 0 else max_steps,
        epoch_start=epoch_start,
    )


def accumulation_schedulers(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    """The callbacks by which the number of accumulated batches depends on the epoch."""
    return [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]


def trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer that a module is attached to; None if there is none."""
    try:
        trainer = module.trainer
    except RuntimeError:  # Lightning's way to report none
        return None
    return trainer if isinstance(trainer, Trainer) else None  # Fabric's stand-in for one has no counters
