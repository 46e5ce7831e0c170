"""4-bit bases, by bitsandbytes: made of a model, adapted, and de-quantised again.

Source: Dettmers et al., "QLoRA" (arXiv 2305.14314): the NF4 data type, with its scales quantised once more.
"""

import functools
import importlib.util
from collections.abc import Collection
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from cola_lightning.errors import UserError, one_line
from cola_lightning.lora_layer import FinishedLinks, Init, LoRALayer, LoRALinear, take_over

Quantization = Literal["nf4"]

FIELD = "model.quantization"


def check_quantization(quantization: str) -> None:
    """Refuses a quantization that is not known, or does not run here; before any weight is read.

    Raises:
        UserError: with the reason.
    """
    if quantization not in get_args(Quantization):
        raise UserError(f"{FIELD}: expected null or {', '.join(get_args(Quantization))}, received {quantization!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{FIELD}: expected null, or the package bitsandbytes, received {quantization}: pip install 'cola_lightning[nf4]'"
        )
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
            linear = nn.Linear(64, 64, device="meta").to_empty(device="cpu")  # drawn from no generator
            nn.init.ones_(linear.weight)
            _quantized(linear, torch.float32)(torch.ones(2, 64, requires_grad=True)).sum().backward()
    except Exception as error:  # whatever it makes of this platform
        raise UserError(
            f"{FIELD}: expected null, for bitsandbytes does not run here ({one_line(str(error))}); received {quantization}"
        ) from error


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit layers, adapted or not."""
    return any((base.__module__, base.__name__) == ("bitsandbytes.nn.modules", "Linear4bit") for base in type(module).__mro__)


def quantize(model: nn.Module, dtype: torch.dtype, skip: Collection[str] = ()) -> None:
    """Quantises the linear layers of a model to NF4, in place and one by one.

    Args:
        model: on the CPU, and so on every machine with the same result.
        dtype: in which the layers then compute.
        skip: names of layers to leave as they are.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in skip:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quantized(module, dtype).train(module.training))


def _quantized(linear: nn.Linear, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4", device=torch.device("meta")
    )
    layer.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = linear.bias
    _keep_layout(layer)
    return layer.to("cpu")


def _keep_layout(layer: Any) -> None:
    """Keeps bitsandbytes from packing the weight anew, and computing with other kernels, in evaluation on some CPUs."""
    layer.state_dict()  # packs it back where that has happened
    layer.support_avx512bf16_for_cpu = False


def dequantized_weight(layer: Any) -> Tensor:
    """The weight that a 4-bit layer computes with: out x in, in float32."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.detach(), layer.weight.quant_state)
    return weight.float()


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Swaps the 4-bit layers of a model, where it has any, for plain ones, in place. See :func:`dequantized`."""
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dequantized(module, dtype))


@torch.no_grad()
def dequantized(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """A plain layer with the weight that a 4-bit one computes with; one that is adapted keeps its links.

    Args:
        layer: a 4-bit layer, adapted or not.
        dtype: of the new weight.
    """
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(dequantized_weight(layer).to(dtype), requires_grad=False)
    linear.bias = layer.bias
    linear.train(layer.training)
    if not isinstance(layer, LoRALayer):
        return linear
    adapted = LoRALinear.from_linear(linear, layer.max_rank, layer.alpha, init=layer.init, finished_links="stack")
    for name in ("lora_A", "lora_B", "lora_dropout", "rank", "stack", "source_dtype"):
        setattr(adapted, name, getattr(layer, name))
    return adapted


@functools.cache
def lora_linear_4bit() -> type[LoRALayer]:
    """``LoRALinear4bit``: its base class lives in bitsandbytes, an optional package."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.nn import Linear4bit

    class LoRALinear4bit(LoRALayer, Linear4bit):  # type: ignore[misc]
        """bitsandbytes' 4-bit linear layer with a live link; finished links are stacked."""

        weight: Any
        compute_dtype: torch.dtype | None

        @classmethod
        def from_linear(
            cls,
            linear: Any,
            rank: int,
            alpha: float,
            dropout: float = 0.0,
            init: Init = "kaiming",
            finished_links: FinishedLinks = "stack",
        ) -> Self:
            """Adapts a quantised layer, as :meth:`LoRALinear.from_linear` does a plain one."""
            with torch.device("meta"):
                layer = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.compute_dtype)
            _keep_layout(linear)
            take_over(layer, linear)
            layer._add_link(linear.in_features, linear.out_features, rank, alpha, dropout, init, finished_links)
            return layer

        @override
        def _take_up_weight(self, finished_links: FinishedLinks) -> torch.dtype:
            assert finished_links == "stack"
            self.source_dtype = self.weight.quant_type
            return self.compute_dtype or torch.float32

        @override
        def base_forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            if torch.is_autocast_enabled(device):  # which does not know this product
                x = x.to(torch.get_autocast_dtype(device))
            dtype, x = x.dtype, x.float() if x.dtype == torch.float64 else x  # its kernels know no float64
            bias = None if self.bias is None else self.bias.to(x.dtype)
            y: Tensor = matmul_4bit(x, self.weight, bias=bias, quant_state=self.weight.quant_state)
            return y.to(dtype)

        @override
        def full_weight(self) -> Tensor:
            return dequantized_weight(self)

    LoRALinear4bit.__qualname__ = "LoRALinear4bit"
    return LoRALinear4bit
