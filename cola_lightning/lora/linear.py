"""Linear layers with a link: ``nn.Linear``, and transformers' ``Conv1D``."""

import functools
from typing import Any

from torch import nn
from typing_extensions import override

from cola_lightning.lora.layer import LoRALayer


class LoRALinear(LoRALayer, nn.Linear):
    """``nn.Linear`` with a link.

    Example:
        >>> from cola_lightning import LoRAConfig
        >>> layer = LoRALinear.adapt_(nn.Linear(4, 3), LoRAConfig(rank=2, alpha=4))
        >>> layer.lora_A.shape, layer.lora_B.shape, layer.delta_weight().shape
        (torch.Size([2, 4]), torch.Size([3, 2]), torch.Size([3, 4]))
    """


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
    LoRAConv1D.__module__, LoRAConv1D.__qualname__ = "cola_lightning.lora.inject", "LoRAConv1D"
    return LoRAConv1D
