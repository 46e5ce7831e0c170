"""The processes of a run: what one has to know of the others."""

import secrets
from typing import Any

import torch


def gather_objects(value: Any) -> list[Any]:
    """The value that each process has, in their order; all of them must ask."""
    if not has_processes():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def leave() -> None:
    """Ends this process' part in what several do together; gloo's threads may abort a process that does not."""
    if has_processes():
        torch.distributed.destroy_process_group()


def has_processes() -> bool:
    """Whether this process knows the others of its run, if there are any."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def draw_seed() -> int:
    """A seed that rank 0 draws, not from torch's generators, and every process receives."""
    drawn: list[int] = [secrets.randbits(31)]
    if has_processes():
        torch.distributed.broadcast_object_list(drawn, src=0)
    return drawn[0]
