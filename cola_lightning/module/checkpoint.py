"""Lightning's checkpoints as files: written atomically, checked when read, and made into modules again."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.serialization import config
from typing_extensions import override

from cola_lightning.chain.checkpoint import OpenedCheckpoint, read_archive
from cola_lightning.errors import UserError, causes
from cola_lightning.module.arguments import SECRET, find_class, plain, stored_arguments
from cola_lightning.module.run import run_of
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)


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
            with atomic_file(Path(path)) as partial, partial.open("wb") as file:
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


def readable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a checkpoint as ``torch.load(weights_only=True)`` reads them: only plain ones.

    Classes of hyperparameters are removed from the checkpoint.
    """
    entries: dict[str, Any] = {}
    for owner in (LightningModule, LightningDataModule):
        checkpoint.pop(owner.CHECKPOINT_HYPER_PARAMS_TYPE, None)
        for name, value in checkpoint.get(owner.CHECKPOINT_HYPER_PARAMS_KEY, {}).items():
            found = entries.setdefault(owner.CHECKPOINT_HYPER_PARAMS_KEY, {})
            if SECRET.search(name):
                continue
            try:
                found[name] = plain(value)
            except TypeError:
                kind = type(value).__name__
                _warn_once(f"the hyperparameter {name!r} ({owner.CHECKPOINT_HYPER_PARAMS_KEY}) is of type {kind}")
    return entries


@functools.cache
def _warn_once(what: str) -> None:
    log.warning("%s, which a checkpoint cannot contain: it is omitted", what)


# ---------------------------------------------------------------------- a module from a file


def load_module(
    cls: Any,
    source: Any,
    links: int | None,
    given: dict[str, Any],
    *,
    weights_only: bool = True,
    strict: bool | None = None,
) -> Any:
    """A module, on the CPU; see :meth:`~cola_lightning.COLAModule.load_from_checkpoint`.

    Not by Lightning's method, which unpickles what is at a URL, and calls what the hyperparameters name.

    Args:
        cls: the requested class; the module is of the checkpoint's class if that is a subclass.
        source: a path, a URL, or an open file.
        links: how many links.
        given: arguments of the class.
        weights_only: False unpickles any object.
        strict: of the module's ``load_state_dict``; None: its ``strict_loading``.
    """
    opened = source if isinstance(source, OpenedCheckpoint) else OpenedCheckpoint.open(source, weights_only=weights_only)
    opened = replace(opened, links=links)
    checkpoint, recorded = opened.contents, opened.state.facts["module"]
    try:
        found = find_class(recorded["class_path"])
        cls = found if issubclass(found, cls) else cls
    except UserError as error:  # it was in a script, say
        if cls.__name__ != recorded["class_path"].rpartition(".")[2]:
            log.warning("%s; it is loaded as %s", error, cls.__name__)
    for name in recorded["not_plain"]:
        if name not in given:
            log.warning("checkpoint: it has no %r, which was not a plain value: pass it, or its default applies", name)
    module = cls(**stored_arguments(cls, recorded) | given)
    if strict and not module.strict_loading:
        raise UserError(f"strict: cannot be True, because {cls.__name__}.strict_loading is False")
    run_of(module).pending = opened
    module.make_model()
    module.on_load_checkpoint(checkpoint)
    strict = module.strict_loading if strict is None else strict
    keys = module.load_state_dict(checkpoint["state_dict"], strict=strict)
    run_of(module).pending = None
    if keys.missing_keys:
        rank_zero_warn(f"Found keys that are in the model state dict but not in the checkpoint: {keys.missing_keys}")
    if keys.unexpected_keys:
        rank_zero_warn(f"Found keys that are not in the model state dict but in the checkpoint: {keys.unexpected_keys}")
    return module


def device_of(map_location: Any) -> torch.device:
    """The device to which torch's ``map_location`` moves a tensor on the CPU, where a checkpoint is read."""
    if callable(map_location):
        storage = map_location(torch.UntypedStorage(0), "cpu")  # type: ignore[no-untyped-call]
        return torch.device("cpu") if storage is None else storage.device
    return torch.device(map_location.get("cpu", "cpu") if isinstance(map_location, Mapping) else map_location)
