"""Exact resumes: a checkpoint resumes from the end of its run's last finished accumulation window, whenever it is written.

Lightning stores no gradients, so a checkpoint from inside a window can only be resumed exactly from the window's start, since
which no step has changed weights, optimizer or chain. And it takes a validation that was interrupted, or had not begun, for
done. Both are corrected in a copy of the counters that Lightning stores, which replaces them in a resumed fit, so that
Lightning's own way of resuming is correct.

The layout of ``checkpoint["loops"]`` is Lightning's own and not documented; only this file depends on it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.module.run import run_of
from cola_lightning.module.state import values_of

if TYPE_CHECKING:
    from cola_lightning.module.module import COLAModule

Progress = dict[str, Any]

EPOCHS, BATCHES, VALIDATION = "epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
LOADERS = "combined_loader"


@dataclass(frozen=True)
class Window:
    """The state needed to begin an accumulation window again, besides counters and weights.

    Attributes:
        epoch: of the window.
        batch_idx: its first batch in the epoch.
        loaders: the states of the training data loaders before that batch was fetched, of those that have a state; none at the
            start of an epoch, where they start over. (Lightning fetches one batch ahead if a loader has no length.)
        buffers: the persistent buffers when that batch began; none before.
        callbacks: the states of EarlyStopping callbacks when that batch began, which count validations; none before.
    """

    epoch: int
    batch_idx: int
    loaders: list[dict[str, Any]]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    callbacks: Mapping[str, Any] = field(default_factory=dict)


class ExactResume(Callback):
    """Has each checkpoint of a fit say where the run resumes, which may be before where the run is.

    Args:
        module: the module of the fit.
    """

    def __init__(self, module: "COLAModule") -> None:
        self.module = module
        self._buffers: dict[str, Tensor] = {}  # copies of persistent buffers, on their device
        self._window: Window | None = None  # the one that has begun, or begins with the next batch; None before a fit

    @property
    @override
    def state_key(self) -> str:
        """The name of its state in checkpoints, also in those that another class has written."""
        return "RunChecks"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = layout.plain_names(dict(pl_module.named_parameters(remove_duplicate=False)))
        self._buffer_names = sorted(self._tensors().keys() - set(parameters))
        run_of(self.module).is_validating = False
        # Batch 0, unless the fit resumes inside an epoch.
        self._window = beginning_window(trainer, trainer.fit_loop.epoch_loop.batch_idx + 1)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window = beginning_window(trainer, 0)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._window is not None and batch_idx % trainer.accumulate_grad_batches == 0:
            buffers = self._copied_buffers() if self._buffer_names else {}
            counting = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]
            states = {one.state_key: copy.deepcopy(one.state_dict()) for one in counting}
            self._window = replace(self._window, buffers=buffers, callbacks=states)
        align_logged_step(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._window = beginning_window(trainer, batch_idx + 1)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            run_of(self.module).is_validating = True
            align_logged_step(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run_of(self.module).is_validating = False

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        run = run_of(self.module)
        if run.trainer is not trainer:  # not of a fit
            return
        counters, window = rewound_progress(checkpoint, trainer, self._window, is_validating=run.is_validating)
        checkpoint["callbacks"][self.state_key] = {"progress": counters}
        if window is not None:
            checkpoint["state_dict"] |= {name: layout.gather(copied) for name, copied in window.buffers.items()}
            checkpoint["callbacks"] |= window.callbacks

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint["callbacks"].get(self.state_key)
        if stored is not None and trainer.state.fn == "fit":
            resume_from(checkpoint, stored["progress"])

    def _copied_buffers(self) -> dict[str, Tensor]:
        """Copies of the persistent buffers as they are now, on their device and into the same memory each time."""
        state = self._tensors()
        own = {name: state[name].detach() for name in self._buffer_names if name in state}
        places, before = ([(k, v.shape, v.dtype, v.device) for k, v in some.items()] for some in (own, self._buffers))
        if places != before:  # the first time, or another device or shape
            self._buffers = {name: torch.empty_like(value) for name, value in own.items()}
        torch._foreach_copy_(list(self._buffers.values()), list(own.values()))
        return self._buffers

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in values_of(self.module).items() if isinstance(value, Tensor)}


def beginning_window(trainer: Trainer, batch_idx: int) -> Window:
    """The window whose first batch comes next.

    Args:
        trainer: the Trainer of the fit.
        batch_idx: index of that batch in the epoch.
    """
    states = list[dict[str, Any]]()
    if batch_idx:  # before an epoch, a loader may still have the state of the end of the last
        # Those whose state Lightning stores, in its order; a loader of this package has an empty state.
        loaders = [loader for loader in CombinedLoader(trainer.train_dataloader).flattened if isinstance(loader, Stateful)]
        states = [copy.deepcopy(loader.state_dict()) for loader in loaders]
    return Window(trainer.current_epoch, batch_idx, states)


def rewound_progress(
    checkpoint: Mapping[str, Any], trainer: Trainer, window: Window | None, *, is_validating: bool
) -> tuple[Progress, Window | None]:
    """The counters of a fit that its resume needs, by Lightning's names.

    Args:
        checkpoint: the checkpoint that Lightning is about to write.
        trainer: the Trainer of the fit.
        window: the accumulation window that has begun, or begins with the next batch.
        is_validating: whether a validation inside the fit has begun and not ended.

    Returns:
        The counters, and the window in which the run will resume, if its first batch had begun. In that case the counters also
        contain the states of loaders that have one.
    """
    given = checkpoint["loops"]["fit_loop"]
    counters = copy.deepcopy({name: given[name] for name in (EPOCHS, BATCHES, VALIDATION)})
    batch_idx = _rewind(counters, trainer, is_validating=is_validating)
    if window is None or (trainer.current_epoch, batch_idx) != (window.epoch, window.batch_idx):
        return counters, None
    if any(given["state_dict"].get(LOADERS, ())):
        counters[LOADERS] = window.loaders
    return counters, window


def resume_from(checkpoint: Mapping[str, Any], counters: Progress) -> None:
    """Has Lightning resume from :func:`rewound_progress`."""
    given = checkpoint["loops"]["fit_loop"]
    given.update({name: value for name, value in counters.items() if name != LOADERS})
    if LOADERS in counters:
        given["state_dict"][LOADERS] = counters[LOADERS]


def _rewind(counters: Progress, trainer: Trainer, *, is_validating: bool) -> int | None:
    """Moves counters back to the last finished accumulation window, in place.

    Args:
        counters: of epochs, batches and validation.
        trainer: the Trainer of the fit.
        is_validating: whether a validation inside the fit has begun and not ended.

    Returns:
        The batch of the epoch at which the run will resume, if that batch had begun; else None.
    """
    epochs, batches, validation = counters[EPOCHS], counters[BATCHES], counters[VALIDATION]
    done = batches["current"]["processed"]  # batches of the epoch, and whether these are all
    is_whole = (batches["is_last_batch"] and batches["current"]["ready"] == done) or 0 < done == trainer.num_training_batches
    is_at_batch_end = done > batches["current"]["completed"]  # the hooks at the end of a batch are being called
    is_pending = is_validating or (is_at_batch_end and _is_validation_due(trainer))
    has_ended = epochs["current"]["processed"] == epochs["current"]["ready"]
    if has_ended and done == 0:  # between two epochs, or before the first
        return None
    is_beginning = epochs["current"]["started"] < epochs["current"]["ready"]  # its hooks; the batches are the last epoch's
    if is_beginning or (is_whole and (has_ended or (is_at_batch_end and not is_pending))):
        _set_all(epochs, *(epochs[part]["ready"] - is_beginning for part in ("current", "total")))
        _set_all(batches, 0, batches["total"]["ready"])
        batches["is_last_batch"] = False
        return None
    # Inside an epoch, also where max_steps or EarlyStopping has ended the fit there.
    for part in ("current", "total"):
        epochs[part] |= {"processed": epochs[part]["ready"] - 1, "completed": epochs[part]["ready"] - 1}
    rewound = done if is_whole else done - done % trainer.accumulate_grad_batches
    has_begun = batches["current"]["ready"] > rewound
    total = batches["total"]["ready"] - batches["current"]["ready"] + rewound
    _set_all(batches, rewound, total)
    batches["is_last_batch"] = is_whole
    if rewound < done:  # the validations since then will be repeated
        _set_all(validation, 0, 0)
    elif is_pending:  # Lightning's sign of a validation to be run; it starts over
        _set_all(validation, 0, 0)
        validation["total"] |= {"ready": 1, "started": 1}
    elif validation["total"]["processed"] < validation["total"]["ready"]:  # such a sign, of a validation that was then repeated
        _set_all(validation, validation["current"]["ready"], validation["total"]["ready"])
    return rewound if has_begun else None


def align_logged_step(trainer: Trainer) -> None:
    """Sets the loggers' step to the number of optimizer steps: a resume may leave it off by one."""
    if not trainer.lightning_module.automatic_optimization:  # manual optimization may take several steps in a batch
        return
    loop = trainer.fit_loop.epoch_loop
    is_before_its_count = trainer.validating and not loop._should_accumulate()
    loop._batches_that_stepped = trainer.global_step - is_before_its_count


def _is_validation_due(trainer: Trainer) -> bool:
    """Whether Lightning will validate after the batch that has just been trained on; there is no public way to know."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _set_all(progress: Progress, current: int, total: int) -> None:
    for part, value in (("current", current), ("total", total)):
        progress[part] |= dict.fromkeys(("ready", "started", "processed", "completed"), value)
