"""The checkpoint that is about to be loaded, for the module that is being made.

Lightning passes a checkpoint to a module only after the model is made.
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
        opened: its file and contents.
        links: how many of its links to load, the finished ones first and then the live one; None: all.
    """

    opened: OpenedCheckpoint
    links: int | None

    @property
    def holds_base(self) -> bool:
        """Whether it contains the base's weights (``save_base``)."""
        return self.opened.state.base_weights is not None


_PENDING: ContextVar[PendingCheckpoint | None] = ContextVar("pending", default=None)


def pending_checkpoint() -> PendingCheckpoint | None:
    """The checkpoint that is about to be loaded into the module that is being made; None if there is none."""
    return _PENDING.get()


@contextmanager
def loading(opened: OpenedCheckpoint, links: int | None = None) -> Iterator[None]:
    """Announces a checkpoint to modules made inside the block, into which it is about to be loaded.

    Args:
        opened: the checkpoint.
        links: how many of its links to load, the finished ones first and then the live one; None: all.
    """
    token = _PENDING.set(PendingCheckpoint(opened, links))
    try:
        yield
    finally:
        _PENDING.reset(token)


@contextmanager
def base_from_checkpoint(path: str | Path, links: int | None = None, *, weights_only: bool = True) -> Iterator[None]:
    """Announces a checkpoint to modules made inside the block, into which it is about to be loaded.

    If it contains its base (``save_base``), ``build_model`` need not make the base's weights: see
    :attr:`~cola_lightning.modules.COLAModule.is_base_in_checkpoint`.

    Args:
        path: the checkpoint.
        links: how many of its links to load, the finished ones first and then the live one; None: all.
        weights_only: False unpickles any object in the file, which may run code: only for a trusted file.

    Raises:
        UserError: for a path that is not a checkpoint.
    """
    with opened_checkpoint(path, "ckpt_path", weights_only=weights_only) as opened, loading(opened, links):
        yield
