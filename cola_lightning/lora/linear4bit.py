"""bitsandbytes' 4-bit linear layer with a link, in its own file because bitsandbytes is an optional package."""

from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from typing_extensions import override

from cola_lightning.lora.layer import LoRALayer
from cola_lightning.lora.quantization import dequantized_weight


class LoRALinear4bit(LoRALayer, Linear4bit):  # type: ignore[misc]
    """bitsandbytes' 4-bit linear layer with a link; finished links are stacked."""

    weight: Any
    compute_dtype: torch.dtype | None

    @override
    def _prepare_weight(self, *, is_stacking: bool) -> torch.dtype:
        self.source_dtype = self.weight.quant_type
        return self.compute_dtype or torch.float32

    @override
    def base_forward(self, x: Tensor, *more: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):  # which does not cover this product
            x = x.to(torch.get_autocast_dtype(device))
        dtype = x.dtype
        if dtype == torch.float64:  # its kernels do not support it
            x = x.float()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = matmul_4bit(x, self.weight, bias=bias, quant_state=self.weight.quant_state)
        return y.to(dtype)

    @override
    def full_weight(self) -> Tensor:
        return dequantized_weight(self)
