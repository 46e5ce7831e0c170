"""Communication between the processes of a run."""

import secrets
from typing import Any

import torch


def gather_objects(value: Any) -> list[Any]:
    """The value of each process, by rank; all processes must call this."""
    if not has_processes():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def leave() -> None:
    """Leaves the process group, if there is one; gloo's threads may abort a process that does not."""
    if has_processes():
        torch.distributed.destroy_process_group()


def has_processes() -> bool:
    """Whether the process group is initialized."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def draw_seed() -> int:
    """A seed that rank 0 draws, not from torch's generators, and every process receives."""
    seed: int = gather_objects(secrets.randbits(31))[0]
    return seed
