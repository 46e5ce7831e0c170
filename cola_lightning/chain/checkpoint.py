"""The chain in a checkpoint: the finished links, the live link, and the state of the run.

These are megabytes where the weights would be gigabytes. This file reads checkpoints without a module or Lightning.
"""

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.codec import CHECKPOINT, check_version
from cola_lightning.chain.link import Link
from cola_lightning.chain.schedule import FitPosition
from cola_lightning.errors import UserError

CHECKPOINT_KEY = "cola"  # holds everything that this package adds to a checkpoint


def read_archive(file: BinaryIO, name: str, field: str = "checkpoint", *, weights_only: bool = True) -> Any:
    """Reads onto the CPU what ``torch.save`` wrote, with the checksums verified, which ``torch.load`` does not do.

    Args:
        file: the open file.
        name: its path, for messages.
        field: the path's name in messages.
        weights_only: False unpickles whatever the file holds, which may run code: for a file that the user trusts.

    Raises:
        UserError: if the file is damaged, or ``torch.save`` did not write it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"its part {part!r} is damaged")
        file.seek(0)
        return torch.load(file, weights_only=weights_only, map_location="cpu")
    except Exception as error:  # zipfile and torch.load may raise anything for damaged bytes
        holds_objects = weights_only and isinstance(error, pickle.UnpicklingError)
        advice = "; weights_only=False reads one that holds objects, if you trust it" if holds_objects else ""
        raise _unreadable(field, name, " ".join(str(error).split())[:120] + advice) from error


def _unreadable(field: str, name: str, reason: str | None) -> UserError:
    return UserError(f"{field}: expected a checkpoint file, received {name!r}, which cannot be read ({reason})")


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
    def open(
        cls, source: str | Path | BinaryIO, field: str = "checkpoint", *, name: str | None = None, weights_only: bool = True
    ) -> Self:
        """Opens the checkpoint of a COLA module, and reads it.

        Args:
            source: the path, or an open file.
            field: the path's name in messages.
            name: the path of an open file.
            weights_only: see :func:`read_archive`.

        Raises:
            UserError: if there is no such file, or it is damaged, or not a COLA module's checkpoint of a known format version.
        """
        if isinstance(source, str | Path):
            path = os.path.expanduser(source)  # pathlib's fails for a name that begins with ~
            try:
                with open(path, "rb") as file:
                    return cls.open(file, field, name=path, weights_only=weights_only)
            except OSError as error:
                raise _unreadable(field, path, error.strerror) from error
        name = name or str(getattr(source, "name", source))
        contents = read_archive(source, name, field, weights_only=weights_only)
        if not isinstance(contents, dict) or not isinstance(contents.get(CHECKPOINT_KEY), dict):
            raise UserError(f"{field}: expected a checkpoint of a COLA module, received {name!r}, which holds no chain")
        check_version(contents[CHECKPOINT_KEY].get("format_version"), CHECKPOINT, name)
        return cls(name, contents, CheckpointState.of(contents))

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
        scheduled: the requested rank and alpha.
        metrics: the metrics last logged since it began.
        extras: names, in the model, of fully trained parameters and of buffers.
        outside: names, in the module, of values trained outside the model.
    """

    rank: int
    alpha: float
    scheduled: list[float]
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
        optimizer: class path of the live link's optimizer.
        has_rate_of_saved: whether fully trained modules had a separate learning rate.
        base_weights: the base's weights, if they are stored (``save_base``).
        callback_metrics: the metrics that the Trainer last logged.
        scheduled: requested rank and alpha of each link up to the live one.
        modules_to_save: names of the fully trained modules; None: not known.
        outside: values trained outside the model, as they were before the first link.
        progress: Lightning's counters, rewound to the last complete accumulation window.
        prompt_format: the data module's prompt format for a language model; empty if there is none.
        trained_factors: which factors of a link are trained, whoever chose them; None: not known.
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
    optimizer: str | None
    has_rate_of_saved: bool
    base_weights: dict[str, Tensor] | None
    callback_metrics: dict[str, Tensor] = field(default_factory=dict)
    scheduled: list[list[float]] = field(default_factory=list)
    modules_to_save: list[str] | None = None
    outside: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    prompt_format: dict[str, Any] = field(default_factory=dict)
    trained_factors: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The state as plain types and tensors, which ``torch.load(weights_only=True)`` reads."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        live = None if self.live is None else dict(vars(self.live))
        written = {"chain": self.chain.state_dict(), "live": live, "link_start": list(self.link_start)}
        return {"format_version": CHECKPOINT.version} | plain | written

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Self:
        """The state stored in a Lightning checkpoint.

        Raises:
            UserError: if the checkpoint holds no chain, or one of an unknown format version.
        """
        if not isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
            raise UserError("checkpoint: expected one that a COLA module wrote, received one without a chain")
        given = dict(checkpoint[CHECKPOINT_KEY])
        check_version(given.pop("format_version", None), CHECKPOINT, "the checkpoint")
        live = None if given["live"] is None else LiveLink(**given["live"])
        read = {"chain": Chain.from_state_dict(given["chain"]), "live": live, "link_start": FitPosition(*given["link_start"])}
        return cls(**given | read)


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
