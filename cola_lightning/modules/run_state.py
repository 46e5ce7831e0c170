"""The state of a module's run."""

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from cola_lightning.chain.schedule import START, ChainSchedule, Counters, RunLength
from cola_lightning.errors import UserError
from cola_lightning.modules.rewind import Window


@dataclass
class RunState:
    """The state of a module's run; the module's callbacks and its parts share one.

    Attributes:
        schedule: when knots fall; one link until ChainOfLoRA gives its own.
        link_start: the counters at which the live link began.
        length: length of the fit; None while it is not known.
        left_at: the counters of the Trainer when the last fit ended, or the checkpoint was written from which the module is; a
            next fit with the same counters continues it.
        trainer: of the last fit; an evaluation by another Trainer may have followed.
        is_validating: whether a validation inside a fit has begun and not ended.
        window: the accumulation window that has begun, or begins with the next batch; None before a fit.
        resumes_knots: whether the checkpoint that a fit resumes from is of a run with knots.
        warned_of: omissions from checkpoints of which the user was warned.
        is_tying: whether a knot has begun, and has not succeeded.
    """

    schedule: ChainSchedule = field(default_factory=ChainSchedule)
    link_start: Counters = START
    length: RunLength | None = None
    left_at: Counters | None = None
    trainer: weakref.ref[Trainer] | None = None
    is_validating: bool = False
    window: Window | None = None
    resumes_knots: bool = False
    warned_of: set[str] = field(default_factory=set)
    is_tying: bool = False

    def length_for_trainer(self) -> RunLength | None:
        """The length of a fit in which no callback of ours has set it: inside Lightning's batch-size finder, which removes all.

        None if there is no fit, or its data is not set up.
        """
        trainer = self.trainer() if self.trainer else None
        return None if trainer is None or trainer.train_dataloader is None else run_length(trainer, START)

    def __getstate__(self) -> dict[str, Any]:
        """All but the length and the Trainer, which belong to a fit, and cannot be pickled."""
        return vars(self) | {"length": None, "trainer": None}


def run_length(trainer: Trainer, origin: Counters) -> RunLength:
    """The length of the trainer's fit; known once its data is set up.

    Args:
        trainer: the Trainer of the fit.
        origin: the beginning of an epoch, from which the lengths of epochs are counted.
    """
    if trainer.accumulate_grad_batches < 1:
        raise UserError(f"trainer.accumulate_grad_batches: expected at least 1, received {trainer.accumulate_grad_batches}")
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
        origin=origin,
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
