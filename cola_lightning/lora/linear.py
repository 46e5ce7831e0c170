"""Linear layers with a live link: ``nn.Linear``, its subclasses that compute as it does, and transformers' ``Conv1D``."""

import functools
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import type_before_parametrizations
from typing_extensions import override

from cola_lightning.lora.initialization import Init
from cola_lightning.lora.layer import FinishedLinks, LoRALayer, shallow_copy

# The output layer of nn.MultiheadAttention, which reads its weight in every mode.
NEVER_CALLED = (NonDynamicallyQuantizableLinear,)

ROWS = 32  # of a large layer that are probed, from each end
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LoRALinear(LoRALayer, nn.Linear):
    """``nn.Linear`` with a live link.

    Example:
        >>> linear = nn.Linear(4, 3)
        >>> layer = LoRALinear.from_linear(linear, rank=2, alpha=4)
        >>> layer.weight is linear.weight, layer.delta_weight().shape
        (True, torch.Size([3, 4]))
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        finished_links: FinishedLinks = "merge",
    ) -> Self:
        """The same as :meth:`from_layer`."""
        return cls.from_layer(linear, rank, alpha, dropout, init, finished_links)

    @classmethod
    @override
    def subclass_for(cls, layer: Any) -> type[LoRALayer] | None:
        """A subclass may compute something else in its forward (a router, a masked layer): a probe checks that it does not."""
        is_linear = not isinstance(layer, NEVER_CALLED) and _computes_as_linear(layer)
        return lora_subclass(type_before_parametrizations(layer)) if is_linear else None


@torch.no_grad()
def _computes_as_linear(layer: nn.Linear) -> bool:
    """Whether the forward of a subclass of ``nn.Linear`` gives ``x W^T + b``, for other weights than its own, too.

    A copy of the layer is probed, in both modes, as it may draw random numbers or count calls.
    """
    if type(layer).forward is nn.Linear.forward:
        return True
    weight = layer.weight
    is_computed_with = type(weight) is nn.Parameter and not weight.is_meta and weight.dtype in FLOATS
    has_more = {name for name, _ in layer.named_parameters()} - {"weight", "bias"} or list(layer.children())
    if not is_computed_with or has_more or weight.shape != (layer.out_features, layer.in_features):
        return False
    probe = shallow_copy(layer)
    for name, buffer in layer.named_buffers(recurse=False):
        setattr(probe, name, buffer.clone())
    if layer.out_features > 2 * ROWS and not list(layer.buffers()):  # a mask, say, would be of the size of the weight
        ends = torch.cat([torch.arange(ROWS), torch.arange(-ROWS, 0)])
        weight, bias = weight[ends], None if layer.bias is None else layer.bias[ends]
        probe.out_features, probe.bias = 2 * ROWS, None if bias is None else nn.Parameter(bias, requires_grad=False)
    else:
        bias = layer.bias
    inputs = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        other = weight.flip(0).mul_(-50).add_(1)  # none zero, for a mask
        for values, x in ((weight, inputs), (other, inputs), (weight, inputs * 50)):  # larger, for a clamp
            probe.weight = nn.Parameter(values, requires_grad=False)
            for is_training in (True, False):
                try:
                    y, expected = type(layer).forward(probe.train(is_training), x), F.linear(x, values, bias)
                except Exception:  # it needs more than its input
                    return False
                if not isinstance(y, Tensor) or y.shape != expected.shape or y.dtype != expected.dtype:
                    return False
                if not (y - expected).double().norm() <= 4 * torch.finfo(y.dtype).eps * expected.double().norm():
                    return False
    return True


@functools.cache
def lora_subclass(base: Any) -> type[LoRALayer]:
    """The LoRA layer of a subclass of ``nn.Linear`` that computes as its parent does: its own forward, with a live link."""

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
        """GPT-2's ``Conv1D`` (a linear layer whose weight is in x out) with a live link."""

        weight_is_transposed = True

        @classmethod
        @override
        def matrix_sizes(cls, layer: Any) -> tuple[int, int]:
            return layer.nx, layer.nf

    # Where pickle finds it.
    LoRAConv1D.__module__, LoRAConv1D.__qualname__ = "cola_lightning.lora.registry", "LoRAConv1D"
    return LoRAConv1D
