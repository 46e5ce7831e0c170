"""The chain in a checkpoint: the finished links, the current link, and the state of the run.

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
from cola_lightning.chain.link import OUTSIDE, Link
from cola_lightning.chain.peft import CONFIG_NAME, read_adapter
from cola_lightning.chain.schedule import FitPosition
from cola_lightning.chain.store import JSON_NAME, VERSION, check_version, describe_link, link_fields
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)

STATE_KEY = "cola"  # in a module's state dict: all that is not a trained value, as CheckpointState.to_dict gives it


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
            contents = torch.load(file, weights_only=weights_only, map_location="cpu")
    except Exception as error:  # zipfile and torch.load may raise anything for damaged bytes
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:120]
        if weights_only and isinstance(error, pickle.UnpicklingError):
            reason += "; weights_only=False reads one that holds objects, if you trust it"
        raise UserError(
            f"{field}: expected a checkpoint file, received {name_of(source)!r}, which cannot be read ({reason})"
        ) from error
    return upgraded(contents, name_of(source))


def in_run(source: Any) -> Any:
    """The newest state of a run whose folder is given; anything else as it is."""
    last = Path(name_of(source)) / "checkpoints" / "last.ckpt"
    return last if last.is_file() else source


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
            source: its path, its run's folder, its URL, or an open file.
            field: the path's name in messages.
            weights_only: see :func:`read_archive`.

        Raises:
            UserError: if there is no such file, or it is damaged, or not a COLA module's checkpoint of a known format version.
        """
        source = in_run(source)
        contents, name = read_archive(source, field, weights_only=weights_only), name_of(source)
        given = contents.get("state_dict") if isinstance(contents, dict) else None
        state = given.get(STATE_KEY) if isinstance(given, dict) else None
        return cls(name, contents, CheckpointState.from_dict(state, field, name))

    def take(self) -> dict[str, Any]:
        """Hands the contents to the caller, which may change them; empty on a second call."""
        contents, self.contents = self.contents, {}
        return contents


@dataclass(frozen=True)
class CheckpointState:
    """The state of a module besides its trained values, with which it is in the module's state dict.

    Attributes:
        module: how the module was constructed: ``class_path``, ``init_args``, ``not_plain``.
        chain: the finished links.
        live: the current link without its tensors, see :func:`~cola_lightning.chain.store.describe_link`; None without links.
        trained: names of what else is trained, in a link's extras.
        dtype: the dtype to which the precision plugin cast adapted layers; None without links.
        link_start: epoch and step at which the current link began.
        position: the present epoch and step.
        has_knots: whether the run's schedule has knots.
        seed: seed of all random draws.
        init_chain_source: path of the chain that the run began from, and the requested number of its links.
        base_weights: the base's weights, if they are stored (``save_base``).
        first_values: values trained outside the model, as they were before the first link.
        callback_metrics: the metrics that the Trainer last logged.
        scheduled: requested rank and alpha of each link up to the live one.
        modules_to_save: names of the fully trained modules; None: not known.
        prompt_format: the data module's prompt format for a language model; empty if there is none.
        data: which data the run is on; empty if that is not known.
        n_before: how many fits had trained the module before this one.
    """

    module: dict[str, Any]
    chain: Chain
    live: dict[str, Any] | None
    trained: list[str]
    dtype: str | None
    link_start: FitPosition
    position: FitPosition
    has_knots: bool
    seed: int
    init_chain_source: list[str | int | None]
    base_weights: dict[str, Tensor] | None
    first_values: dict[str, Tensor] = field(default_factory=dict)
    callback_metrics: dict[str, Tensor] = field(default_factory=dict)
    scheduled: list[list[float]] = field(default_factory=list)
    modules_to_save: list[str] | None = None
    prompt_format: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    n_before: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The state as plain types and tensors, which ``torch.load(weights_only=True)`` reads."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        written = {"chain": self.chain.state_dict(), "link_start": list(self.link_start), "position": list(self.position)}
        return {"format_version": VERSION} | plain | written

    @classmethod
    def from_dict(cls, given: Any, field: str = "state_dict", name: str = "the state dict") -> Self:
        """The state from :meth:`to_dict`.

        Args:
            given: the value at ``STATE_KEY`` in a state dict.
            field: what holds it, for messages.
            name: its name, for messages.

        Raises:
            UserError: if it is of no known format version.
        """
        if not isinstance(given, dict):
            raise UserError(f"{field}: expected one of a COLA module, received {name!r}, which holds no chain")
        check_version(given.get("format_version"), name)
        positions = {key: FitPosition(*given[key]) for key in ("link_start", "position")}
        return from_stored(cls, given | positions | {"chain": Chain.from_state_dict(given["chain"], name)})


def upgraded(checkpoint: Any, name: str = "the checkpoint") -> Any:
    """A checkpoint of an earlier format as this release writes it; to be deleted with the last one that somebody has.

    Raises:
        UserError: for a format that no release of this package has had.
    """
    if not isinstance(checkpoint, dict) or not isinstance(given := checkpoint.get("cola"), dict):
        return checkpoint
    check_version(given.get("format_version"), name)
    state, live = {"trained": [], **given}, given["live"]
    if given["format_version"] == 2:
        links = [link | {"extras": link["extras"] | _as_extras(link.get("outside", {}))} for link in given["chain"]["links"]]
        chain = Chain([from_stored(Link, link) for link in links], from_stored(BaseIdentity, given["chain"]["base"]))
        state["chain"] = chain.state_dict()
    start, end = given["link_start"][1], checkpoint["global_step"]
    if live is not None:
        link = Link(
            len(state["chain"]["description"]["links"]), live["rank"], live["alpha"], start, end, {}, {}, live["metrics"]
        )
        state["live"] = describe_link(link)
        state["trained"] = [*live["extras"], *_as_extras(dict.fromkeys(live.get("outside", ())))]
    state["position"], state["init_chain_source"] = [checkpoint["epoch"], end], state.pop("origin")
    state["first_values"] = _as_extras(state.pop("outside", {}))
    callbacks = {"FitCallback": {"progress": progress}} if (progress := state.pop("progress", {})) else {}
    own = {name: part for name, part in checkpoint.items() if name != "cola"}
    if "callbacks" in own:
        own["callbacks"] = own["callbacks"] | callbacks
    return own | {"state_dict": checkpoint["state_dict"] | {STATE_KEY: state}}


def _as_extras(outside: Mapping[str, Any]) -> dict[str, Any]:
    return {OUTSIDE + name: value for name, value in outside.items()}


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


def chain_of(state_dict: Mapping[str, Any], state: CheckpointState, links: int | None = None) -> Chain:
    """The chain in a module's state dict: its finished links, and the current link in its current state.

    Args:
        state_dict: the state dict.
        state: its decoded state.
        links: the number of links, from the first; None: all.
    """
    chain, live = state.chain, state.live
    if live is not None:  # None: trained without links
        factors, rank = {}, live["rank"]
        for name in chain.base.weight_norms:
            lora_A, lora_B = (state_dict[f"model.{name}.lora_{factor}"] for factor in "AB")
            factors[name] = lora_A[..., :rank, :].contiguous(), lora_B[..., :rank].contiguous()
        extras = {
            name: state_dict[name.removeprefix(OUTSIDE) if name.startswith(OUTSIDE) else f"model.{name}"]
            for name in state.trained
        }
        chain = Chain([*chain.links, Link(**link_fields(live), factors=factors, extras=extras)], chain.base)
    return chain if links is None else chain.truncate(links)


def read_chain(path: str | Path, links: int | None = None, field: str = "checkpoint") -> Chain:
    """Reads a chain without its base.

    Args:
        path: a checkpoint or a run's folder, whose current link becomes the chain's last; a chain folder; or the folder of a
            PEFT LoRA, which is one link.
        links: the number of links, from the first; None: all.
        field: the path's name in messages.

    Raises:
        UserError: if the path is none of these, or the files are damaged.
    """
    path = Path(os.path.expanduser(in_run(path)))
    if path.is_file():
        opened = OpenedCheckpoint.open(path, field)
        return chain_of(opened.contents["state_dict"], opened.state, links)
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
            f"{field}: expected a run's folder, a checkpoint, a chain folder or a PEFT adapter, received {str(path)!r}, which "
            f"{what}"
        )
    return chain if links is None else chain.truncate(links)
