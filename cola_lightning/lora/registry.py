"""Which layers can be adapted, and the LoRA class of each: one table, to which users may add layer types."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from cola_lightning.lora.convolution import LoRAConv1d, LoRAConv2d
from cola_lightning.lora.layer import FinishedLinks, Init, LoRALayer, cast_, low_rank_delta, shallow_copy
from cola_lightning.lora.linear import LoRALinear, lora_conv1d
from cola_lightning.lora.linear4bit import lora_linear_4bit

__all__ = [
    "FinishedLinks",
    "Init",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRALayer",
    "LoRALinear",
    "adapt_",
    "adapt_layer",
    "cast_",
    "is_adaptable",
    "is_linear",
    "layer_types",
    "lora_class",
    "lora_conv1d",
    "low_rank_delta",
    "obstacle",
    "register_lora_layer",
]

MakesClass = Callable[[], type[LoRALayer]]
Registered = TypeVar("Registered", bound=type[LoRALayer] | MakesClass)


class _Entry(NamedTuple):
    lora_class: Any  # the class, or a function that makes it on first use
    is_linear: bool


# Layer type -> its LoRA class. Another package's type is given by name; its LoRA class is made once a model has such a layer.
_entries: dict[type | str, _Entry] = {
    nn.Linear: _Entry(LoRALinear, is_linear=True),
    "transformers.pytorch_utils.Conv1D": _Entry(lora_conv1d, is_linear=True),
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
        >>> type(adapt_layer(Scaled(4, 3), rank=2, alpha=4)).__name__
        'LoRAScaled'
    """

    def register(lora_class: Registered) -> Registered:
        _entries[layer_type] = _Entry(lora_class, is_linear)
        return lora_class

    return register


def layer_types(*, linear_only: bool = False) -> str:
    """The names of the layer types that can be adapted, for messages.

    Example:
        >>> layer_types(linear_only=True)
        'Linear, Conv1D or Linear4bit'
    """
    names = [
        layer_type.rpartition(".")[2] if isinstance(layer_type, str) else layer_type.__name__
        for layer_type, entry in _entries.items()
        if entry.is_linear or not linear_only
    ]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _find(module: nn.Module) -> tuple[_Entry | None, bool]:
    """The entry of the nearest registered class of a module, and whether that is the module's own class."""
    own = type_before_parametrizations(module)
    for base in own.__mro__:
        entry = _entries.get(base) or _entries.get(f"{base.__module__}.{base.__qualname__}")
        if entry is not None:
            return entry, base is own
    return None, False


def lora_class(module: nn.Module) -> type[LoRALayer] | None:
    """The LoRA class for a plain layer; None where there is none.

    Example:
        >>> lora_class(nn.Linear(2, 2)).__name__, lora_class(nn.LayerNorm(2))
        ('LoRALinear', None)
    """
    entry, is_itself = _find(module)
    if entry is None:
        return None
    found: type[LoRALayer] = entry.lora_class if isinstance(entry.lora_class, type) else entry.lora_class()
    return found if is_itself else found.subclass_for(module)


def is_adaptable(module: nn.Module) -> bool:
    """Whether there is a LoRA class for the module."""
    return lora_class(module) is not None


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a layer that ``all-linear`` includes."""
    entry, _ = _find(module)
    return entry is not None and entry.is_linear and is_adaptable(module)


def obstacle(module: nn.Module) -> str | None:
    """Why an adaptable module cannot have a link, with the remedy; None if it can.

    A weight that is recomputed at each forward pass (pruning, weight and spectral norm, old style or new) cannot be merged
    into, and an instance's own ``forward`` would never reach the link.
    """
    if "forward" in vars(module):
        return (
            "which has a forward of its own, beside its class' (accelerate's hooks set one: remove_hook_from_submodules takes "
            "it back)"
        )
    own = dict(module.named_parameters(recurse=False))
    for part in ("weight", "bias"):
        sources = [name for name in own if name.startswith(f"{part}_")]
        if is_parametrized(module, part):  # first: reading it would compute it, and spectral norm take a step
            sources = ["parametrizations"]
        elif part in own or getattr(module, part, None) is None:
            continue
        return (
            f"whose {part} is computed at each forward pass ({', '.join(sources)}): "
            "torch.nn.utils (parametrize.remove_parametrizations, remove_weight_norm, prune.remove, ...) makes it a plain one"
        )
    found = lora_class(module)
    return None if found is None else found.obstacle(module)


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
    found = lora_class(module)
    assert found is not None
    return found.adapt_(module, rank, alpha, dropout, init, finished_links)


def __getattr__(name: str) -> Any:
    if name == "LoRAConv1D":
        return lora_conv1d()
    if name == "LoRALinear4bit":
        return lora_linear_4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
