"""Merging: an adapted model becomes a plain one, layer by layer, so that no more is in memory than the result and one layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cola_lightning.chain.link import Link, add_links
from cola_lightning.lora.experts import close_experts
from cola_lightning.lora.inject import begin_merging
from cola_lightning.lora.layer import lora_layers
from cola_lightning.lora.linear4bit import dequantize
from cola_lightning.weights import cast_floats, deep_copy


def merge(
    model: nn.Module,
    links: Sequence[Link],
    wide: torch.dtype,
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
        wide: the dtype in which it is added.
        compute_device: where the products are computed: the training's device gives equal bits.
        dtype: of the result's floating-point tensors; None: as they are, and of merged weights the wide one.
        device: of the result; None: the model's.
        in_place: make the model itself the result, instead of a copy.
    """
    memo = dict[int, Any]()
    for name, layer in lora_layers(model).items():
        own = layer if in_place else deep_copy(layer, memo)
        begin_merging(own, wide)
        add_links(name, own, links, compute_device)
        _place(own.strip_(), dtype, device)
    if not in_place:
        model = deep_copy(model, memo, device=device, dtype=dtype)
    dequantize(model, wide if dtype is None else dtype)
    close_experts(model)
    return _place(model, dtype, device)


def _place(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """Casts and moves a model, in place; None: not."""
    if dtype is not None:
        cast_floats(model, dtype)
    return model if device is None else model.to(device)
