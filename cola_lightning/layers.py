"""The layers that can be adapted, and the LoRA layer of each; those of other packages are made when first asked for."""

import functools
from typing import Any

from torch import nn

from cola_lightning.lora_layer import FinishedLinks, Init, LoRALayer, LoRALinear, empty_like, low_rank_delta, take_over
from cola_lightning.quantization import is_quantized, keep_layout, lora_linear_4bit

__all__ = [
    "FinishedLinks",
    "Init",
    "LoRALayer",
    "LoRALinear",
    "adapt_layer",
    "is_adaptable",
    "lora_conv1d",
    "low_rank_delta",
    "plain_layer",
]


def is_adaptable(module: nn.Module) -> bool:
    """Whether there is a LoRA layer for exactly this type: ``nn.Linear``, transformers' ``Conv1D``, bitsandbytes' 4-bit layer.

    A subclass may compute something else in its forward (torch's own attention never calls its output layer's), so it is not
    taken for its parent.
    """
    is_linear_4bit = is_quantized(module) and type(module).__module__.startswith("bitsandbytes.")
    return type(module) is nn.Linear or _is_conv1d(module) or is_linear_4bit


def adapt_layer(
    module: nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    init: Init = "kaiming",
    finished_links: FinishedLinks = "merge",
) -> LoRALayer:
    """The LoRA layer for an adaptable module, on the module's own parameters."""
    lora_class: Any = LoRALinear
    if _is_conv1d(module):
        lora_class = lora_conv1d()
    elif is_quantized(module):
        lora_class = lora_linear_4bit()
    layer: LoRALayer = lora_class.from_linear(module, rank, alpha, dropout, init, finished_links)
    return layer


def plain_layer(layer: LoRALayer) -> nn.Module:
    """The layer without its links: the base layer's class around the same weight and bias ``Parameter`` objects."""
    base_class: Any = type(layer).__mro__[type(layer).__mro__.index(LoRALayer) + 1]
    plain: nn.Module = empty_like(layer, base_class)
    take_over(plain, layer)
    if is_quantized(layer):
        keep_layout(plain, layer)
    return plain


@functools.cache
def lora_conv1d() -> type[LoRALayer]:
    """``LoRAConv1D``: its base class lives in transformers, which takes seconds to import."""
    from transformers.pytorch_utils import Conv1D

    class LoRAConv1D(LoRALayer, Conv1D):  # type: ignore[misc]  # both declare the weight
        """GPT-2's ``Conv1D`` (a linear layer whose weight is in x out) with a live link."""

        weight_is_transposed = True

    LoRAConv1D.__qualname__ = "LoRAConv1D"
    return LoRAConv1D


def _is_conv1d(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def __getattr__(name: str) -> Any:
    if name == "LoRAConv1D":
        return lora_conv1d()
    if name == "LoRALinear4bit":
        return lora_linear_4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
