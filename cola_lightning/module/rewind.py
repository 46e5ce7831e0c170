"""Exact resumes: a checkpoint resumes from the end of its run's last finished accumulation window, whenever it is written.

Lightning stores no gradients, so a checkpoint from inside a window can only be resumed exactly from the window's start, since
which no step has changed weights, optimizer or chain. And it takes a validation that was interrupted, or had not begun, for
done. Both are corrected in a copy of the counters that Lightning stores, which replaces them in a resumed fit, so that
Lightning's own way of resuming is correct.

The layout of ``checkpoint["loops"]`` is Lightning's own and not documented; only this file depends on it.
"""

import copy
from collections.abc import Mapping, Set
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from cola_lightning import layout

Progress = dict[str, Any]

EPOCHS, BATCHES, VALIDATION = "epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
LOADERS = "combined_loader"


class Rewind:
    """Where a fit would resume if a checkpoint were written now, which may be before where the fit is.

    That is at the accumulation window that has begun, or begins with the next batch. Besides counters and weights it needs the
    states of the training data loaders before its first batch was fetched, of those that have a state. (Lightning fetches one
    batch ahead if a loader has no length.) It also needs what its first batch may change: the persistent buffers, and the
    states of EarlyStopping callbacks, which count validations.
    """

    def __init__(self) -> None:
        self._persistent: Set[str] = frozenset()  # names of the buffers that checkpoints contain
        self._place: tuple[int, int] | None = None  # epoch and first batch of the window; None before a fit
        self._loaders: list[dict[str, Any]] = []  # none at the start of an epoch, where they start over
        self._buffers: dict[str, Tensor] = {}
        self._callbacks: dict[str, Any] = {}

    def begin_fit(self, trainer: Trainer, module: nn.Module, names: Set[str]) -> None:
        """Begins a fit: at batch 0, unless it resumes inside an epoch.

        Args:
            trainer: the Trainer of the fit.
            module: its module.
            names: of the values that checkpoints contain.
        """
        self._persistent = _named_buffers(module).keys() & names
        self.expect_window(trainer, trainer.fit_loop.epoch_loop.batch_idx + 1)

    def expect_window(self, trainer: Trainer, batch_idx: int) -> None:
        """Notes that a window begins with the next batch.

        Args:
            trainer: the Trainer of the fit.
            batch_idx: index of that batch in the epoch.
        """
        self._place, self._loaders, self._buffers, self._callbacks = (trainer.current_epoch, batch_idx), [], {}, {}
        if batch_idx:  # before an epoch, a loader may still have the state of the end of the last
            # Those whose state Lightning stores, in its order; a loader of this package has an empty state.
            loaders = [loader for loader in CombinedLoader(trainer.train_dataloader).flattened if isinstance(loader, Stateful)]
            self._loaders = [copy.deepcopy(loader.state_dict()) for loader in loaders]

    def begin_window(self, trainer: Trainer, module: nn.Module) -> None:
        """Stores what the first batch of the window may change."""
        named = _named_buffers(module) if self._persistent else {}
        buffers = {name: value.detach() for name, value in named.items() if name in self._persistent}
        self._buffers = {name: torch.empty_like(value) for name, value in buffers.items()}
        if buffers:
            torch._foreach_copy_([*self._buffers.values()], [*buffers.values()])  # one operation for all
        counting = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
        self._callbacks = {c.state_key: copy.deepcopy(c.state_dict()) for c in counting}

    def write(self, checkpoint: dict[str, Any], trainer: Trainer, key: str, *, is_validating: bool) -> None:
        """Writes into a fit's checkpoint where the run resumes.

        Args:
            checkpoint: the checkpoint that Lightning is about to write.
            trainer: the Trainer of the fit.
            key: the entry of its callbacks in which this is stored.
            is_validating: whether a validation inside the fit has begun and not ended.
        """
        fit_loop = checkpoint["loops"]["fit_loop"]
        counters = copy.deepcopy({name: fit_loop[name] for name in (EPOCHS, BATCHES, VALIDATION)})
        batch_idx = _rewind(counters, trainer, is_validating=is_validating)
        checkpoint["callbacks"][key] = {"progress": counters}
        if (trainer.current_epoch, batch_idx) == self._place:
            if any(fit_loop["state_dict"].get(LOADERS, ())):
                counters[LOADERS] = self._loaders
            checkpoint["state_dict"] |= {name: layout.gather(copied) for name, copied in self._buffers.items()}
            checkpoint["callbacks"] |= self._callbacks


def _named_buffers(module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_buffers(remove_duplicate=False))
    return dict(zip(layout.plain_names(named), named.values(), strict=True))


def resume_rewound(checkpoint: Mapping[str, Any], key: str) -> None:
    """Makes Lightning resume a fit from where :meth:`Rewind.write` says."""
    if (stored := checkpoint["callbacks"].get(key)) is not None:
        fit_loop, counters = checkpoint["loops"]["fit_loop"], stored["progress"]
        fit_loop.update({name: value for name, value in counters.items() if name != LOADERS})
        if LOADERS in counters:
            fit_loop["state_dict"][LOADERS] = counters[LOADERS]


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


def _is_validation_due(trainer: Trainer) -> bool:
    """Whether Lightning will validate after the batch that has just been trained on; there is no public way to know."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _set_all(progress: Progress, current: int, total: int) -> None:
    for part, value in (("current", current), ("total", total)):
        progress[part] |= dict.fromkeys(("ready", "started", "processed", "completed"), value)
