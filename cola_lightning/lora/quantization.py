"""4-bit bases, by bitsandbytes: quantised, adapted, and de-quantised again.

Source: Dettmers et al., "QLoRA" (arXiv 2305.14314): the NF4 data type, in blocks of 64. Its scales stay in float32, as is
transformers' default: quantised once more, they would depend on the number of threads.
"""

import copy
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cola_lightning.errors import UserError
from cola_lightning.lora.layer import LoRALayer, is_quantized
from cola_lightning.lora.layer_types import LoRALinear

Quantization = Literal["nf4"]


def quantize(model: nn.Module, dtype: torch.dtype, skip: Collection[str] = (), quantization: Quantization = "nf4") -> None:
    """Quantises the linear layers of a model, in place and one by one.

    Args:
        model: on the CPU, so that the result is the same on every machine.
        dtype: the compute dtype of the quantised layers.
        skip: names of layers to leave unchanged.
        quantization: the data type; bitsandbytes refuses one that it does not know.

    Raises:
        UserError: if there are no other linear layers.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    layers: list[Any] = [layer for name, layer in model.named_modules() if type(layer) is nn.Linear and name not in skip]
    if not layers:
        raise UserError(f"model.quantization: a {type(model).__name__} has no Linear layers to quantize")
    options: dict[str, Any] = {"quant_type": quantization, "compress_statistics": False}
    with torch.device("meta"):
        like = Linear4bit(1, 1, compute_dtype=dtype, **options)
    for layer in layers:
        vars(layer).update({name: value for name, value in vars(like).items() if not hasattr(layer, name)})
        layer.__class__ = Linear4bit
        layer.weight = Params4bit(layer.weight.detach(), requires_grad=False, **options, module=layer)
        layer.to("cpu")  # which quantises it
        keep_layout(layer)


def keep_layout(layer: Any) -> None:
    """Keeps bitsandbytes from repacking a 4-bit weight, and computing with other kernels, in evaluation on some CPUs."""
    layer.state_dict()  # restores a repacked weight
    layer.support_avx512bf16_for_cpu = False


def dequantized_weight(layer: Any) -> Tensor:
    """The weight that a 4-bit layer computes with in float32: out x in, not rounded to the dtype that it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    weight: Tensor = dequantize_4bit(layer.weight.detach(), state)
    return weight


def dequantize_model(model: Any, dtype: torch.dtype) -> None:
    """Makes the 4-bit layers of a model, if any, plain ones, in place. See :func:`dequantize_layer_`."""
    for layer in model.modules():
        if is_quantized(layer):
            dequantize_layer_(layer, dtype)
    if getattr(model, "is_loaded_in_4bit", False):  # by transformers, which would refuse to cast or save it as it is now
        model.hf_quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False


@torch.no_grad()
def dequantize_layer_(layer: Any, dtype: torch.dtype) -> None:
    """Makes a 4-bit layer a plain one with the weight that it computes with, in place; an adapted one keeps its links.

    Args:
        layer: a 4-bit layer, adapted or not.
        dtype: of the new weight.
    """
    from bitsandbytes.nn import Linear4bit

    weight = dequantized_weight(layer).to(dtype)
    with torch.device("meta"):
        of_4_bits = vars(Linear4bit(1, 1)).keys() - vars(nn.Linear(1, 1)).keys()
    for name in of_4_bits & vars(layer).keys():
        delattr(layer, name)
    if isinstance(layer, LoRALayer):
        layer.__class__, layer.base_class = LoRALinear, nn.Linear
    else:
        layer.__class__ = nn.Linear
    layer.weight = nn.Parameter(weight, requires_grad=False)
