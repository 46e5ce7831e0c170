"""Lightning's checkpoints: the chain's state in them, and files that are written atomically, and checked when read."""

import contextlib
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from torch.utils.serialization import config
from typing_extensions import override

from cola_lightning.chain.checkpoint import CHECKPOINT_KEY, CheckpointState, LiveLink, OpenedCheckpoint, read_archive
from cola_lightning.chain.store import EXTRA_STATE
from cola_lightning.errors import NonFiniteError, causes
from cola_lightning.modules.arguments import plain, readable
from cola_lightning.modules.rewind import rewound_progress
from cola_lightning.modules.run import trainer_of
from cola_lightning.writing import whole_file

if TYPE_CHECKING:
    from cola_lightning.modules.base import COLAModule

log = logging.getLogger(__name__)

OPTIMIZATION = ("optimizer_states", "lr_schedulers")  # Lightning's names


def write_state(module: "COLAModule", checkpoint: dict[str, Any]) -> None:
    """Adds the chain's state to the checkpoint that Lightning is about to write.

    Raises:
        RuntimeError: after a knot that failed halfway.
        NonFiniteError: for a trained value that is not finite.
    """
    if module.run.is_tying:
        raise RuntimeError("a knot failed halfway: this checkpoint is not written")
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise NonFiniteError(f"{name!r} is no longer finite, in link {module.link}: this checkpoint is not written")
    checkpoint[CHECKPOINT_KEY] = _state_of(module).to_dict()
    checkpoint["state_dict"].pop(EXTRA_STATE, None)  # the chain's state contains the finished links
    checkpoint |= {name: _with_plain_numbers(checkpoint[name]) for name in OPTIMIZATION if name in checkpoint}
    run = module.run
    _store_hyperparameters(checkpoint, module, getattr(trainer_of(module), "datamodule", None))
    fitter = run.trainer  # a test may have followed, by the same Trainer or another
    if fitter is None or "callbacks" not in checkpoint:  # weights alone, from which no fit resumes
        return
    if (checkpoint["epoch"], checkpoint["global_step"]) != (fitter.current_epoch, fitter.global_step):
        return  # written by another
    counters, window = rewound_progress(checkpoint, fitter, run.window, is_validating=run.is_validating)
    checkpoint[CHECKPOINT_KEY]["progress"] = counters
    if window is not None:
        checkpoint["state_dict"] |= window.buffers
        checkpoint["callbacks"] |= window.callbacks


def _with_plain_numbers(value: Any) -> Any:
    """A state without numpy's numbers, such as a rate of ``np.logspace``: ``torch.load(weights_only=True)`` refuses them."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: _with_plain_numbers(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_with_plain_numbers, value))
    return value


def _state_of(module: "COLAModule") -> CheckpointState:
    adapted, trained, run, trainer = module.adapted, module.trained_state, module.run, trainer_of(module)
    plans = [[run.schedule.rank(link), run.schedule.alpha(link)] for link in range(module.link + 1)]
    live = None
    if adapted.live is not None:
        live = LiveLink(*adapted.live, run.metrics(trainer), list(adapted.extras()), list(trained.outside()))
    return CheckpointState(
        module=module.constructor_arguments,
        chain=adapted.chain,
        live=live,
        dtype=str(adapted.cast_dtype).removeprefix("torch.") if live else None,
        link_start=run.link_start,
        has_knots=run.schedule.has_knots,
        seed=adapted.seed,
        origin=module.init_chain_source,
        base_weights=adapted.base_weights,
        callback_metrics={name: value.detach().cpu() for name, value in trainer.callback_metrics.items()} if trainer else {},
        scheduled=plans,
        modules_to_save=module.modules_to_save,
        outside=trained.first_outside,
        prompt_format=prompt_format_of(trainer),
        data=data_of(trainer),
    )


def prompt_format_of(trainer: Any) -> dict[str, Any]:
    """The ``prompt_format`` of the trainer's data module, of this package or with the same attribute; else an empty dict."""
    given = _of_data_module(trainer, "prompt_format")
    return given if {"kind", "chat_template"} <= given.keys() else {}


def data_of(trainer: Any) -> dict[str, Any]:
    """The ``identity`` of the trainer's data module, of this package or with the same attribute; else an empty dict."""
    return _of_data_module(trainer, "identity")


def _of_data_module(trainer: Any, name: str) -> dict[str, Any]:
    given = getattr(getattr(trainer, "datamodule", None), name, None)
    with contextlib.suppress(TypeError):  # another attribute of that name
        return dict(plain(given)) if isinstance(given, dict) else {}
    return {}


def _store_hyperparameters(checkpoint: dict[str, Any], *owners: Any) -> None:
    """Stores the hyperparameters of module and data module (``save_hyperparameters``) in plain types, or omits them."""
    checkpoint.pop(LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE, None)  # a class
    for owner in owners:
        key = getattr(owner, "CHECKPOINT_HYPER_PARAMS_KEY", "")
        if key not in checkpoint:
            continue
        given, checkpoint[key] = checkpoint[key], {}
        for name, value in given.items():
            try:
                checkpoint[key][name] = readable(value)
            except TypeError:
                _warn_once(f"{type(owner).__name__}: the hyperparameter {name!r} is of type {type(value).__name__}")


@functools.cache
def _warn_once(what: str) -> None:
    log.warning("%s, which a checkpoint cannot contain: it is omitted", what)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint to disk beside its destination, then renames it in one step; refuses to read damaged ones.

    Lightning writes to the system's temporary folder first, which is often another file system, so that its move is a copy.

    Args:
        opened: a checkpoint that was read already, for its path.
    """

    def __init__(self, opened: OpenedCheckpoint | None = None) -> None:
        super().__init__()
        self.opened = opened

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        # Without checksums, which a user may have turned off, it would be refused when read.
        with config.patch("save.compute_crc32", True):  # type: ignore[attr-defined]  # of torch's config modules
            if storage_options is not None or "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            with whole_file(Path(path)) as partial, partial.open("wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # torch's own, for a full disk, too
                    raise next((cause for cause in causes(error) if isinstance(cause, OSError)), error) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if self.opened is not None and self.opened.path == str(path) and (contents := self.opened.take()):
            return contents
        # Lightning's default unpickles what is at a URL
        checkpoint: dict[str, Any] = read_archive(path, weights_only=weights_only is not False)
        return checkpoint
