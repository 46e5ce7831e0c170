"""The state of a module's run."""

import weakref
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer

from cola_lightning.chain.schedule import START, ChainSchedule, Counters, RunLength
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

    def __getstate__(self) -> dict[str, Any]:
        """All but the length and the Trainer, which belong to a fit, and cannot be pickled."""
        return vars(self) | {"length": None, "trainer": None}
