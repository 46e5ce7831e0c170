"""The trained parameters of a module, in one line."""

from typing import TYPE_CHECKING

from cola_lightning.lora.inject import lora_layers
from cola_lightning.lora.linear4bit import is_quantized
from cola_lightning.sharded import tensors

if TYPE_CHECKING:
    from cola_lightning.modules.base import COLAModule


def summary(module: "COLAModule") -> str:
    """How many of a module's parameters are trained, and where.

    Args:
        module: the module, with its model made.
    """
    layers, text = lora_layers(module.model), "model:"
    if not tensors.has_fsdp1(module.model):  # which hides sharded parameters in flat ones
        frozen = {id(factor) for factor in module.adapted.frozen_factors()}
        parameters = [parameter for _, parameter in module.named_parameters()]
        sizes = [(parameter.numel(), parameter.requires_grad and id(parameter) not in frozen) for parameter in parameters]
        packed = [part.get_parameter("weight").numel() for part in module.model.modules() if is_quantized(part)]
        n_trained = sum(size for size, is_trained in sizes if is_trained)
        n_all = sum(size for size, _ in sizes) + sum(packed)  # a packed weight has two values in a byte
        text += f" {n_trained:,} of {n_all:,} parameters are trained ({n_trained / max(1, n_all):.2%})"
    if module.adapted.live is None:
        return text
    rank, alpha = module.adapted.live
    text += f", link {module.link} of rank {rank} and alpha {alpha:g} on {len(layers)} layers"
    return text + (f", and all of {', '.join(module.modules_to_save)}" if module.modules_to_save else "")
