"""Copies and casts of whole models."""

import copy
import ctypes
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def deep_copy(
    model: nn.Module,
    memo: dict[int, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A deep copy of a model, each of whose tensors is copied directly to its new device and dtype; no gradients.

    Also if a forward pass has left results in its attributes (an auxiliary loss, say): these are copied without their graph.

    Args:
        model: the model.
        memo: by ``id``, what is copied already, see ``copy.deepcopy``; it is added to.
        device: where the copies are; None: where the tensors are.
        dtype: of floating-point tensors; None: their own.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in _parts(vars(module)):
            if not isinstance(value, Tensor) or id(value) in memo:
                continue
            if type(value) in (Tensor, nn.Parameter) or not value.is_leaf:
                to = dtype if dtype is not None and value.is_floating_point() else value.dtype
                copied = value.detach().to(value.device if device is None else device, to, copy=True)
                memo[id(value)] = nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
            elif device is not None and isinstance(value, nn.Parameter):  # one in 4 bits, for example, copies itself
                memo[id(value)] = copy.deepcopy(value).to(device)
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


def free(model: nn.Module) -> None:
    """Frees the memory of a model that is not needed any more, whoever still refers to it.

    glibc keeps what is freed for later tensors of that size; a model that is then loaded from a file does not use it.
    """
    model.to("meta")
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
