"""Exact resumes: a checkpoint resumes from the last point of its run that is complete, whenever it is written.

Lightning stores no gradients, so a checkpoint from inside an accumulation window can only be resumed exactly from the window's
start, since which no step has changed weights, optimizer or chain. And it treats a validation that is interrupted or pending as
finished. So a fit notes such points as it reaches them. A checkpoint gets the point's counters in place of the present ones,
and the point's copies of what hooks have changed since, so that Lightning's own way of resuming is correct.

The layout of ``checkpoint["loops"]`` is Lightning's own and not documented; only this file depends on it.
"""

import copy
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, WeightAveraging
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from cola_lightning import layout
from cola_lightning.contexts import with_attribute

EPOCHS, BATCHES, VALIDATION = "epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
LOADERS = "combined_loader"


@dataclass
class _Point:
    """A point from which a run can be resumed exactly: after a batch that ended a window, or at the beginning of an epoch.

    After the batch come its validation, if one is due, and after an epoch's last batch the hooks at the epoch's end. Until
    these are over, or until the next window is, the run resumes from here.

    Attributes:
        epoch: epochs before it.
        batches: batches of its epoch before it.
        total: batches of all epochs before it.
        is_last: whether its epoch has no batch after it.
        is_validation_due: whether a validation follows it.
        is_validated: whether that validation has ended, and the callbacks before the module's own have acted on it.
        has_next_begun: whether the first batch of the next window has begun.
        is_undone: whether an exception came before the hooks were over that follow it, so that all of them are repeated.
        loaders: states of the training data loaders that have one. (Lightning fetches one batch ahead if a loader has no
            length.) There are none at the beginning of an epoch, where loaders start over.
        buffers: copies of the persistent buffers, by name.
        callbacks: copies of the callbacks' states, by key: EarlyStopping counts validations.
    """

    epoch: int
    batches: int
    total: int
    is_last: bool = False
    is_validation_due: bool = False
    is_validated: bool = False
    has_next_begun: bool = False
    is_undone: bool = False
    loaders: list[dict[str, Any]] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)


class Rewind:
    """Where a fit would resume if a checkpoint were written now, which may be before where the fit is."""

    def __init__(self) -> None:
        self._persistent: Set[str] = frozenset()  # names of the buffers that checkpoints contain
        self._point: _Point | None = None  # None before a fit

    # ------------------------------------------------------------------ the points of a fit, as it reaches them

    def begin_fit(self, trainer: Trainer, module: nn.Module, names: Set[str]) -> None:
        """Begins a fit: at the beginning of an epoch, unless it resumes inside one.

        Args:
            trainer: the Trainer of the fit.
            module: its module.
            names: of the values that checkpoints contain.
        """
        self._persistent = _named_buffers(module).keys() & names
        epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
        validations: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        self.begin_epoch(trainer)
        if epochs.ready > epochs.completed:  # it resumes inside an epoch
            is_due = validations.ready > validations.processed
            self._go_to(trainer, is_last=batches.is_last_batch, is_validation_due=is_due)
            self._copy(trainer, module)

    def begin_epoch(self, trainer: Trainer) -> None:
        """Notes that an epoch begins: the hooks at the end of the last one are over."""
        self._point = _Point(trainer.current_epoch, 0, trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def begin_window(self, trainer: Trainer, module: nn.Module) -> None:
        """Notes that the first batch of an accumulation window begins."""
        assert self._point is not None
        self._point.is_validation_due, self._point.has_next_begun = False, True
        self._copy(trainer, module)

    def end_batch(self, trainer: Trainer, module: nn.Module) -> None:
        """Notes that a batch has ended: if it ends an accumulation window, the run resumes after it from here on."""
        self._go_on(trainer)
        point = self._point
        assert point is not None
        if not _is_in_batch(trainer, point) and (point.is_validation_due or trainer.fit_loop.epoch_loop.done):
            self._copy(trainer, module)

    def begin_validation(self, trainer: Trainer, module: nn.Module) -> None:
        """Notes that a validation begins, which is known before, unless it depends on the time."""
        point = self._point
        if point is not None and not (point.is_validation_due or _is_in_batch(trainer, point)):
            point.is_validation_due = True
            self._copy(trainer, module)

    def end_validation(self) -> None:
        """Notes that a validation has ended: checkpoints that are written on it need not repeat it."""
        if self._point is not None:
            self._point.is_validated = True

    def interrupt(self, trainer: Trainer) -> None:
        """Notes that an exception ends the fit: the validation that is not over is repeated, and what EarlyStopping decides.

        No checkpoint contains its decision, because a run that it has ended may be resumed. Where nothing is decided, the hooks
        at an epoch's end are not repeated: a module's own may need what it has collected in the epoch.
        """
        loop, point = trainer.fit_loop, self._point
        if point is None or _is_in_batch(trainer, point):
            return
        is_ending = loop.epoch_loop.done and loop.epoch_progress.current.completed <= point.epoch
        stopping = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
        decides = is_ending and any(callback._check_on_train_epoch_end for callback in stopping)
        point.is_undone = trainer.validating or decides or (bool(stopping) and trainer.should_stop)

    def _go_to(self, trainer: Trainer, *, is_last: bool, is_validation_due: bool) -> None:
        """Goes to the point after the batch that has been trained on last."""
        progress, epoch = trainer.fit_loop.epoch_loop.batch_progress, trainer.current_epoch
        # Those whose state Lightning stores, in its order; a loader of this package has an empty state.
        loaders = [loader for loader in CombinedLoader(trainer.train_dataloader).flattened if isinstance(loader, Stateful)]
        states = [copy.deepcopy(loader.state_dict()) for loader in loaders]
        self._point = _Point(epoch, progress.current.ready, progress.total.ready, is_last, is_validation_due, loaders=states)

    def _go_on(self, trainer: Trainer) -> None:
        """Goes to the point after the present batch if it ends an accumulation window, for which the optimizer has stepped."""
        batches, point = trainer.fit_loop.epoch_loop.batch_progress, self._point
        current: Any = batches.current
        is_at_batch_end = current.completed < current.processed == current.ready
        if point is None or not is_at_batch_end or not _is_in_batch(trainer, point):
            return
        done: int = current.ready
        is_last = batches.is_last_batch or done == trainer.num_training_batches
        if is_last or done % trainer.accumulate_grad_batches == 0:
            self._go_to(trainer, is_last=is_last, is_validation_due=_is_validation_due(trainer))

    def _copy(self, trainer: Trainer, module: nn.Module) -> None:
        """Copies what the hooks after the point may change. Averaged weights, and so their counters, are never set back."""
        assert self._point is not None
        named = _named_buffers(module) if self._persistent else {}
        buffers = {name: value.detach() for name, value in named.items() if name in self._persistent}
        self._point.buffers = {name: torch.empty_like(value) for name, value in buffers.items()}
        if buffers:
            torch._foreach_copy_([*self._point.buffers.values()], [*buffers.values()])  # one operation for all
        callbacks = [c for c in trainer.callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        self._point.callbacks = {c.state_key: copy.deepcopy(c.state_dict()) for c in callbacks}

    # ------------------------------------------------------------------ checkpoints

    def write(self, checkpoint: dict[str, Any], trainer: Trainer, key: str) -> None:
        """Writes into a fit's checkpoint where the run resumes.

        Args:
            checkpoint: the checkpoint that Lightning is about to write.
            trainer: the Trainer of the fit.
            key: the entry of its callbacks in which this is stored.
        """
        self._go_on(trainer)  # an exception, or a checkpoint of a callback's own, may come before the hook of this one
        fit_loop, point = checkpoint["loops"]["fit_loop"], self._point
        epochs: Any = trainer.fit_loop.epoch_progress.current
        checkpoint["epoch"] = max(0, epochs.ready - 1)  # Lightning's is one higher after a run that was not resumed
        if point is None:  # before a fit
            return
        is_in_batch = _is_in_batch(trainer, point)
        has_ended = epochs.processed > point.epoch  # and the hooks at its end are called, or over
        # Without a validation after an epoch's last batch, Lightning would resume there with one batch more.
        is_at_next_epoch = point.is_last and (not point.is_validation_due or (has_ended and not point.is_undone))
        is_pending = point.is_validation_due and not is_in_batch and (point.is_undone or not point.is_validated)
        counters: dict[str, Any] = copy.deepcopy({name: fit_loop[name] for name in (EPOCHS, BATCHES, VALIDATION)})
        _set_all(counters[EPOCHS], point.epoch + is_at_next_epoch, point.epoch + is_at_next_epoch)
        _set_all(counters[BATCHES], 0 if is_at_next_epoch else point.batches, point.total)
        _set_all(counters[VALIDATION], 0, 0)
        counters[BATCHES]["is_last_batch"] = point.is_last and not is_at_next_epoch
        if point.batches and not is_at_next_epoch:  # inside an epoch, also where max_steps or EarlyStopping has ended it there
            for part in ("current", "total"):
                counters[EPOCHS][part] |= dict.fromkeys(("ready", "started"), point.epoch + 1)
        if is_pending:  # Lightning's sign of a validation to be run
            counters[VALIDATION]["total"] |= {"ready": 1, "started": 1}
        if any(fit_loop["state_dict"].get(LOADERS, ())):
            counters[LOADERS] = [] if is_at_next_epoch else point.loaders
        if point.has_next_begun or point.is_undone or (is_pending and trainer.validating):
            _restore(checkpoint, trainer, point)
        # Lightning updates rates that depend on a metric between the hooks at an epoch's end and the next epoch.
        is_rate_due = is_at_next_epoch and epochs.completed <= point.epoch
        checkpoint["callbacks"][key] = {"progress": counters, "is_rate_due": is_rate_due}


def resume_rewound(checkpoint: Mapping[str, Any], key: str) -> bool:
    """Makes Lightning resume a fit from where :meth:`Rewind.write` says.

    Returns:
        Whether a validation comes first.
    """
    if (counters := checkpoint["callbacks"].get(key, {}).get("progress")) is not None:
        fit_loop = checkpoint["loops"]["fit_loop"]
        fit_loop.update({name: value for name, value in counters.items() if name != LOADERS})
        if LOADERS in counters:
            fit_loop["state_dict"][LOADERS] = counters[LOADERS]
    validations: dict[str, int] = checkpoint["loops"]["fit_loop"][VALIDATION]["total"]
    return validations["processed"] < validations["ready"]


def can_validate(trainer: Trainer) -> bool:
    """Whether a fit has anything to validate on, in whatever epoch."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    return not loop.skip


@contextmanager
def awaiting_validation(trainer: Trainer) -> Iterator[None]:
    """Inside the block, a fit begins although its last step is done, and validates wherever it stands.

    Lightning would not begin it, and would validate only if the reason for which the validation was due still held.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    with ExitStack() as block:
        block.enter_context(with_attribute(loop, "_should_check_val_fx", lambda data_fetcher: True))
        if loop.max_steps > 0:
            block.enter_context(with_attribute(loop, "max_steps", loop.max_steps + 1))
        yield


def _restore(checkpoint: dict[str, Any], trainer: Trainer, point: _Point) -> None:
    """Replaces in a checkpoint what the hooks after a point have changed by what was there before."""
    state = checkpoint.get("current_model_state", checkpoint["state_dict"])  # which WeightAveraging may have replaced
    state |= {name: layout.gather(copied) for name, copied in point.buffers.items()}
    stored = checkpoint["callbacks"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        is_file_listed = isinstance(callback, Checkpoint) and not point.is_undone  # that it writes now, perhaps
        if callback.state_key in point.callbacks and not is_file_listed:
            stored.pop(callback.state_key, None)
            if state := point.callbacks[callback.state_key]:
                stored[callback.state_key] = state


def _named_buffers(module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_buffers(remove_duplicate=False))
    return dict(zip(layout.plain_names(named), named.values(), strict=True))


def _is_in_batch(trainer: Trainer, point: _Point) -> bool:
    """Whether a batch has begun since a point."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready > point.total


def _is_validation_due(trainer: Trainer) -> bool:
    """Whether Lightning will validate after the batch that has just been trained on; there is no public way to know."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _set_all(progress: dict[str, Any], current: int, total: int) -> None:
    for part, value in (("current", current), ("total", total)):
        progress[part] |= dict.fromkeys(("ready", "started", "processed", "completed"), value)
