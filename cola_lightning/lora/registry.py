"""Which layers can be adapted, and the LoRA class of each: one table, to which users may add layer types."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import type_before_parametrizations

from cola_lightning.lora.convolution import LoRAConv1d, LoRAConv2d
from cola_lightning.lora.layer import LoRALayer
from cola_lightning.lora.linear import LoRALinear, lora_conv1d
from cola_lightning.lora.linear4bit import lora_linear_4bit

Registered = TypeVar("Registered", bound=type[LoRALayer] | Callable[[], type[LoRALayer]])


class _Entry(NamedTuple):
    lora_class: Any  # the class, or a function that makes it on first use
    is_linear: bool


# Layer type -> its LoRA class. Another package's type is given by name; its LoRA class is made once a model has such a layer.
_entries: dict[type | str, _Entry] = {
    nn.Linear: _Entry(LoRALinear, is_linear=True),
    "transformers.pytorch_utils.Conv1D": _Entry(lora_conv1d, is_linear=True),
    "transformers.models.falcon.modeling_falcon.FalconLinear": _Entry(LoRALinear, is_linear=True),  # it, too, is x W^T + b
    "bitsandbytes.nn.modules.Linear4bit": _Entry(lora_linear_4bit, is_linear=True),
    nn.Conv1d: _Entry(LoRAConv1d, is_linear=False),
    nn.Conv2d: _Entry(LoRAConv2d, is_linear=False),
}


def register_lora_layer(layer_type: type[nn.Module] | str, *, is_linear: bool = False) -> Callable[[Registered], Registered]:
    """Registers a LoRA class for a layer type, in place of any other for that type.

    A decorator for the class (``class LoRAMine(LoRALayer, Mine)``), or for a function without arguments that returns it and is
    called once a model has such a layer. The class must be registered wherever a chain is trained or loaded.

    Args:
        layer_type: the plain layer's class, itself and no subclass, or its dotted name (``"package.module.Class"``), so that
            the package need not be imported.
        is_linear: whether ``all-linear`` includes these layers.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> @register_lora_layer(Scaled)
        ... class LoRAScaled(LoRALayer, Scaled):
        ...     def project_up(self, hidden, lora_B):
        ...         return 2 * super().project_up(hidden, lora_B)
        >>> lora_class(Scaled(4, 3)).__name__
        'LoRAScaled'
    """

    def register(lora_class: Registered) -> Registered:
        _entries[layer_type] = _Entry(lora_class, is_linear)
        return lora_class

    return register


def layer_types() -> str:
    """The names of the layer types that can be adapted, for messages."""
    names = [key.rpartition(".")[2] if isinstance(key, str) else key.__name__ for key in _entries]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _find(module: nn.Module) -> _Entry | None:
    """The entry of a module's class; a subclass of a linear layer that inherits its ``forward`` has the entry of that layer."""
    own: Any = type_before_parametrizations(module)
    if own is NonDynamicallyQuantizableLinear:  # of nn.MultiheadAttention, which reads its weight and never calls it
        return None
    for base in own.__mro__:
        entry = _entries.get(base) or _entries.get(f"{base.__module__}.{base.__qualname__}")
        if entry is not None:
            return entry if base is own or (entry.is_linear and own.forward is base.forward) else None
    return None


def lora_class(module: nn.Module) -> type[LoRALayer] | None:
    """The LoRA class for a plain layer; None where there is none.

    Example:
        >>> lora_class(nn.Linear(2, 2)).__name__, lora_class(nn.LayerNorm(2))
        ('LoRALinear', None)
    """
    entry = _find(module)
    if entry is None:
        return None
    found: type[LoRALayer] = entry.lora_class if isinstance(entry.lora_class, type) else entry.lora_class()
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a layer that ``all-linear`` includes."""
    entry = _find(module)
    return entry is not None and entry.is_linear


def obstacle(module: nn.Module) -> str | None:
    """Why a module of a registered type cannot have a link, with the remedy; None if it can.

    A weight that is recomputed at each forward pass (pruning, weight and spectral norm) cannot be merged into, and an
    instance's own ``forward`` would never reach the link.
    """
    if "forward" in vars(module):
        return "which has a forward of its own (accelerate's hooks set one: remove_hook_from_submodules removes it)"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return (
            "whose weight is computed at each forward pass: torch.nn.utils (parametrize.remove_parametrizations, "
            "remove_weight_norm, prune.remove, ...) makes it a parameter"
        )
    found = lora_class(module)
    return None if found is None else found.obstacle(module)


def __getattr__(name: str) -> Any:
    if name == "LoRAConv1D":
        return lora_conv1d()
    if name == "LoRALinear4bit":
        return lora_linear_4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
