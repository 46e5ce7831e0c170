"""Several processes that do together what the first one decides."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from lightning.pytorch import Trainer

from cola_lightning import layout
from cola_lightning.runs.folder import claim

T = TypeVar("T")


def join(trainer: Trainer) -> None:
    """Starts the other processes of a Trainer, or joins those that a launcher has started, before anything is decided.

    Trainers that follow use the same processes.
    """
    strategy = trainer.strategy
    if strategy.launcher is not None:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return not layout.has_processes() or torch.distributed.get_rank() == 0


def by_first(function: Callable[[], T]) -> T:
    """What the function returns in the first process, which alone calls it; an exception is raised in all of them."""
    if not layout.has_processes():
        return function()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Inside the block the first process has claimed a piece of work, see :func:`~cola_lightning.runs.folder.claim`.

    Args:
        path: the claim's file.

    Yields:
        Whether it could be claimed; in all processes.
    """
    files: list[TextIO | None] = []
    try:
        by_first(lambda: files.append(claim(path)))
        yield by_first(lambda: files[0] is not None)
    finally:
        for file in filter(None, files):
            file.close()
