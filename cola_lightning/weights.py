"""Copies and casts of whole models."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


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
            if is_on_cpu and type(value) in (Tensor, nn.Parameter):
                copied = value.detach().to("cpu", copy=True)
                memo[id(value)] = nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
            elif is_on_cpu and isinstance(value, nn.Parameter):  # one in 4 bits, for example, copies itself, on its device
                memo[id(value)] = copy.deepcopy(value).cpu()
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
