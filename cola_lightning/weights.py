"""A model's parameters and buffers, with or without links: copied, cast, read and written."""

import copy
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.errors import UserError
from cola_lightning.lora.inject import names_of_factors
from cola_lightning.sharded import tensors


def deep_copy(model: nn.Module, *, is_on_cpu: bool = False) -> Any:
    """A deep copy of a model, also if a forward pass has left results in its attributes: these are copied without their graph.

    (Torch refuses to copy such a tensor: an auxiliary loss, say, or the weight of an old-style weight norm.)

    Args:
        model: the model.
        is_on_cpu: copy tensors to the CPU, one by one, and not first on their device; no gradients.
    """
    memo = {}
    for module in model.modules():
        for value in _parts(vars(module)):
            if is_on_cpu and type(value) in (Tensor, nn.Parameter):  # others, in 4 bits for example, copy themselves
                copied = value.detach().to("cpu", copy=True)
                memo[id(value)] = nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _parts(value: Any) -> Iterator[Any]:
    """What dicts, lists and tuples hold, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def cast_floats(model: nn.Module, dtype: torch.dtype, *, half_only: bool = False) -> None:
    """Casts a model's floating-point tensors in place, and no complex ones: ``nn.Module.to`` drops their imaginary part.

    Args:
        model: the model.
        dtype: a floating-point one.
        half_only: whether tensors in float32 and float64 stay as they are.
    """

    def cast(tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and not (half_only and tensor.dtype.itemsize >= 4)
        return tensor.to(dtype) if is_cast else tensor

    model._apply(cast)  # type: ignore[no-untyped-call]


def base_values(model: nn.Module, without: Set[str] = frozenset()) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers by name, without its links and the names in ``without``."""
    state, factors = tensors.state_dict(model), names_of_factors(model)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and name not in factors and without.isdisjoint({name, weight_of(name)})
    }


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """CPU copies of the :func:`base_values`."""
    return {name: tensors.gather(value) for name, value in base_values(model).items()}


def weight_of(name: str) -> str:
    """The weight to which an entry of a state dict belongs, such as a 4-bit weight's scales (``fc.weight.absmax``)."""
    return re.sub(r"\.weight\..*", ".weight", name)


def load_extras(values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Writes a chain's values of fully trained parameters and buffers into the present ones.

    Raises:
        UserError: for a value without a counterpart of its shape, and for two values of a parameter that has two names.
    """
    first: dict[Any, str] = {}
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(
                "model.init_chain: expected values for what is fully trained here (model.modules_to_save), received "
                f"{name!r} of shape {tuple(value.shape)}"
            )
        place = tensors.local(own[name])
        other = first.setdefault((place.data_ptr(), place.shape, place.stride()), name) if place.numel() else name
        if other != name and not torch.equal(value.to(place.dtype), values[other].to(place.dtype)):  # peft trains each alone
            raise UserError(
                f"model.init_chain: expected one value for {other!r} and {name!r}, which are tied here, received two"
            )
    for name, value in values.items():
        tensors.copy_(own[name], value)
