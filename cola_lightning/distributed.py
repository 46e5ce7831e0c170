"""Reading and writing parameters, however they are laid out over processes.

Everything else in the package treats a parameter as one full tensor and goes through the functions below. Today they know
plain tensors (one process, or DDP, where each process holds all of them); DTensor (FSDP2) and FSDP1's flat parameters are
refused in one place, :func:`require_plain`, which is where they will be taught.
"""

import hashlib
import secrets

import torch
from torch import Tensor, nn

from cola_lightning.errors import UserError


def require_plain(parameter: Tensor) -> None:
    """Refuses a parameter of which this process holds only a part.

    Raises:
        UserError: if the parameter is sharded.
    """
    is_sharded = type(parameter) not in (Tensor, nn.Parameter)
    if is_sharded:
        raise UserError(
            "trainer.strategy: expected a strategy that keeps whole parameters (one device, ddp), "
            f"received a sharded parameter of type {type(parameter).__name__}"
        )


@torch.no_grad()
def copy_(parameter: Tensor, full: Tensor) -> None:
    """Writes the full tensor into the parameter, in place, in the parameter's dtype and on its device."""
    require_plain(parameter)
    parameter.copy_(full)


@torch.no_grad()
def add_(parameter: Tensor, delta: Tensor) -> None:
    """Adds a full tensor of the same shape to the parameter, in place."""
    require_plain(parameter)
    parameter.add_(delta.to(parameter.device))


@torch.no_grad()
def gather(parameter: Tensor) -> Tensor:
    """A contiguous CPU copy of the full parameter."""
    require_plain(parameter)
    return parameter.detach().to("cpu", copy=True).contiguous()


def derive_seed(*parts: object) -> int:
    """A seed for torch's generators that depends on the parts alone: equal on every process, whatever else was drawn.

    Example:
        >>> derive_seed(0, 1, "fc") == derive_seed(0, 1, "fc") != derive_seed(0, 2, "fc")
        True
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_seed() -> int:
    """A seed that rank 0 draws, not from torch's generators, and every process receives."""
    drawn: list[int] = [secrets.randbits(31)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(drawn, src=0)
    return drawn[0]
