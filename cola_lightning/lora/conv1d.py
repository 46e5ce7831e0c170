"""GPT-2's linear layer with a link, in its own file because importing transformers, which defines the layer, takes seconds."""

from typing import Any

from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from cola_lightning.lora.layer import LoRALayer


class LoRAConv1D(LoRALayer, Conv1D):  # type: ignore[misc]  # both declare the weight
    """GPT-2's ``Conv1D`` (a linear layer whose weight is in x out) with a link."""

    weight_is_transposed = True

    @classmethod
    @override
    def matrix_sizes(cls, layer: Any) -> tuple[int, int]:
        return layer.nx, layer.nf
