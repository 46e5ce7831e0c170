"""Linear layers with a link: ``nn.Linear``, its subclasses with the same ``forward``, and transformers' ``Conv1D``."""

import functools
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import type_before_parametrizations
from typing_extensions import override

from cola_lightning.lora.layer import LoRALayer

# The output layer of nn.MultiheadAttention, which reads its weight in every mode.
NOT_CALLED = (NonDynamicallyQuantizableLinear,)

# Subclasses whose own ``forward`` computes x W^T + b, too.
SAME_FORWARD = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


class LoRALinear(LoRALayer, nn.Linear):
    """``nn.Linear`` with a link.

    Example:
        >>> linear = nn.Linear(4, 3)
        >>> layer = LoRALinear.from_layer(linear, rank=2, alpha=4)
        >>> layer.weight is linear.weight, layer.delta_weight().shape
        (True, torch.Size([3, 4]))
    """

    @classmethod
    @override
    def subclass_for(cls, layer: Any) -> type[LoRALayer] | None:
        """None for a subclass with a ``forward`` of its own, such as a router's or a masked layer's."""
        own: Any = type_before_parametrizations(layer)
        is_same = own.forward is nn.Linear.forward or f"{own.__module__}.{own.__qualname__}" in SAME_FORWARD
        return lora_subclass(own) if is_same and not isinstance(layer, NOT_CALLED) else None


@functools.cache
def lora_subclass(base: Any) -> type[LoRALayer]:
    """The LoRA layer of a subclass of ``nn.Linear`` that computes as its parent does, with a link."""

    class LoRASubclass(LoRALayer, base):  # type: ignore[misc]
        @override
        def __reduce__(self) -> tuple[Any, ...]:  # pickle would look for the class by its name
            return _new_lora_subclass, (base,), self.__getstate__()  # type: ignore[no-untyped-call]

    LoRASubclass.__name__ = LoRASubclass.__qualname__ = f"LoRA{base.__name__}"
    return LoRASubclass


def _new_lora_subclass(base: type) -> LoRALayer:
    """An empty layer, for pickle and copies to fill."""
    cls = lora_subclass(base)
    return cls.__new__(cls)


@functools.cache
def lora_conv1d() -> type[LoRALayer]:
    """``LoRAConv1D``: its base class lives in transformers, which takes seconds to import."""
    from transformers.pytorch_utils import Conv1D

    class LoRAConv1D(LoRALayer, Conv1D):  # type: ignore[misc]  # both declare the weight
        """GPT-2's ``Conv1D`` (a linear layer whose weight is in x out) with a link."""

        weight_is_transposed = True

        @classmethod
        @override
        def matrix_sizes(cls, layer: Any) -> tuple[int, int]:
            return layer.nx, layer.nf

    # Where pickle finds it.
    LoRAConv1D.__module__, LoRAConv1D.__qualname__ = "cola_lightning.lora.registry", "LoRAConv1D"
    return LoRAConv1D
