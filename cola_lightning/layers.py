"""The layers that can be adapted, and the LoRA layer of each; those of other packages are made when first asked for."""

import functools
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from cola_lightning.lora_layer import (
    FinishedLinks,
    Init,
    LoRALayer,
    LoRALinear,
    cast_,
    low_rank_delta,
    names_of_links,
    shallow_copy,
)
from cola_lightning.quantization import is_quantized, lora_linear_4bit

__all__ = [
    "FinishedLinks",
    "Init",
    "LoRALayer",
    "LoRALinear",
    "adapt_",
    "adapt_layer",
    "cast_",
    "is_adaptable",
    "lora_conv1d",
    "low_rank_delta",
    "obstacle",
    "plain_layer",
]


def is_adaptable(module: nn.Module) -> bool:
    """Whether there is a LoRA layer for exactly this type: ``nn.Linear``, transformers' ``Conv1D``, bitsandbytes' 4-bit layer.

    A subclass may compute something else in its forward (torch's own attention never calls its output layer's), so it is not
    taken for its parent.
    """
    kind = type_before_parametrizations(module)
    is_linear_4bit = is_quantized(module) and kind.__module__.startswith("bitsandbytes.")
    return kind is nn.Linear or _is_conv1d(kind) or is_linear_4bit


def obstacle(module: nn.Module) -> str | None:
    """What an adaptable module has that its LoRA layer could not keep, with the way out; None where there is nothing.

    A weight that is computed anew at each forward pass (pruning, weight and spectral norm, old style or new) cannot be merged
    into, and a forward of the instance's own would never come to the link.
    """
    if "forward" in vars(module):
        return (
            "which has a forward of its own, beside its class' (accelerate's hooks set one: remove_hook_from_submodules takes "
            "it back)"
        )
    own = dict(module.named_parameters(recurse=False))
    for part in ("weight", "bias"):
        sources = [name for name in own if name.startswith(f"{part}_")]
        if is_parametrized(module, part):  # first: to ask for it would compute it, and spectral norm take a step
            sources = ["parametrizations"]
        elif part in own or getattr(module, part) is None:
            continue
        return (
            f"whose {part} is computed at each forward pass ({', '.join(sources)}): "
            "torch.nn.utils (parametrize.remove_parametrizations, remove_weight_norm, prune.remove, ...) makes it a plain one"
        )
    if taken := [name for name in names_of_links() if hasattr(module, name)]:
        return f"which has an attribute {taken[0]!r}, a name that LoRA layers use"
    return None


def adapt_layer(
    module: nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    init: Init = "kaiming",
    finished_links: FinishedLinks = "merge",
) -> LoRALayer:
    """The LoRA layer for an adaptable module, on the module's own parameters; the module itself is not changed."""
    return adapt_(shallow_copy(module), rank, alpha, dropout, init, finished_links)


def adapt_(module: nn.Module, rank: int, alpha: float, dropout: float, init: Init, finished_links: FinishedLinks) -> LoRALayer:
    """Makes an adaptable module a LoRA layer, in place."""
    lora_class: Any = LoRALinear
    if _is_conv1d(type(module)):
        lora_class = lora_conv1d()
    elif is_quantized(module):
        lora_class = lora_linear_4bit()
    layer: LoRALayer = lora_class.adapt_(module, rank, alpha, dropout, init, finished_links)
    return layer


def plain_layer(layer: LoRALayer) -> nn.Module:
    """The layer without its links: the base layer's class around the same ``Parameter`` objects; the layer is not changed."""
    plain: LoRALayer = shallow_copy(layer)
    return plain.strip_()


@functools.cache
def lora_conv1d() -> type[LoRALayer]:
    """``LoRAConv1D``: its base class lives in transformers, which takes seconds to import."""
    from transformers.pytorch_utils import Conv1D

    class LoRAConv1D(LoRALayer, Conv1D):  # type: ignore[misc]  # both declare the weight
        """GPT-2's ``Conv1D`` (a linear layer whose weight is in x out) with a live link."""

        weight_is_transposed = True

    LoRAConv1D.__qualname__ = "LoRAConv1D"
    return LoRAConv1D


def _is_conv1d(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def __getattr__(name: str) -> Any:
    if name == "LoRAConv1D":
        return lora_conv1d()
    if name == "LoRALinear4bit":
        return lora_linear_4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
