"""Chains wherever they lie: in a checkpoint, in a folder of their own, or in a PEFT adapter."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from cola_lightning.adapter import CONFIG_NAME, read_adapter
from cola_lightning.chain import Chain, Link
from cola_lightning.chain_folder import JSON_NAME, check_version
from cola_lightning.errors import UserError

CHECKPOINT_KEY = "cola"  # all of ours in a checkpoint


def read_chain(path: str | Path, links: int | None = None, field: str = "checkpoint") -> Chain:
    """Reads a chain without its base.

    Args:
        path: a checkpoint, whose live link then is the chain's last; a chain folder; or the folder of a PEFT LoRA, which is one
            link.
        links: how many, from the first; None: all.
        field: what the user calls the path, for messages.

    Raises:
        UserError: for a path that is none of these, and for files that are damaged.
    """
    path = Path(path).expanduser()
    if path.is_file():
        chain = chain_of(read_checkpoint(path, field))
    elif (path / JSON_NAME).is_file():
        chain = Chain.load(path)
    elif (path / CONFIG_NAME).is_file():
        chain = read_adapter(path)
    else:
        what = "holds none of these" if path.is_dir() else "does not exist"
        raise UserError(
            f"{field}: expected a checkpoint, a chain folder or a PEFT adapter, received {str(path)!r}, which {what}"
        )
    return chain if links is None else chain.truncate(links)


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


def read_checkpoint(
    path: str | Path, field: str = "checkpoint", *, is_checked: bool = True, weights_only: bool = True
) -> dict[str, Any]:
    """A checkpoint of a COLA module, on the CPU and mapped from the file where it can be.

    Args:
        path: the file.
        field: what the user calls the path, for messages.
        is_checked: look for damage, which reads all of it; not needed where it is about to be loaded, which does that.
        weights_only: False unpickles whatever the file holds, which may run code: for a file that the user trusts.

    Raises:
        UserError: for a path that is none, or a damaged one.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{field}: expected a checkpoint file, received {str(path)!r}, which {what}")
    if is_checked:
        check_archive(path, field)
    try:
        checkpoint = torch.load(path, weights_only=weights_only, map_location="cpu", mmap=True)
    except Exception as error:  # whatever torch.load makes of the bytes
        holds_objects = weights_only and isinstance(error, pickle.UnpicklingError)
        advice = "; weights_only=False reads one that holds objects, if you trust it" if holds_objects else ""
        raise unreadable(str(path), field, error, advice) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
        raise UserError(f"{field}: expected a checkpoint of a COLA module, received {str(path)!r}, which holds no chain")
    check_version(checkpoint[CHECKPOINT_KEY].get("format_version"), str(path))
    loaded: dict[str, Any] = checkpoint
    return loaded


def chain_of(checkpoint: Mapping[str, Any]) -> Chain:
    """The chain of a checkpoint: its finished links, and the live one as it stood."""
    state = checkpoint[CHECKPOINT_KEY]
    chain, live = Chain.from_state_dict(state["chain"]), state["live"]
    if live is None:  # trained without links
        return chain
    weights = checkpoint["state_dict"]
    rank, factors = int(live["rank"]), {}
    for name in chain.base["weight_norms"]:
        lora_A, lora_B = (weights[f"model.{name}.lora_{factor}"] for factor in "AB")
        factors[name] = lora_A[:rank].contiguous(), lora_B[:, :rank].contiguous()
    link = Link(
        index=len(chain),
        rank=rank,
        alpha=float(live["alpha"]),
        start_step=int(state["link_start"][1]),
        end_step=int(checkpoint["global_step"]),
        factors=factors,
        extras={name: weights[f"model.{name}"] for name in live["extras"]},
        metrics=dict(live["metrics"]),
        outside={name: weights[name] for name in live.get("outside", ())},
    )
    return Chain([*chain.links, link], chain.base)
