"""Reading and writing parameters, however they are laid out over processes, and what these tell each other.

Three layouts: replicated (one device, DDP); sharded along a dimension (DTensor, as FSDP2 makes them), where each process reads
and writes its own shard of a full tensor without communication; and FSDP1's flat shards, which are not parts of a matrix, and
are gathered while they are read or written: :func:`units`.

Everything else in the package treats a parameter as one full tensor and goes through the functions below.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

# The parts of module names that FSDP1's wrappers, and its wrappers for activation checkpointing, add.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor."""
    return isinstance(tensor, DTensor)


def is_model_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def local(parameter: Tensor) -> Tensor:
    """This process' part of the parameter, to be written in place."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def copy_(parameter: Tensor, full: Tensor) -> None:
    """Writes the full tensor into the parameter, in place, in its dtype and on its device, without communication."""
    local(parameter).copy_(local(lay_out(full, parameter)))


@torch.no_grad()
def add_(parameter: Tensor, full: Tensor) -> None:
    """Adds a full tensor to the parameter, in place, without communication."""
    local(parameter).add_(local(lay_out(full, parameter)).to(parameter.device))


@torch.no_grad()
def gather(parameter: Tensor) -> Tensor:
    """A contiguous CPU copy of the full parameter; if that is sharded, all processes must call this."""
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach().to("cpu", copy=True).contiguous()


def lay_out(full: Tensor, like: Tensor) -> Tensor:
    """The full tensor in the layout, and on the device, of another of its shape, without communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def units(root: nn.Module) -> Iterator[list[nn.Module]]:
    """Iterates over all modules, in groups; a group's own parameters may be read and written during its turn.

    One group, except under FSDP1: there one for each of its units, whose parameters are gathered and then written back.
    """
    reshard(root)
    modules = list(root.modules())
    wrappers = [module for module in modules if isinstance(module, FullyShardedDataParallel)]
    inside = [[m for m in wrapper.modules() if m is not wrapper] for wrapper in wrappers]
    owner = {id(module): k for k, group in enumerate(inside) for module in group}  # the innermost: it comes last
    yield [module for module in modules if id(module) not in owner]
    for k, (wrapper, group) in enumerate(zip(wrappers, inside, strict=True)):
        with FullyShardedDataParallel.summon_full_params(wrapper, recurse=False, writeback=True):
            yield [module for module in group if owner[id(module)] == k]


def reshard(root: nn.Module) -> None:
    """Frees FSDP2's gathered parameters, which a validation leaves in place of the shards."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def state_dict(module: nn.Module, prefix: str = "", *, keep_vars: bool = False) -> dict[str, Any]:
    """``module.state_dict()``, but without gathering by FSDP1's wrappers, and without their names.

    Sharded parameters are in it as flat shards: only replicated values are meaningful.
    """
    state: dict[str, Any] = {}
    if not has_fsdp1(module):
        module.state_dict(destination=state, prefix=prefix, keep_vars=keep_vars)
        return state
    module._save_to_state_dict(state, prefix, keep_vars)
    for name, child in module._modules.items():
        if child is not None:
            state |= state_dict(child, plain_names([f"{prefix}{name}."])[0], keep_vars=keep_vars)
    return state


def has_fsdp1(module: nn.Module) -> bool:
    """Whether FSDP1 has wrapped the module, or a part of it."""
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules())


def has_processes() -> bool:
    """Whether the process group is initialized."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_processes() -> None:
    """Leaves the process group, if there is one; gloo's threads may abort a process that does not."""
    if has_processes():
        torch.distributed.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """The value of each process, by rank; all processes must call this."""
    if not has_processes():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def n_processes() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if has_processes() else 1


def sum_over_processes(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """The sums of numbers over all processes, in float64 on the device; all of them must call this.

    Args:
        values: this process' numbers.
        device: of the process group's tensors.
    """
    sums = torch.zeros(len(values), dtype=torch.float64, device=device)
    for place, value in zip(sums, values, strict=True):
        place += value  # also for a number, without a copy from the host
    if has_processes():
        torch.distributed.all_reduce(sums)
    return sums


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over all processes, in place, with one message for each dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in group])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        means = torch.split(flat, [tensor.numel() for tensor in group])
        for tensor, mean in zip(group, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


def plain_names(names: Iterable[str]) -> list[str]:
    """Names of modules or parameters as they are without FSDP1's wrappers.

    Example:
        >>> plain_names(["layers.0._fsdp_wrapped_module.fc"])
        ['layers.0.fc']
    """
    return [re.sub("|".join(map(re.escape, WRAPPERS)), "", name) for name in names]
