"""The chain in a checkpoint: the finished links, the current link, and the state of the run.

These are megabytes where the weights would be gigabytes. This file reads checkpoints, and other files that hold a chain,
without a module or Lightning.
"""

import io
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cola_lightning.chain.chain import JSON_NAME, METADATA, OUTSIDE, Chain, Link, link_fields, unpack
from cola_lightning.chain.facts import Records, StoredFacts
from cola_lightning.chain.peft import CONFIG_NAME, read_adapter
from cola_lightning.chain.sources import Source, join, sources_of
from cola_lightning.errors import UserError, nearest_path

log = logging.getLogger(__name__)
STATE_PREFIX = "chain."  # begins the names in a module's state dict of all that is not a trained value, see StoredState


def read_archive(source: Any, field: str = "checkpoint", *, weights_only: bool = True) -> Any:
    """Reads onto the CPU what ``torch.save`` wrote, with the checksums verified, which ``torch.load`` does not do.

    Args:
        source: its path, its URL, or an open file.
        field: the path's name in messages.
        weights_only: False unpickles whatever the file holds, which may run code: for a file that the user trusts.

    Raises:
        UserError: if there is no such file, or it is damaged, or ``torch.save`` did not write it.
    """
    import fsspec

    is_named = isinstance(source, str | PathLike)
    try:
        with fsspec.open(os.path.expanduser(source), "rb") if is_named else nullcontext(source) as opened:
            # A server may send only whole files, in which nobody can seek.
            file = io.BytesIO(opened.read()) if is_named and "://" in str(source) else opened
            with zipfile.ZipFile(file) as archive:
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"its part {part!r} is damaged")
            file.seek(0)
            contents = torch.load(file, weights_only=weights_only, map_location="cpu")
    except Exception as error:  # zipfile and torch.load may raise anything for damaged bytes
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:120]
        if weights_only and isinstance(error, pickle.UnpicklingError):
            reason += "; weights_only=False reads one that holds objects, if you trust it"
        near = nearest_path(name_of(source)) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{field}: {name_of(source)!r} cannot be read as a checkpoint ({reason}){near}") from error
    return contents


def last_checkpoint_of(source: Any) -> Any:
    """The newest state of a run whose folder is given; anything else as it is."""
    last = Path(name_of(source)) / "checkpoints" / "last.ckpt"
    return last if last.is_file() else source


def name_of(source: Any) -> str:
    """The path of a file, open or not, for messages and comparisons."""
    return os.path.expanduser(str(source if isinstance(source, str | PathLike) else getattr(source, "name", source)))


@dataclass(frozen=True)
class StoredState:
    """What a module's state dict holds besides the values that training changes.

    Attributes:
        chain: the finished links.
        live: the current link; None: trained without links. It has the layers and values that the state dict has.
        facts: all else.
    """

    chain: Chain
    live: Link | None
    facts: StoredFacts

    @classmethod
    def of(
        cls, state_dict: Mapping[str, Any], name: str = "the state dict", field: str = "state_dict", prefix: str = ""
    ) -> Self:
        """The state in a module's state dict.

        Args:
            state_dict: the state dict.
            name: its name, for messages.
            field: what holds it, for messages.
            prefix: begins the module's names.

        Raises:
            UserError: if it holds none, or one of no known format version.
        """
        start = prefix + STATE_PREFIX
        packed = {key.removeprefix(start): value for key, value in state_dict.items() if str(key).startswith(start)}
        if not isinstance(packed.get(METADATA), Tensor):
            raise UserError(f"{field}: {name!r} contains no chain. Was it written by another package?")
        chain, stored = unpack(packed, name)
        facts = StoredFacts.of(stored)
        if facts.live is None:
            return cls(chain, None, facts)
        steps = {"start_step": facts.start.global_step, "end_step": facts.position.global_step}
        fields = link_fields({**facts.live, **steps})
        return cls(chain, _live_link(state_dict, prefix, fields, chain.base.weight_norms, facts.extras), facts)

    @property
    def names(self) -> list[str | None]:
        """The name of each link's stage, the current link's last."""
        return [*(link.name for link in self.chain.links), None if self.live is None else self.live.name]

    def all_links(self, links: int | str | None = None) -> Chain:
        """The finished links and then the current one.

        Args:
            links: how many links, from the first, or the name of the last stage; None: all.

        Raises:
            UserError: if there are fewer.
        """
        chain = Chain([*self.chain.links, *([] if self.live is None else [self.live])], self.chain.base)
        return chain if links is None else chain.truncate(links)


def _live_link(
    state_dict: Mapping[str, Any], prefix: str, fields: dict[str, Any], layers: Iterable[str], extras: Iterable[str]
) -> Link:
    """The current link in a module's state dict, where its values have their names in the module.

    Args:
        state_dict: the state dict.
        prefix: begins the module's names.
        fields: the link's fields, except its tensors.
        layers: the names of the adapted layers.
        extras: the names of what else the link records.
    """
    factors, link = {}, Link(**fields, factors={})
    for name in layers:
        lora_A, lora_B = (state_dict.get(f"{prefix}model.{name}.lora_{factor}") for factor in "AB")
        if lora_A is not None and lora_B is not None:
            rank, _ = link.size_of(name)
            factors[name] = lora_A[..., :rank, :].contiguous(), lora_B[..., :rank].contiguous()
    names = {name: prefix + (name.removeprefix(OUTSIDE) if name.startswith(OUTSIDE) else f"model.{name}") for name in extras}
    extras = {name: state_dict[key] for name, key in names.items() if key in state_dict}
    return replace(link, factors=factors, extras=extras)


@dataclass
class OpenedCheckpoint:
    """A checkpoint file that was opened, checked and read once, shared by the parts of a command.

    Attributes:
        path: its path.
        contents: the whole checkpoint, on the CPU; empty after :meth:`take`.
        state: what this package stored in it.
    """

    path: str
    contents: dict[str, Any]
    state: StoredState

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
        source = last_checkpoint_of(source)
        name = name_of(source)
        if os.path.isdir(name):
            raise UserError(f"{field}: {name!r} has no checkpoints/last.ckpt. Pass a run's folder or a checkpoint")
        contents = read_archive(source, field, weights_only=weights_only)
        state_dict = contents.get("state_dict") if isinstance(contents, dict) else None
        return cls(name, contents, StoredState.of(state_dict if isinstance(state_dict, dict) else {}, name, field))

    def take(self) -> dict[str, Any]:
        """Hands the contents to the caller, which may change them; empty on a second call."""
        contents, self.contents = self.contents, {}
        return contents


def read_chain(
    source: str | Path | Sequence[str | Path | Source],
    links: int | str | None = None,
    field: str = "checkpoint",
    continues: Collection[str] = (),
) -> Chain:
    """Reads a chain without its base; see :func:`read_chain_and_held_out`."""
    return read_chain_and_held_out(source, links, field, continues)[0]


def read_chain_and_held_out(
    source: str | Path | Sequence[str | Path | Source],
    links: int | str | None = None,
    field: str = "checkpoint",
    continues: Collection[str] = (),
) -> tuple[Chain, Records]:
    """Reads a chain without its base, and which rows the runs that trained it held out; None among them: unknown.

    Args:
        source: a checkpoint or a run's folder, whose current link becomes the chain's last; a chain folder; or the folder of a
            PEFT LoRA, which is one link. Several of them, in order, are joined; each may have a name: ``sft=out/sft``.
        links: the number of links, from the first, or the name of the last stage; None: all.
        field: the source's name in messages.
        continues: see :func:`cola_lightning.chain.sources.join`.

    Raises:
        UserError: if the path is none of these, or the files are damaged.
    """
    sources = sources_of(source)
    chains, held_out = zip(*(_read_one(source.path, field) for source in sources), strict=True)
    chain = join([*zip(sources, chains, strict=True)], continues, field)
    return chain if links is None else chain.truncate(links), [run for runs in held_out for run in runs]


def _read_one(source: str, field: str) -> tuple[Chain, Records]:
    path = Path(os.path.expanduser(last_checkpoint_of(source)))
    held_out: Records = [None]
    if path.is_file():
        state = OpenedCheckpoint.open(path, field).state
        chain, held_out = state.all_links(), state.facts.held_out
    elif (path / JSON_NAME).is_file():
        chain = Chain.load(path)
    elif (path / CONFIG_NAME).is_file():
        chain = read_adapter(path)
    else:
        what = "is no run's folder, checkpoint, chain folder or PEFT adapter" if path.is_dir() else "does not exist"
        inside = sorted(path.glob(f"*/{CONFIG_NAME}"), key=lambda config: config.stat().st_mtime)
        what += f", but {str(inside[-1].parent)!r} is" if inside else ""
        raise UserError(f"{field}: {str(path)!r} {what}{nearest_path(path)}")
    if (name := _not_finite(chain)) is not None:
        raise UserError(f"{field}: {str(path)!r} contains NaN or infinite values (in {name!r})")
    return chain, held_out


def _not_finite(chain: Chain) -> str | None:
    """The first layer, or other trained value, with a value from which no model could be made; None: there is none."""
    for link in chain.links:
        for name, pair in link.factors.items():
            if not math.isfinite(link.scaling_of(name)) or not all(torch.isfinite(factor).all() for factor in pair):
                return name
        for name, value in link.extras.items():
            if torch.isnan(value).any():  # a buffer, such as a mask, may be infinite
                return name
    return None
