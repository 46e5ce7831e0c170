"""The layers that can be adapted, and the LoRA layer of each; those of other packages are made when first asked for."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from typing_extensions import override

from cola_lightning.lora.layer import (
    FinishedLinks,
    Init,
    LoRALayer,
    LoRALinear,
    cast_,
    low_rank_delta,
    names_of_links,
    shallow_copy,
)
from cola_lightning.lora.linear4bit import is_quantized, lora_linear_4bit

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

# The output layer of nn.MultiheadAttention, which reads its weight in every mode.
NEVER_CALLED = (NonDynamicallyQuantizableLinear,)

ROWS = 32  # of a large layer are asked for, from each end
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_adaptable(module: nn.Module) -> bool:
    """Whether there is a LoRA layer for it: ``nn.Linear``, transformers' ``Conv1D``, bitsandbytes' 4-bit layer.

    A subclass of ``nn.Linear`` may compute something else in its forward (a router, a masked layer), so it is one of them only
    where a probe shows that it does not, as for Falcon's.
    """
    kind = type_before_parametrizations(module)
    is_linear_4bit = is_quantized(module) and kind.__module__.startswith("bitsandbytes.")
    if kind is nn.Linear or _is_conv1d(kind) or is_linear_4bit:
        return True
    return isinstance(module, nn.Linear) and not isinstance(module, NEVER_CALLED) and _computes_as_linear(module)


@torch.no_grad()
def _computes_as_linear(layer: nn.Linear) -> bool:
    """Whether the forward of a subclass of ``nn.Linear`` gives ``x W^T + b``, for other weights than its own, too.

    A copy of the layer is asked, in both modes, for it may draw or count.
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
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for values in (weight, weight.flip(0).mul_(-50).add_(1)):  # larger for a clamp, and none zero for a mask
            probe.weight = nn.Parameter(values, requires_grad=False)
            for is_training in (True, False):
                try:
                    y, expected = type(layer).forward(probe.train(is_training), x), F.linear(x, values, bias)
                except Exception:  # what it needs beside its input is its own
                    return False
                if not isinstance(y, Tensor) or y.shape != expected.shape or y.dtype != expected.dtype:
                    return False
                if not (y - expected).double().norm() <= 4 * torch.finfo(y.dtype).eps * expected.double().norm():
                    return False
    return True


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
    if "weight" in own and is_lazy(own["weight"]):
        return "whose weight has no size yet: a first forward pass of the model gives it one"
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
    lora_class: Any = LoRALinear if type(module) is nn.Linear else lora_subclass(cast(Any, type(module)))
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


def _is_conv1d(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def __getattr__(name: str) -> Any:
    if name == "LoRAConv1D":
        return lora_conv1d()
    if name == "LoRALinear4bit":
        return lora_linear_4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
