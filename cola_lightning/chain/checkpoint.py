"""What a checkpoint holds of a chain: the finished links, the live one, and where the run stood.

That is megabytes where the weights would be gigabytes. This file reads checkpoints without a module, and needs no Lightning.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, BinaryIO, Self

import torch
from torch import Tensor

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.codec import CHECKPOINT, check_version
from cola_lightning.chain.link import Link
from cola_lightning.chain.schedule import Counters
from cola_lightning.errors import UserError

CHECKPOINT_KEY = "cola"  # all of ours in a checkpoint


def check_archive(file: str | Path | IO[bytes], field: str = "checkpoint", *, name: str | None = None) -> None:
    """Refuses a checkpoint whose bytes are not those that were written: torch.load itself does not look at their checksums.

    Args:
        file: the checkpoint, which is read once, from its beginning to its end.
        field: what the user calls it, for messages.
        name: of an open file; None: what it says.

    Raises:
        UserError: if a part of it is damaged or missing, or it is no file of ``torch.save``.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"its part {part!r} is damaged")
    except Exception as error:  # whatever zipfile makes of the bytes
        raise unreadable(name or (str(file) if isinstance(file, str | Path) else repr(file)), field, error) from error


def unreadable(path: str, field: str, error: Exception, advice: str = "") -> UserError:
    """The error for a file that is no checkpoint, or a damaged one."""
    reason = " ".join(str(error).split())[:120] + advice
    return UserError(f"{field}: expected a checkpoint file, received {path!r}, which cannot be read ({reason})")


def read_checkpoint(path: str | Path, field: str = "checkpoint") -> dict[str, Any]:
    """A checkpoint of a COLA module, on the CPU and mapped from the file: for looking at, and not for training on.

    Args:
        path: the file.
        field: what the user calls the path, for messages.

    Raises:
        UserError: for a path that is none, or a damaged one.
    """
    path = _existing(path, field)
    check_archive(path, field)
    return _load(path, path, field, weights_only=True)


@dataclass
class OpenedCheckpoint:
    """A checkpoint file that was opened, checked and read, for all in a command that need something of it.

    Attributes:
        path: where it is.
        file: the file itself, for another reader.
        state: all of ours in it.
        contents: what it holds; empty once it was taken.
    """

    path: Path
    file: BinaryIO
    state: "CheckpointState"
    contents: dict[str, Any]

    def take(self) -> dict[str, Any]:
        """What the file holds, for the one that loads it, which may change it; nothing when it was taken before."""
        contents, self.contents = self.contents, {}
        self.file.close()  # it may be replaced while a run goes on
        return contents


@contextmanager
def opened_checkpoint(path: str | Path, field: str = "checkpoint", *, weights_only: bool = True) -> Iterator[OpenedCheckpoint]:
    """Opens a checkpoint of a COLA module, and reads it onto the CPU.

    Args:
        path: the file.
        field: what the user calls the path, for messages.
        weights_only: False unpickles whatever the file holds, which may run code: for a file that the user trusts.

    Raises:
        UserError: for a path that is none, or a damaged one.
    """
    path = _existing(path, field)
    with path.open("rb") as file:
        check_archive(file, field, name=str(path))
        file.seek(0)
        contents = _load(file, path, field, weights_only=weights_only)
        yield OpenedCheckpoint(path, file, CheckpointState.of(contents), contents)


def _existing(path: str | Path, field: str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{field}: expected a checkpoint file, received {str(path)!r}, which {what}")
    return path


def _load(source: Path | BinaryIO, path: Path, field: str, *, weights_only: bool) -> dict[str, Any]:
    try:
        checkpoint = torch.load(source, weights_only=weights_only, map_location="cpu", mmap=isinstance(source, Path))
    except Exception as error:  # whatever torch.load makes of the bytes
        holds_objects = weights_only and isinstance(error, pickle.UnpicklingError)
        advice = "; weights_only=False reads one that holds objects, if you trust it" if holds_objects else ""
        raise unreadable(str(path), field, error, advice) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
        raise UserError(f"{field}: expected a checkpoint of a COLA module, received {str(path)!r}, which holds no chain")
    check_version(checkpoint[CHECKPOINT_KEY].get("format_version"), CHECKPOINT, str(path))
    loaded: dict[str, Any] = checkpoint
    return loaded


@dataclass(frozen=True)
class LiveLink:
    """What a checkpoint says of its live link, beside the tensors, which are in Lightning's state dict.

    Attributes:
        rank: its rank.
        alpha: its update is scaled by ``alpha / rank``.
        scheduled: rank and alpha as they were asked for.
        metrics: what was logged last since it began.
        extras: names, in the model, of what is trained whole, and of buffers.
        outside: names, in the module, of what is trained outside of the model.
    """

    rank: int
    alpha: float
    scheduled: list[float]
    metrics: dict[str, float]
    extras: list[str]
    outside: list[str] = field(default_factory=list)  # version 1 has none


@dataclass(frozen=True)
class CheckpointState:
    """All of ours in a checkpoint; what has a default here is not in version 1.

    Attributes:
        module: how the module was made: ``class_path``, ``init_args``, ``not_plain``.
        chain: the finished links.
        live: None where the module trains without links.
        dtype: to which a precision had cast adapted layers.
        link_start: epoch and step at which the live link began.
        has_knots: whether the run's schedule has any.
        seed: of all draws.
        origin: path of the chain that the run began from, and how many of its links were asked for.
        optimizer: class path of the live link's.
        has_rate_of_saved: whether what is trained whole had a learning rate of its own.
        base_weights: the base, where it is kept (``save_base``).
        callback_metrics: what the Trainer had logged last.
        scheduled: rank and alpha of each link up to the live one, as they were asked for.
        modules_to_save: names of what is trained whole; None: not known.
        outside: what is trained outside of the model, as it was before the first link.
        progress: Lightning's counters, rewound to the last whole accumulation window.
        prompt_format: how the data module prompted a language model; empty where it did not.
    """

    module: dict[str, Any]
    chain: Chain
    live: LiveLink | None
    dtype: str | None
    link_start: Counters
    has_knots: bool
    seed: int
    origin: list[str | int | None]
    optimizer: str | None
    has_rate_of_saved: bool
    base_weights: dict[str, Tensor] | None
    callback_metrics: dict[str, Tensor] = field(default_factory=dict)
    scheduled: list[list[float]] = field(default_factory=list)
    modules_to_save: list[str] | None = None
    outside: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    prompt_format: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types and tensors, which ``torch.load(weights_only=True)`` reads."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        live = None if self.live is None else dict(vars(self.live))
        written = {"chain": self.chain.state_dict(), "live": live, "link_start": list(self.link_start)}
        return {"format_version": CHECKPOINT.version} | plain | written

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Self:
        """What a checkpoint of Lightning's holds of ours.

        Raises:
            UserError: if it holds no chain, or one of another version.
        """
        if not isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
            raise UserError("checkpoint: expected one that a COLA module wrote, received one without a chain")
        given = dict(checkpoint[CHECKPOINT_KEY])
        check_version(given.pop("format_version", None), CHECKPOINT, "the checkpoint")
        live = None if given["live"] is None else LiveLink(**given["live"])
        read = {"chain": Chain.from_state_dict(given["chain"]), "live": live, "link_start": Counters(*given["link_start"])}
        return cls(**given | read)


def check_arguments(arguments: Mapping[str, Any], method: str) -> None:
    """Refuses a checkpoint that does not hold all that its module was made with.

    Args:
        arguments: how the module was made, of a checkpoint.
        method: of the module, that does in Python what is refused.

    Raises:
        UserError: naming the first argument that is missing.
    """
    if arguments["not_plain"]:
        raise UserError(
            f"checkpoint: expected a {arguments['class_path']} made with plain arguments, received one with another "
            f"{arguments['not_plain'][0]!r}: load it in Python, and call its {method}()"
        )


def chain_of(checkpoint: Mapping[str, Any], links: int | None = None) -> Chain:
    """The chain of a checkpoint: its finished links, and the live one as it stood.

    Args:
        checkpoint: as :func:`read_checkpoint` gives it.
        links: how many, from the first; None: all.
    """
    state = CheckpointState.of(checkpoint)
    chain, live = state.chain, state.live
    if live is not None:  # else trained without links
        weights, factors = checkpoint["state_dict"], {}
        for name in chain.base["weight_norms"]:
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
