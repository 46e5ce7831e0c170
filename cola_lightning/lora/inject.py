"""Which layers can be adapted, and a model's: LoRA layers are injected into it, in place, and removed again.

Layer types and their LoRA classes are one table, to which users may add. Every reason to refuse a model is here: a target that
matches nothing, a weight that two layers share, a layer that would compute something else with a link, a quantised base to be
merged into.
"""

import logging
import pydoc
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cola_lightning.errors import UserError, nearest
from cola_lightning.lora.attention import InputProjection, LoRAInputProjection, expose_projections, hide_projections
from cola_lightning.lora.config import LoRAConfig, is_matched
from cola_lightning.lora.experts import ExpertsProjection, LoRAExpertsProjection, expose_experts, hide_experts
from cola_lightning.lora.layer import LoRALayer, is_quantized, lora_layers
from cola_lightning.lora.layer_types import LoRAConv1d, LoRAConv2d, LoRALinear
from cola_lightning.lora.quantization import dequantize_layer_, keep_layout

ALL_LINEAR = "all-linear"

log = logging.getLogger(__name__)

# ---------------------------------------------------------------------- layer types

Registered = TypeVar("Registered", bound=type[LoRALayer])


class _Entry(NamedTuple):
    lora_class: type[LoRALayer] | str  # or its dotted name, for one whose file imports another package
    is_linear: bool


# Layer type -> its LoRA class. Another package's type is given by name, and so is a LoRA class that needs the package.
_entries: dict[type | str, _Entry] = {
    nn.Linear: _Entry(LoRALinear, is_linear=True),
    "transformers.pytorch_utils.Conv1D": _Entry("cola_lightning.lora.conv1d.LoRAConv1D", is_linear=True),
    "transformers.models.falcon.modeling_falcon.FalconLinear": _Entry(LoRALinear, is_linear=True),  # which is also x W^T + b
    "bitsandbytes.nn.modules.Linear4bit": _Entry("cola_lightning.lora.linear4bit.LoRALinear4bit", is_linear=True),
    ExpertsProjection: _Entry(LoRAExpertsProjection, is_linear=True),  # which a model has only if experts are wanted
    InputProjection: _Entry(LoRAInputProjection, is_linear=True),  # of nn.MultiheadAttention while its projections are layers
    nn.Conv1d: _Entry(LoRAConv1d, is_linear=False),
    nn.Conv2d: _Entry(LoRAConv2d, is_linear=False),
}


def register_lora_layer(layer_type: type[nn.Module] | str, *, is_linear: bool = False) -> Callable[[Registered], Registered]:
    """Registers a LoRA class for a layer type, in place of any other for that type.

    A decorator for the class (``class LoRAMine(LoRALayer, Mine)``), which must be registered wherever a chain is trained or
    loaded.

    Args:
        layer_type: the plain layer's class, itself and no subclass, or its dotted name (``"package.module.Class"``).
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


def _find(module: nn.Module) -> _Entry | None:
    """The entry of a module's class; a subclass of a linear layer that inherits its ``forward`` has the entry of that layer."""
    layer_type: Any = type(module)
    if layer_type is NonDynamicallyQuantizableLinear:  # of attention that never calls it: see expose_projections
        return None
    for base in layer_type.__mro__:
        entry = _entries.get(base) or _entries.get(f"{base.__module__}.{base.__qualname__}")
        if entry is not None:
            return entry if base is layer_type or (entry.is_linear and layer_type.forward is base.forward) else None
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
    found = entry.lora_class
    return cast(type[LoRALayer], pydoc.locate(found)) if isinstance(found, str) else found


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a layer that ``all-linear`` includes."""
    entry = _find(module)
    return entry is not None and entry.is_linear


# ---------------------------------------------------------------------- into a model, and out again


def inject_lora(model: nn.Module, config: LoRAConfig, earlier: Iterable[str] = ()) -> list[str]:
    """Makes the target layers LoRA layers, in place, and freezes everything else.

    They remain the same objects, with their parameters, buffers, hooks and attributes; only their class changes.
    Afterwards only the links' A and B and the parameters of ``modules_to_save`` are trainable.

    Args:
        model: the model to adapt.
        config: the target layers, and what their links are like. Without ``target_modules`` the model stays as it is.
        earlier: names of layers that earlier links have. Those that are no targets become LoRA layers without a current link.

    Returns:
        The names of the target layers, in the model's order.

    Raises:
        UserError: for what would later be wrong: no match, shared modules or weights, a 4-bit base to merge into, a model that
            is adapted already, ...
        AttributeError: for a layer whose weight is no parameter, but computed from others at each forward pass.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inject_lora(model, LoRAConfig(target_modules=["0"], rank=2, alpha=4))
        ['0']
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B']
    """
    if config.target_modules is None:
        return []
    if lora_layers(model):  # whose links a second call would freeze
        raise UserError("model: it already has LoRA layers. Name all targets in one call")
    if config.experts or config.target_modules != ALL_LINEAR:
        expose_experts(model)
    expose_projections(model)
    try:
        return _inject(model, config.target_modules, config, earlier)
    finally:
        restore_(model)  # except what has links


def restore_(model: nn.Module) -> None:
    """Makes experts, attention and encoders, in place, what they were before links, if no layer in them has one."""
    hide_experts(model)
    hide_projections(model)


def _inject(model: nn.Module, target_modules: str | Sequence[str], config: LoRAConfig, earlier: Iterable[str]) -> list[str]:
    """Adapts the targets, see :func:`inject_lora`."""
    saved = _matches(model, list(config.modules_to_save), "model.modules_to_save")
    names = _linear_layers(model) if target_modules == ALL_LINEAR else _matches(model, target_modules)
    excluded = saved + _matches(model, config.exclude_modules or [], "model.exclude_modules")
    names = [name for name in names if not is_in_modules(name, excluded)]
    if not names:
        raise UserError("model.target_modules: no layer is left outside of model.exclude_modules and model.modules_to_save")
    if config.layers_to_transform not in (None, []):  # as in PEFT
        names = _in_layers(names, config.layers_to_transform)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or ():
            if not any(is_matched(pattern, name) for name in names):
                near = nearest(str(pattern), {name.rpartition(".")[2] for name in names}) or f", such as {names[0]!r}"
                raise UserError(f"model.{field}: {pattern!r} matches no adapted layer{near}")
    modules = dict(model.named_modules())
    others = [name for name in earlier if name in modules and name not in names and not is_in_modules(name, saved)]
    targets = {name: model.get_submodule(name) for name in [*names, *others]}
    _check_not_shared(model, [*targets], saved)
    classes = {name: _class_for(name, layer, config) for name, layer in targets.items()}
    # All of them, or none. A weight that is recomputed at each forward pass (pruning, weight norm) is no parameter.
    is_stacking = config.should_stack(layer.get_parameter("weight") for layer in targets.values())
    config = replace(config, finished_links="stack" if is_stacking else "merge")

    model.requires_grad_(False)
    for module in model.modules():
        if is_quantized(module):
            keep_layout(module)
    for name, layer in targets.items():
        classes[name].adapt_(layer, config, name, has_link=name not in others)
    for name in saved:
        model.get_submodule(name).requires_grad_()
    return names


def begin_merging(layer: LoRALayer, compute_dtype: torch.dtype) -> None:
    """Has a layer merge links into its weight, in this dtype: without its stack, and not in 4 bits."""
    if is_quantized(layer):
        dequantize_layer_(layer, compute_dtype)
    layer.stack = None
    layer.cast_base_(compute_dtype)


def _linear_layers(model: nn.Module) -> list[str]:
    """The targets of all-linear: linear layers, except the head of a Hugging Face language model."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    return [name for name, module in model.named_modules() if name and module is not head and is_linear(module)]


def _in_layers(names: list[str], layers: int | list[int]) -> list[str]:
    """The names of what is in layers with these numbers.

    Source: ``peft.tuners.tuners_utils.check_target_module_exists`` (0.21), which wants another name before the list's.
    """
    found = [(name, re.match(r"(?:.*?\.)?[^.]*\.(\d+)\.", name)) for name in names]
    numbers = {name: int(number[1]) for name, number in found if number}
    wanted = {layers} if isinstance(layers, int) else set(layers)
    if unknown := sorted(wanted - set(numbers.values())):
        there = ", ".join(map(str, sorted(set(numbers.values())))) or "none"
        raise UserError(f"model.layers_to_transform: no target is in layer {unknown[0]}. The layers with targets: {there}")
    return [name for name in numbers if numbers[name] in wanted]


def _matches(model: nn.Module, patterns: str | Sequence[str], field: str = "model.target_modules") -> list[str]:
    """Names of the modules that the patterns match; each pattern must match one."""
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if isinstance(patterns, str):
            hits = [name for name in named if re.fullmatch(pattern, name)]
        else:
            hits = [name for name in named if name == pattern or name.endswith(f".{pattern}")]
        if not hits:
            adaptable_first = sorted(named, key=lambda name: lora_class(named[name]) is None)
            names = [*dict.fromkeys(name.rpartition(".")[2] for name in adaptable_first)]
            near = nearest(pattern, names) or f"; some that exist: {', '.join(names[:3])}"
            raise UserError(f"{field}: the model has no module {pattern!r}{near}")
        found.update(hits)
    return [name for name in named if name in found]


def is_in_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether this is the name of one of the modules, or of something inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_in_matching_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether a name lies in one of the modules, which are given by their names or dotted name endings."""
    return any(f".{module}." in f".{name}." for module in modules)


def _check_not_shared(model: nn.Module, targets: list[str], saved: list[str]) -> None:
    """Refuses weights that the model also uses elsewhere: adapting or training one would change, or miss, the other."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        groups[tensor.data_ptr() or id(tensor)].append(name)  # a view begins where the other does; 0 has no memory: meta, empty
    for shared in groups.values():
        adapted, trained = ([name for name in shared if is_in_modules(name, modules)] for modules in (targets, saved))
        if len(shared) > 1 and (adapted or 0 < len(trained) < len(shared)):
            field = "model.target_modules" if adapted else "model.modules_to_save"
            module = (adapted or trained)[0].rpartition(".")[0]
            raise UserError(f"{field}: the weight of {module!r} is shared ({' = '.join(shared)}), and cannot be trained alone")


def _class_for(name: str, layer: nn.Module, config: LoRAConfig) -> type[LoRALayer]:
    """The LoRA class for a target, which must be a layer that can have links."""
    found = lora_class(layer)
    if found is None:
        kinds = [key.rpartition(".")[2] if isinstance(key, str) else key.__name__ for key in _entries]
        known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        reason: str | None = f"which is a {type(layer).__name__} and not a {known} (register_lora_layer adds other types)"
    elif "forward" in vars(layer):  # which would never reach the link
        reason = "which has a replaced forward (accelerate's hooks do that: remove_hook_from_submodules removes them)"
    else:
        reason = found.why_unsupported(layer)
    if found is None or reason is not None:
        raise UserError(f"model.target_modules: a link cannot be added to {name!r}, {reason}")
    if config.finished_links == "merge" and is_quantized(layer):
        raise UserError(f"model.finished_links: must be stack for the quantized weight of {name!r}, got merge")
    return found
