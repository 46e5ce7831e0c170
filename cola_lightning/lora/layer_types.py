"""Layers of torch and transformers with a link: linear layers, and convolutions.

The A of a convolution is a convolution with ``rank`` output channels, and B one of size 1 after it.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from cola_lightning.lora.layer import LoRALayer, low_rank_delta


class LoRALinear(LoRALayer, nn.Linear):
    """``nn.Linear`` with a link.

    Example:
        >>> from cola_lightning import LoRAConfig
        >>> layer = LoRALinear.adapt_(nn.Linear(4, 3), LoRAConfig(rank=2, alpha=4))
        >>> layer.lora_A.shape, layer.lora_B.shape, layer.delta_weight().shape
        (torch.Size([2, 4]), torch.Size([3, 2]), torch.Size([3, 4]))
    """


# ---------------------------------------------------------------------- convolutions


class LoRAConvolution(LoRALayer):
    """Base class of the LoRA layers of convolutions; comes before ``nn.Conv1d`` or ``nn.Conv2d``.

    The factors are matrices, as of any layer: A is rank x (in * kernel), B out x rank, and B A is the update of the weight,
    out x in x kernel, seen as a matrix of out rows.
    """

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    convolve: Callable[..., Tensor]

    @classmethod
    @override
    def matrix_sizes(cls, layer: Any) -> tuple[int, int]:
        return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels

    @classmethod
    @override
    def why_unsupported(cls, layer: Any) -> str | None:
        if layer.groups > 1:
            return f"which convolves {layer.groups} groups of channels apart: one with groups 1 can be adapted"
        if layer.padding_mode != "zeros":
            return f"whose padding_mode is {layer.padding_mode!r}: one with 'zeros' can be adapted"
        return None

    @override
    def project_down(self, x: Tensor, lora_A: Tensor, *more: Tensor) -> Tensor:
        return self.convolve(x, self._as_kernel(lora_A), None, self.stride, self.padding, self.dilation)

    @override
    def project_up(self, hidden: Tensor, lora_B: Tensor, *more: Tensor) -> Tensor:
        return self.convolve(hidden, lora_B[(..., *[None] * len(self.kernel_size))])

    @override
    def update(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        return self._as_kernel(low_rank_delta(lora_A, lora_B, scaling))

    def _as_kernel(self, matrix: Tensor) -> Tensor:
        """A matrix as the weight of a convolution, with its rows as output channels: ... x in x kernel."""
        return matrix.reshape(-1, self.in_channels, *self.kernel_size)


class LoRAConv1d(LoRAConvolution, nn.Conv1d):
    """``nn.Conv1d`` with a link."""

    convolve = staticmethod(F.conv1d)


class LoRAConv2d(LoRAConvolution, nn.Conv2d):
    """``nn.Conv2d`` with a link.

    Example:
        >>> from cola_lightning import LoRAConfig
        >>> layer = LoRAConv2d.adapt_(nn.Conv2d(3, 8, kernel_size=5), LoRAConfig(rank=2, alpha=4))
        >>> layer.lora_A.shape, layer.lora_B.shape, layer.delta_weight().shape
        (torch.Size([2, 75]), torch.Size([8, 2]), torch.Size([8, 3, 5, 5]))
    """

    convolve = staticmethod(F.conv2d)
