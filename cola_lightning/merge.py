"""Merging: an adapted model becomes a plain one, layer by layer, so that no more is in memory than the result and one layer.

Copies and casts of whole models are also here.
"""

import copy
import ctypes
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.chain.chain import Link
from cola_lightning.lora.inject import begin_merging, restore_
from cola_lightning.lora.layer import LoRALayer, lora_layers
from cola_lightning.lora.quantization import dequantize_model


def merge(
    model: nn.Module,
    links: Sequence[Link],
    compute_dtype: torch.dtype,
    *,
    compute_device: torch.device,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    in_place: bool,
) -> nn.Module:
    """A plain model: an adapted one with links merged into its weights, and without its current link and its stacks.

    Args:
        model: the adapted model.
        links: what is added to the weights, in this order.
        compute_dtype: the dtype in which it is added.
        compute_device: where the products are computed: the training's device gives equal bits.
        dtype: of the result's floating-point tensors; None: as they are, and of merged weights ``compute_dtype``.
        device: of the result; None: the model's.
        in_place: make the model itself the result, instead of a copy.
    """
    memo = dict[int, Any]()
    for name, layer in lora_layers(model).items():
        merged = layer if in_place else deep_copy(layer, memo)
        begin_merging(merged, compute_dtype)
        add_links(name, merged, links, compute_device)
        _place(merged.strip_(), dtype, device)
    if not in_place:
        model = deep_copy(model, memo, device=device, dtype=dtype)
    dequantize_model(model, compute_dtype if dtype is None else dtype)
    restore_(model)
    return _place(model, dtype, device)


def add_links(name: str, layer: LoRALayer, links: Sequence[Link], device: torch.device | str) -> None:
    """Applies finished links to a layer, as their knots did: merged into its weight, or stacked.

    Args:
        name: the layer's, in the links.
        layer: the layer.
        links: the links, some of which may not have this layer. Records add nothing.
        device: where the products are computed: the training's device gives equal bits.
    """
    for link in links:
        if name in link.factors and not link.is_record:
            lora_A, lora_B = link.factors[name]
            layer.add_finished_link(lora_A.to(device), lora_B.to(device), link.scaling_of(name))


def _place(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """Casts and moves a model, in place; None: not."""
    if dtype is not None:
        cast_floats(model, dtype)
    return model if device is None else model.to(device)


# ---------------------------------------------------------------------- whole models


def deep_copy(
    model: nn.Module,
    memo: dict[int, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A deep copy of a model, each of whose tensors is copied directly to its new device and dtype; no gradients.

    A result that a forward pass has left in an attribute, such as an auxiliary loss, is copied without its graph.

    Args:
        model: the model.
        memo: by ``id``, what is copied already, see ``copy.deepcopy``; it is added to.
        device: where the copies are; None: where the tensors are.
        dtype: of floating-point tensors; None: their own.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in (*vars(module).values(), *module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not isinstance(value, Tensor) or id(value) in memo:
                continue
            if type(value) in (Tensor, nn.Parameter) or not value.is_leaf:
                to = dtype if dtype is not None and value.is_floating_point() else value.dtype
                copied = value.detach().to(value.device if device is None else device, to, copy=True)
                memo[id(value)] = nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
            elif device is not None and isinstance(value, nn.Parameter):  # one in 4 bits, for example, copies itself
                memo[id(value)] = copy.deepcopy(value).to(device)
    return copy.deepcopy(model, memo)


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


@torch.no_grad()
def round_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds to half precision, in place, the tensors that a cast of the model would change; they keep their dtype.

    Args:
        model: an adapted model.
        dtype: of half precision; a wider one changes nothing.
    """
    if dtype.itemsize >= 4:
        return
    kept = {id(value) for layer in lora_layers(model).values() for value in layer.wide_parameters}
    for module in model.modules():
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if value.is_floating_point() and id(value) not in kept:
                value.copy_(value.to(dtype))


def free(model: nn.Module) -> None:
    """Frees the memory of a model that is not needed any more, whoever still refers to it.

    glibc keeps what is freed for later tensors of that size; a model that is then loaded from a file does not use it.
    """
    model.to("meta")
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
