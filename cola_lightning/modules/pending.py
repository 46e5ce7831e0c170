"""The checkpoint that is about to be loaded: what a module that is being made knows of it.

Lightning tells a module of its checkpoint only after the model is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from cola_lightning.chain.checkpoint import OpenedCheckpoint, opened_checkpoint


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is about to be loaded.

    Attributes:
        opened: its file, and what that holds.
        links: how many of its links are wanted, the finished ones first and then the live one; None: all.
    """

    opened: OpenedCheckpoint
    links: int | None

    @property
    def holds_base(self) -> bool:
        """Whether the base's weights are in it (``save_base``)."""
        return self.opened.state.base_weights is not None


_PENDING: ContextVar[PendingCheckpoint | None] = ContextVar("pending", default=None)


def pending_checkpoint() -> PendingCheckpoint | None:
    """The checkpoint that is about to be loaded into the module that is being made; None where there is none."""
    return _PENDING.get()


@contextmanager
def loading(opened: OpenedCheckpoint, links: int | None = None) -> Iterator[None]:
    """Has modules that are made inside the block know that a checkpoint is about to be loaded into them.

    Args:
        opened: it.
        links: how many of its links are wanted, the finished ones first and then the live one; None: all.
    """
    token = _PENDING.set(PendingCheckpoint(opened, links))
    try:
        yield
    finally:
        _PENDING.reset(token)


@contextmanager
def base_from_checkpoint(path: str | Path, links: int | None = None, *, weights_only: bool = True) -> Iterator[None]:
    """Tells modules that are made inside the block that a checkpoint is about to be loaded into them.

    If it holds its base (``save_base``), ``build_model`` need not make the base's weights: see
    :attr:`~cola_lightning.modules.COLAModule.is_base_in_checkpoint`.

    Args:
        path: the checkpoint.
        links: how many of its links are wanted, the finished ones first and then the live one; None: all.
        weights_only: False unpickles whatever the file holds, which may run code: for a file that the user trusts.

    Raises:
        UserError: for a path that is no checkpoint.
    """
    with opened_checkpoint(path, "ckpt_path", weights_only=weights_only) as opened, loading(opened, links):
        yield
