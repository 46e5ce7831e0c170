"""The run of a module: its schedule, its position, its seed, the metrics of its current link, and the loss of a step.

That is the mean over the rows or tokens of all batches of an optimizer step, on all processes. On a GPU the host runs ahead, so
that to read a value it would wait for all it has launched: what is known on the host is computed there, losses stay on the
device, and whether they are finite is read one optimizer step late.
"""

import logging
import math
import os
import secrets
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import Optimizer

from cola_lightning import layout
from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.chain.schedule import START, ChainSchedule, FitPosition, RunLength
from cola_lightning.errors import NonFiniteError

log = logging.getLogger(__name__)


@dataclass
class Run:
    """The state of a module's run, over one fit or several; the module, its callbacks and its optimization share it.

    Attributes:
        schedule: when knots fall, and each link's rank and alpha; one link until ChainOfLoRA gives its own.
        seed: of every random draw; None until it is given, drawn, or a checkpoint's.
        given_seed: what the user gave, by ``model.seed`` or ``seed_everything``; None: nothing.
        link_start: the position at which the current link began.
        left_at: the position at which the last fit ended, or the checkpoint was written from which the module is; a next fit
            at the same position continues it.
        trainer_ref: of the last fit; an evaluation by another Trainer may have followed.
        length: length of the fit; None while it is not known.
        is_tying: whether a knot has begun, and has not succeeded.
        earlier_metrics: the current link's, logged in an earlier run of a Trainer.
        previous_metrics: logged in this run of a Trainer by the previous link.
        stored_metrics: all that the Trainer of the loaded checkpoint had logged.
        n_before: how many fits have trained the module before this one, which draws other numbers than they did.
        optimization: makes each link's optimizer: a :class:`~cola_lightning.module.optimization.LinkOptimization`.
        pending: a checkpoint that is about to be loaded.
    """

    schedule: ChainSchedule
    seed: int | None
    given_seed: int | None
    link_start: FitPosition = START
    left_at: FitPosition | None = None
    trainer_ref: weakref.ref[Trainer] | None = None
    length: RunLength | None = None
    is_tying: bool = False
    earlier_metrics: dict[str, float] = field(default_factory=dict)
    previous_metrics: dict[str, Tensor] = field(default_factory=dict)
    stored_metrics: dict[str, Tensor] = field(default_factory=dict)
    n_before: int = 0
    optimization: Any = None
    pending: OpenedCheckpoint | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the length and the Trainer, which belong to a fit, and cannot be pickled."""
        return vars(self) | {"length": None, "trainer_ref": None}

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer of the last fit, if it still exists."""
        return None if self.trainer_ref is None else self.trainer_ref()

    def use(self, schedule: ChainSchedule) -> None:
        """Sets the schedule of the next fit, with the module's rank and alpha where it has none."""
        own = self.schedule
        self.schedule = replace(schedule, default_rank=own.default_rank, default_alpha=own.default_alpha)

    def choose_seed(self, stored: int | None) -> None:
        """Sets the seed, if none was given: a checkpoint's, that of ``seed_everything``, or a drawn one.

        Args:
            stored: the seed in the checkpoint that is about to be loaded.
        """
        if self.seed is not None:
            return
        text = os.environ.get("PL_GLOBAL_SEED")  # what seed_everything was given
        self.given_seed = None if text is None else int(text)
        self.seed = self.given_seed if stored is None else stored
        if self.seed is None:
            self.seed = layout.gather_objects(secrets.randbits(31))[0]  # from no generator of torch's
            log.info("No seed given (model.seed); using %d", self.seed)

    # ------------------------------------------------------------------ position and length

    def position(self, trainer: Trainer | None) -> FitPosition:
        """The epoch and optimizer step that the fit has reached, or had reached at its end.

        Args:
            trainer: the module's Trainer.
        """
        if trainer is not None and trainer.state.fn == "fit":
            return FitPosition(trainer.current_epoch, trainer.global_step)
        if self.left_at is None or self.left_at.global_step < self.link_start.global_step:
            return self.link_start
        return self.left_at

    def known_length(self) -> RunLength | None:
        """The length of the fit; None if there is none, or its data is not set up.

        Lightning's batch-size finder removes the callbacks, one of which sets the length.
        """
        trainer = self.trainer
        if self.length is not None or trainer is None or trainer.train_dataloader is None:
            return self.length
        return run_length(trainer, START)

    # ------------------------------------------------------------------ metrics

    def metrics(self, trainer: Trainer | None) -> dict[str, float]:
        """The values last logged since the current link began, in this run of a Trainer or an earlier one.

        Args:
            trainer: the Trainer of the present run, if there is one.
        """
        if trainer is None or (trainer.training and trainer.global_step == self.link_start.global_step):
            return dict(self.earlier_metrics)  # no step of this link yet: the logged values are of the previous one
        logged = trainer.callback_metrics.items()
        own = {name: float(value) for name, value in logged if value is not self.previous_metrics.get(name)}
        return self.earlier_metrics | own

    def metadata(self, trainer: Trainer | None) -> dict[str, Any]:
        """Steps and metrics of the current link, for its record."""
        steps = {"start_step": self.link_start.global_step, "end_step": self.position(trainer).global_step}
        return steps | {"metrics": self.metrics(trainer)}

    def begin_metrics(self, trainer: Trainer | None) -> None:
        """Begins a link's metrics: the values logged so far are not its own."""
        self.earlier_metrics, self.previous_metrics = {}, dict(trainer.callback_metrics) if trainer else {}

    def restore_metrics(self, trainer: Trainer) -> None:
        """Restores the last logged values in a resumed Trainer: Lightning does not, and a rule by metrics may read them."""
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: value.to(device) for name, value in self.stored_metrics.items()})
        self.previous_metrics = dict(trainer.callback_metrics)


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


def run_of(module: Any) -> Run:
    """The run of a COLA module, which has one private name there: a subclass may call its own attributes what it likes."""
    run: Run = module._cola_run
    return run


def trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer that a module is attached to; None if there is none."""
    try:
        trainer = module.trainer
    except RuntimeError:  # Lightning's way to report none
        return None
    return trainer if isinstance(trainer, Trainer) else None  # Fabric's stand-in for one has no counters


# ---------------------------------------------------------------------- the loss of a step


class StepLoss:
    """Weighs the batches of an optimizer step by their sizes: those of an accumulation window, on all processes.

    Lightning averages the gradients of such batches as if all had the same size, and how many rows or tokens there are is known
    at the end. So a batch is weighed by its size relative to the window's first batches, and the gradients are then scaled by
    what is missing. With equal sizes both factors are 1, to the bit.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begins a fit."""
        self.n_tokens = 0  # of this process' batches so far, without padding; 0 if batches have none
        self._last: tuple[Late, str] | None = None  # the loss of the last step, and which one it was
        self._begin_window()

    def _begin_window(self) -> None:
        self.first: float | Tensor | None = None  # the size of the first batches, on all processes
        self.size = 0  # of this process' batches
        self.total: Tensor | None = None  # the sum of the losses of this process' rows or tokens
        self.unweighed: Tensor | None = None  # the sum of the losses of batches

    def weigh(self, loss: Tensor, size: int | None) -> Tensor:
        """The loss that ``training_step`` returns for a batch; all processes must call this.

        Args:
            loss: a scalar, the mean over ``size``.
            size: the number of rows or tokens; None: all batches weigh alike, as Lightning has it.
        """
        with torch.no_grad():
            total = loss.float() * (1 if size is None else size)
            self.total = total if self.total is None else self.total + total
        self.size += 1 if size is None else size
        if size is None:
            return loss
        if self.first is None:
            is_alone = not layout.has_processes()
            self.first = _at_least_1(float(size) if is_alone else layout.sum_over_processes([size], loss.device)[0])
        factor = size * layout.n_processes() / self.first
        if isinstance(factor, Tensor):  # which the host need not know
            return loss * factor.to(loss.dtype)
        return loss if factor == 1 else loss * factor

    def add(self, loss: Tensor) -> None:
        """Notes a batch's loss, so that it is checked if it was not weighed."""
        if self.total is None:
            self.unweighed = loss.detach() if self.unweighed is None else self.unweighed + loss.detach()

    def finish(self, optimizer: Optimizer, n_batches: int, step: str) -> Tensor | None:
        """Scales the gradients at the window's end, and begins the next; all processes must call this.

        Args:
            optimizer: of the parameters.
            n_batches: of a full window, by which Lightning has divided each loss.
            step: how an error names this step.

        Returns:
            The window's mean loss, a scalar on the device; None if no batch was weighed.
        """
        mean = None
        if self.total is not None:
            total, size = self.total, _at_least_1(float(self.size))
            if self.first is not None:
                if layout.has_processes():
                    total, size = layout.sum_over_processes([total, size], total.device)
                    size = _at_least_1(size)
                _scale_gradients(optimizer, self.first * n_batches / size)
            mean = (total / size).float()
        checked = self.unweighed if mean is None else mean
        self._last = None if checked is None else (Late(checked), step)
        self._begin_window()
        return mean

    def check(self) -> float | None:
        """The loss of the last step that was finished; None if there is none.

        Raises:
            NonFiniteError: if it is not finite.
        """
        if self._last is None:
            return None
        late, step = self._last
        if not math.isfinite(loss := late.read()):
            raise NonFiniteError(
                f"the training loss is {loss} at {step}; a lower learning rate or trainer.gradient_clip_val may help"
            )
        return loss


class Late:
    """A value that is copied to the host in the background, so that reading it later hardly waits.

    Args:
        value: a scalar.
    """

    def __init__(self, value: Tensor) -> None:
        # In the background by CUDA alone: a Mac's GPU has no such event (https://github.com/pytorch/pytorch/issues/140296).
        self._value = value.to("cpu", non_blocking=value.is_cuda)
        self._copied = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def read(self) -> float:
        """The value."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()


def _at_least_1(size: float | Tensor) -> float | Tensor:
    return size.clamp(min=1) if isinstance(size, Tensor) else max(1.0, size)


def _scale_gradients(optimizer: Optimizer, scale: float | Tensor) -> None:
    if not isinstance(scale, Tensor) and scale == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if gradients:
        torch._foreach_mul_([layout.local(gradient) for gradient in gradients], scale)
