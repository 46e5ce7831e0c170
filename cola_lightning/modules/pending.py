"""What a module that is being made knows of the checkpoint that is about to be loaded into it.

Lightning tells a module of its checkpoint only after the model is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from cola_lightning.chain.checkpoint import CHECKPOINT_KEY, read_checkpoint


@dataclass(frozen=True)
class Reading:
    """What is known of a checkpoint before it is loaded."""

    seed: int | None
    holds_base: bool
    links: int | None
    modules_to_save: list[str] | None  # None: an earlier release wrote it, which did not say


READING: ContextVar[Reading | None] = ContextVar("reading", default=None)


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
    state = read_checkpoint(path, "ckpt_path", is_checked=False, weights_only=weights_only)[CHECKPOINT_KEY]
    token = READING.set(Reading(state["seed"], state["base_weights"] is not None, links, state.get("modules_to_save")))
    try:
        yield
    finally:
        READING.reset(token)


def is_reading_checkpoint() -> bool:
    """Whether a checkpoint is about to be loaded into the module that is being made."""
    return READING.get() is not None


def seed_of_checkpoint() -> int | None:
    """The seed of the checkpoint that is about to be loaded; None where there is none."""
    reading = READING.get()
    return None if reading is None else reading.seed
