"""Reads a chain from a checkpoint, a chain folder or a PEFT adapter."""

import logging
import os
from pathlib import Path

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.checkpoint import OpenedCheckpoint, chain_of
from cola_lightning.chain.folder import JSON_NAME
from cola_lightning.chain.peft import CONFIG_NAME, read_adapter
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)


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
