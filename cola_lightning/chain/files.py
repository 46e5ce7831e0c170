"""Chains wherever they lie: in a checkpoint, in a folder of their own, or in a PEFT adapter."""

from pathlib import Path

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.checkpoint import chain_of, read_checkpoint
from cola_lightning.chain.folder import JSON_NAME
from cola_lightning.chain.peft import CONFIG_NAME, read_adapter
from cola_lightning.errors import UserError


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
        return chain_of(read_checkpoint(path, field), links)
    if (path / JSON_NAME).is_file():
        chain = Chain.load(path)
    elif (path / CONFIG_NAME).is_file():
        chain = read_adapter(path)
    else:
        what = "holds none of these" if path.is_dir() else "does not exist"
        raise UserError(
            f"{field}: expected a checkpoint, a chain folder or a PEFT adapter, received {str(path)!r}, which {what}"
        )
    return chain if links is None else chain.truncate(links)
