"""The chain in a checkpoint: the finished links, the live link, and the state of the run.

These are megabytes where the weights would be gigabytes. This file reads checkpoints, and other files that hold a chain,
without a module or Lightning.
"""

import io
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from cola_lightning.chain.base import BaseIdentity, from_stored
from cola_lightning.chain.chain import Chain
from cola_lightning.chain.link import Link
from cola_lightning.chain.peft import CONFIG_NAME, read_adapter
from cola_lightning.chain.schedule import FitPosition
from cola_lightning.chain.store import JSON_NAME, VERSION, check_version
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "cola"  # holds everything that this package adds to a checkpoint


@contextmanager
def opened_file(source: Any) -> Iterator[BinaryIO]:
    """A file of this machine or at a URL, opened for reading; an open file as it is."""
    if not isinstance(source, str | PathLike):
        yield source
    elif "://" in (path := str(source)):
        from lightning.fabric.utilities.cloud_io import get_filesystem

        with get_filesystem(path).open(path, "rb") as file:
            yield io.BytesIO(file.read())
    else:
        with open(os.path.expanduser(path), "rb") as file:  # pathlib's fails for a name that begins with ~
            yield file


def read_archive(source: Any, field: str = "checkpoint", *, weights_only: bool = True) -> Any:
    """Reads onto the CPU what ``torch.save`` wrote, with the checksums verified, which ``torch.load`` does not do.

    Args:
        source: its path, its URL, or an open file.
        field: the path's name in messages.
        weights_only: False unpickles whatever the file holds, which may run code: for a file that the user trusts.

    Raises:
        UserError: if there is no such file, or it is damaged, or ``torch.save`` did not write it.
    """
    try:
        with opened_file(source) as file:
            with zipfile.ZipFile(file) as archive:
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"its part {part!r} is damaged")
            file.seek(0)
            return torch.load(file, weights_only=weights_only, map_location="cpu")
    except Exception as error:  # zipfile and torch.load may raise anything for damaged bytes
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:120]
        if weights_only and isinstance(error, pickle.UnpicklingError):
            reason += "; weights_only=False reads one that holds objects, if you trust it"
        raise UserError(
            f"{field}: expected a checkpoint file, received {name_of(source)!r}, which cannot be read ({reason})"
        ) from error


def name_of(source: Any) -> str:
    """The path of a file, open or not, for messages and comparisons."""
    return os.path.expanduser(str(source if isinstance(source, str | PathLike) else getattr(source, "name", source)))


@dataclass
class OpenedCheckpoint:
    """A checkpoint file that was opened, checked and read once, shared by the parts of a command.

    Attributes:
        path: its path.
        contents: the whole checkpoint, on the CPU; empty after :meth:`take`.
        state: what this package stored in it.
        links: how many of its links to load, the finished ones first and then the live one; None: all.
    """

    path: str
    contents: dict[str, Any]
    state: "CheckpointState"
    links: int | None = None

    @classmethod
    def open(cls, source: Any, field: str = "checkpoint", *, weights_only: bool = True) -> Self:
        """Opens the checkpoint of a COLA module, and reads it.

        Args:
            source: its path, its URL, or an open file.
            field: the path's name in messages.
            weights_only: see :func:`read_archive`.

        Raises:
            UserError: if there is no such file, or it is damaged, or not a COLA module's checkpoint of a known format version.
        """
        contents, name = read_archive(source, field, weights_only=weights_only), name_of(source)
        return cls(name, contents, CheckpointState.of(contents, field, name))

    def take(self) -> dict[str, Any]:
        """Hands the contents to the caller, which may change them; empty on a second call."""
        contents, self.contents = self.contents, {}
        return contents


@dataclass(frozen=True)
class LiveLink:
    """A checkpoint's live link without its tensors, which are in Lightning's state dict.

    Attributes:
        rank: its rank.
        alpha: its update is scaled by ``alpha / rank``.
        metrics: the metrics last logged since it began.
        extras: names, in the model, of fully trained parameters and of buffers.
        outside: names, in the module, of values trained outside the model.
    """

    rank: int
    alpha: float
    metrics: dict[str, float]
    extras: list[str]
    outside: list[str]


@dataclass(frozen=True)
class CheckpointState:
    """Everything that this package stores in a checkpoint; fields with a default are absent from older ones.

    Attributes:
        module: how the module was constructed: ``class_path``, ``init_args``, ``not_plain``.
        chain: the finished links.
        live: the live link; None if the module trains without links.
        dtype: the dtype to which the precision plugin cast adapted layers.
        link_start: epoch and step at which the live link began.
        has_knots: whether the run's schedule has knots.
        seed: seed of all random draws.
        origin: path of the chain that the run began from, and the requested number of its links.
        base_weights: the base's weights, if they are stored (``save_base``).
        callback_metrics: the metrics that the Trainer last logged.
        scheduled: requested rank and alpha of each link up to the live one.
        modules_to_save: names of the fully trained modules; None: not known.
        outside: values trained outside the model, as they were before the first link.
        progress: Lightning's counters, rewound to the last complete accumulation window.
        prompt_format: the data module's prompt format for a language model; empty if there is none.
        data: which data the run is on; empty if that is not known.
    """

    module: dict[str, Any]
    chain: Chain
    live: LiveLink | None
    dtype: str | None
    link_start: FitPosition
    has_knots: bool
    seed: int
    origin: list[str | int | None]
    base_weights: dict[str, Tensor] | None
    callback_metrics: dict[str, Tensor] = field(default_factory=dict)
    scheduled: list[list[float]] = field(default_factory=list)
    modules_to_save: list[str] | None = None
    outside: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    prompt_format: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The state as plain types and tensors, which ``torch.load(weights_only=True)`` reads."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        live = None if self.live is None else dict(vars(self.live))
        written = {"chain": self.chain.state_dict(), "live": live, "link_start": list(self.link_start)}
        return {"format_version": VERSION} | plain | written

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], field: str = "checkpoint", name: str = "the checkpoint") -> Self:
        """The state stored in a Lightning checkpoint.

        Args:
            checkpoint: its contents.
            field: the name of its path in messages.
            name: its path.

        Raises:
            UserError: if the checkpoint holds no chain, or one of an unknown format version.
        """
        if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
            raise UserError(f"{field}: expected a checkpoint of a COLA module, received {name!r}, which holds no chain")
        given = dict(checkpoint[CHECKPOINT_KEY])
        version = given.pop("format_version", None)
        check_version(version, name)
        if version == 2:
            given["chain"] = _of_version_2(given["chain"])
        live = None if given["live"] is None else from_stored(LiveLink, given["live"])
        read = {"chain": Chain.from_state_dict(given["chain"], name), "live": live}
        return from_stored(cls, given | read | {"link_start": FitPosition(*given["link_start"])})


def _of_version_2(given: Mapping[str, Any]) -> dict[str, Any]:
    """A chain of version 2 as version 3 has it; to be deleted with the last checkpoint that has one."""
    return Chain([Link(**link) for link in given["links"]], from_stored(BaseIdentity, given["base"])).state_dict()


def check_arguments(arguments: Mapping[str, Any], method: str) -> None:
    """Refuses a checkpoint that lacks some of its module's constructor arguments.

    Args:
        arguments: :attr:`CheckpointState.module`.
        method: the module's method that does in Python what is refused.

    Raises:
        UserError: naming the first missing argument.
    """
    if arguments["not_plain"]:
        raise UserError(
            f"checkpoint: expected a {arguments['class_path']} made with plain arguments, received one whose "
            f"{arguments['not_plain'][0]!r} is not plain: load it in Python, and call its {method}()"
        )


def chain_of(checkpoint: Mapping[str, Any], links: int | None = None) -> Chain:
    """A checkpoint's chain: its finished links, and the live link in its current state.

    Args:
        checkpoint: its contents.
        links: the number of links, from the first; None: all.
    """
    state = CheckpointState.of(checkpoint)
    chain, live = state.chain, state.live
    if live is not None:  # None: trained without links
        weights, factors = checkpoint["state_dict"], {}
        for name in chain.base.weight_norms:
            lora_A, lora_B = (weights[f"model.{name}.lora_{factor}"] for factor in "AB")
            factors[name] = lora_A[: live.rank].contiguous(), lora_B[:, : live.rank].contiguous()
        link = Link(
            index=len(chain),
            rank=live.rank,
            alpha=live.alpha,
            start_step=state.link_start.global_step,
            end_step=int(checkpoint["global_step"]),
            factors=factors,
            extras={name: weights[f"model.{name}"] for name in live.extras},
            metrics=dict(live.metrics),
            outside={name: weights[name] for name in live.outside},
        )
        chain = Chain([*chain.links, link], chain.base)
    return chain if links is None else chain.truncate(links)


def read_chain(path: str | Path, links: int | None = None, field: str = "checkpoint") -> Chain:
    """Reads a chain without its base.

    Args:
        path: a checkpoint, whose live link becomes the chain's last; a chain folder; or the folder of a PEFT LoRA, which is one
            link.
        links: the number of links, from the first; None: all.
        field: the path's name in messages.

    Raises:
        UserError: if the path is none of these, or the files are damaged.
    """
    path = Path(os.path.expanduser(path))
    if path.is_file():
        return chain_of(OpenedCheckpoint.open(path, field).contents, links)
    if (path / JSON_NAME).is_file():
        chain = Chain.load(path)
    elif (path / CONFIG_NAME).is_file():
        chain = read_adapter(path)
        if links is not None and links < len(chain) and chain.links[-1].extras:
            what = "an adapter holds the last link's trained modules alone (model.modules_to_save)"
            log.warning("%s: %s: with %d of its %d links they begin as in the base", field, what, links, len(chain))
    else:
        what = "holds none of these" if path.is_dir() else "does not exist"
        raise UserError(
            f"{field}: expected a checkpoint, a chain folder or a PEFT adapter, received {str(path)!r}, which {what}"
        )
    return chain if links is None else chain.truncate(links)
