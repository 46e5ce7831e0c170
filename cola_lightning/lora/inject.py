"""Injects LoRA layers into a model, in place, and removes them again.

Every reason to refuse a model is here: a target that matches nothing, a weight that two layers share, a rank that a layer
cannot have, a quantised base to be merged into.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from cola_lightning.errors import UserError, nearest
from cola_lightning.lora.layer import DRAWS
from cola_lightning.lora.linear4bit import dequantize_, is_quantized, keep_layout
from cola_lightning.lora.registry import (
    FinishedLinks,
    Init,
    LoRALayer,
    adapt_,
    cast_,
    is_adaptable,
    is_linear,
    layer_types,
    lora_class,
    obstacle,
)
from cola_lightning.sharded import tensors

ALL_LINEAR = "all-linear"

log = logging.getLogger(__name__)

# Modules that do not multiply by their weights as a Linear layer does.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, *CONVOLUTIONS)
NEGLIGIBLE = 0.01  # a smaller share of the parameters causes no warning, except in a subclass of nn.Linear


def inject_lora(
    model: nn.Module,
    target_modules: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
    init: Init = "kaiming",
    finished_links: FinishedLinks = "merge",
) -> list[str]:
    """Makes the target layers LoRA layers, in place, and freezes everything else.

    They remain the same objects, with their parameters, buffers, hooks and attributes; only their class changes.
    Afterwards only the links' A and B and the parameters of ``modules_to_save`` are trainable.

    Args:
        model: the model to adapt.
        target_modules: PEFT's rule. A string is a regular expression for a layer's whole name; a list holds names or dotted
            name endings; ``all-linear`` is every linear layer (Linear, Conv1D, Linear4bit) except the output embeddings and
            ``modules_to_save``. Convolutions (Conv1d, Conv2d) are adapted by name alone.
        rank: largest rank of a link, and the first link's; at most the smaller side of each target.
        alpha: updates are scaled by ``alpha / rank``.
        dropout: probability of dropping an input of A while training.
        modules_to_save: names or dotted name endings of fully trained modules (a new head).
        init: how A is drawn, see :meth:`LoRALayer.from_layer`.
        finished_links: ``merge`` adds them to the targets' weights, which (with their biases) are cast to float32 where they
            are in half precision; ``stack`` stores them beside the weights, which are never modified.

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        UserError: for what would later fail or be wrong: no match, shared modules or weights, a 4-bit base to merge into, ...

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inject_lora(model, ["0"], rank=2, alpha=4)
        ['0']
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B']

    Source: Hu et al., arXiv 2106.09685, section 4; for the matching rule, PEFT's ``LoraConfig.target_modules``.
    """
    check_factors(rank, alpha, dropout, init, finished_links)
    if lora_layers(model):
        raise UserError("model: expected a model without LoRA layers, received one that is adapted already")
    saved = _matches(model, list(modules_to_save), "model.modules_to_save", [name for name, _ in model.named_modules()])
    names = _find_targets(model, target_modules, saved)
    modules = dict(model.named_modules())
    _check_not_shared(model, names)
    _check_saved_not_shared(model, saved)
    for name in names:
        _check_layer(name, modules[name], rank, finished_links)
    if inside := [name for name in names if is_inside(name, saved)]:
        raise UserError(f"model.modules_to_save: expected modules that hold no target, received the target {inside[0]!r}")

    if target_modules == ALL_LINEAR:
        _warn_of_omitted(model, names, saved)
    model.requires_grad_(False)
    for module in modules.values():
        if is_quantized(module):
            keep_layout(module)
    for name in names:
        adapt_(modules[name], rank, alpha, dropout, init, finished_links)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in lora_layers(module).values():
                layer.close_fused_paths()
    for name in saved:
        model.get_submodule(name).requires_grad_()
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by name, in the model's order.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = inject_lora(model, "all-linear", rank=1, alpha=1)
        >>> list(lora_layers(model))
        ['0']
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    return dict(zip(tensors.plain_names(layers), layers.values(), strict=True))


def names_of_factors(model: nn.Module) -> set[str]:
    """The names of the adapted layers' A and B: a parameter of the base may have such an ending, too."""
    return {f"{name}.lora_{factor}" for name in lora_layers(model) for factor in "AB"}


def strip_lora(model: nn.Module, *, merge: bool = False, dtype: torch.dtype | None = None) -> None:
    """Makes the LoRA layers plain ones again, in place, with their other attributes and the same ``Parameter`` objects.

    Args:
        model: an adapted model.
        merge: add each current link, and each stack, to its weight first: in float32, rounded once. 4-bit weights that are
            adapted are de-quantised for that, into new parameters.
        dtype: of the plain layers, to which merged weights are rounded; None: the base's, as it came or as it was cast.

    Raises:
        UserError: if links are not in the weights (a link has been trained, or links are stacked) and ``merge`` is False.
    """
    layers = lora_layers(model)
    if not merge and (lost := [name for name, layer in layers.items() if layer.has_begun or layer.has_finished_links]):
        raise UserError(f"merge: expected True, for layer {lost[0]!r} has links that would be lost; received False")
    dtypes = {name: dtype or _base_dtype(layer) for name, layer in layers.items()}
    stacked = unstack(model) if merge else {}
    for name, layer in lora_layers(model).items():
        if name in stacked:
            layer.add_finished_link(*stacked[name], 1.0)
        if merge:
            layer.merge()
        layer.strip_()
        for parameter in (layer.weight, getattr(layer, "bias", None)):
            if parameter is not None and parameter.is_floating_point():
                cast_(parameter, dtypes[name])


def _base_dtype(layer: LoRALayer) -> torch.dtype:
    """The dtype of a layer's base; a weight into which links are merged may be wider."""
    is_upcast = layer.stack is None and layer.source_dtype.endswith("16")
    dtype: torch.dtype = getattr(torch, layer.source_dtype) if is_upcast else layer.dtype
    return dtype


def unstack(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Makes stacking layers merging ones, in place: no finished links, weights in float32 at least, none in 4 bits.

    Returns:
        The stacked factors: A (rank x in) and B (out x rank) by the layer's name.
    """
    for layer in lora_layers(model).values():
        if is_quantized(layer):
            dequantize_(layer, torch.float32)
    return {name: layer.unstack() for name, layer in lora_layers(model).items() if layer.stack is not None}


def check_factors(rank: int, alpha: float, dropout: float, init: str, finished_links: str) -> None:
    """Refuses values that no link could have, before any model is made."""
    if rank < 1:
        raise UserError(f"model.rank: expected a whole number of at least 1, received {rank}")
    if not 0 < alpha < math.inf:
        raise UserError(f"model.alpha: expected a number above 0, received {alpha}")
    if not 0 <= dropout < 1:
        raise UserError(f"model.dropout: expected a probability from 0 to below 1, received {dropout}")
    if init not in DRAWS:
        raise UserError(f"model.init: expected {', '.join(DRAWS)}, received {init!r}")
    if finished_links not in get_args(FinishedLinks):
        raise UserError(f"model.finished_links: expected {' or '.join(get_args(FinishedLinks))}, received {finished_links!r}")


def _check_saved_not_shared(model: nn.Module, saved: list[str]) -> None:
    """Refuses a fully trained module whose weight the model also uses outside of it: that use would be trained, too."""
    for names in _in_one_memory(model):
        inside = [name for name in names if is_inside(name, saved)]
        outside = [name for name in names if name not in inside]
        if inside and outside:
            raise UserError(
                f"model.modules_to_save: expected modules with weights of their own, received {inside[-1]!r}, which is also "
                f"{outside[0]!r}"
            )


def _find_targets(model: nn.Module, target_modules: str | Sequence[str], saved: list[str]) -> list[str]:
    adaptable = [name for name, module in model.named_modules(remove_duplicate=False) if name and is_adaptable(module)]
    if target_modules == ALL_LINEAR:
        head = _output_embeddings(model)
        linear = [name for name in adaptable if is_linear(model.get_submodule(name))]
        names = [n for n in linear if model.get_submodule(n) is not head and not is_inside(n, saved)]
        if not names:
            kin = [f"{name} ({type(m).__name__})" for name, m in model.named_modules() if isinstance(m, nn.Linear)]
            passed_over = f"; passed over: {first_names(kin)}" if kin else ""
            raise UserError(
                f"model.target_modules: expected a model with {layer_types(linear_only=True)} layers for all-linear, received "
                f"none{passed_over}"
            )
        return names
    matched = set(_matches(model, target_modules, "model.target_modules", adaptable))
    if other := sorted(matched - set(adaptable)):
        module = model.get_submodule(other[0])
        kind = type(module).__name__
        why = (
            " with a forward of its own, or none that is called: register_lora_layer adds a layer type"
            if isinstance(module, nn.Linear)
            else ""
        )
        raise UserError(
            f"model.target_modules: expected layers of type {layer_types()}, received {other[0]!r}, which is a {kind}{why}"
        )
    return [name for name in adaptable if name in matched]


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a Hugging Face language model."""
    getter = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = None if getter is None else getter()
    return head


def _warn_of_omitted(model: nn.Module, names: list[str], saved: list[str]) -> None:
    """Warns of matrices that all-linear leaves frozen although they are used as a Linear's are, such as experts'."""
    total = sum(_count(module, parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    lines, is_worth_it = [], False
    kinds = _omitted(model, names, saved)
    for (attribute, cls), places in sorted(kinds.items(), key=lambda kind: -sum(kind[1].values())):
        share = sum(places.values()) / total
        is_worth_it |= issubclass(cls, nn.Linear) or share >= NEGLIGIBLE
        text = f"{share:.0%}".replace("%", " %") if share >= NEGLIGIBLE else f"under {NEGLIGIBLE:.0%}".replace("%", " %")
        lines.append(f"{attribute} of {cls.__name__} ({text} of the parameters: {first_names(list(places))})")
    if is_worth_it:
        log.warning("model.target_modules: all-linear leaves matrices of other layers frozen: %s", "; ".join(lines[:4]))


def _omitted(model: nn.Module, names: list[str], saved: list[str]) -> dict[tuple[str, type], dict[str, int]]:
    """Parameters of one or several matrices that are in no target: their sizes by place, by name and owner's class.

    Embeddings (lookup tables, and position embeddings with a first dimension of 1) and convolutions are excluded.
    """
    head = _output_embeddings(model)
    others = [name for name, module in model.named_modules() if module is head or isinstance(module, NO_MATRICES)]
    seen = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if is_inside(name, [*names, *saved, *others])}
    kinds: dict[tuple[str, type], dict[str, int]] = defaultdict(dict)
    for place, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            is_known = id(parameter) in seen or attribute.endswith("bias")
            if not is_known and parameter.dim() >= 2 and parameter.shape[0] > 1:
                kinds[attribute, type(module)][place] = _count(module, parameter)
    return kinds


def _matches(model: nn.Module, patterns: str | Sequence[str], field: str, offered: Iterable[str]) -> list[str]:
    """Names of the modules that the patterns match; each pattern must match one. ``offered``: what to suggest instead."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if isinstance(patterns, str):
            hits = [name for name in names if _compile(pattern, field).fullmatch(name)]
        else:
            hits = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
        if not hits:
            raise UserError(
                f"{field}: expected the name of a module of the model, received {pattern!r}{_nearest(pattern, offered)}"
            )
        found.update(hits)
    if not found and field == "model.target_modules":
        raise UserError(f"{field}: expected at least one name, received none")
    return [name for name in names if name in found]


def _compile(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}: expected a regular expression, received {pattern!r} ({error})") from error


def _nearest(word: str, names: Iterable[str]) -> str:
    """Suggestions for a name that matches nothing: names and their endings, those that are more than a number first."""
    ends = dict.fromkeys(end for name in names if name for end in (name.rpartition(".")[2], name))
    return nearest(word, sorted(ends, key=str.isdigit))


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether this is the name of one of the modules, or of something inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def lies_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a name lies in one of the modules, which are given by their names or dotted name endings."""
    return any(f".{module}." in f".{name}." for module in modules)


def _count(module: nn.Module, parameter: Tensor) -> int:
    """How many values a parameter of the module holds: two in each byte of a 4-bit weight."""
    return parameter.numel() * (2 if is_quantized(module) and not parameter.is_floating_point() else 1)


def first_names(names: list[str]) -> str:
    """The first three names."""
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])


def _check_not_shared(model: nn.Module, names: list[str]) -> None:
    """Refuses a target that the model uses in two places: adapting one would change, or miss, the other."""
    places = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        places[id(module)].append(name)
    for name in names:
        module = model.get_submodule(name)
        if len(places[id(module)]) > 1:
            raise UserError(
                "model.target_modules: expected layers that the model uses under one name, received "
                f"{' = '.join(places[id(module)])}"
            )
    for shared in _in_one_memory(model):
        for name in names:
            if any(is_inside(one, [name]) for one in shared):
                raise UserError(
                    "model.target_modules: expected layers with weights of their own, received "
                    f"{name!r}, whose weight is shared ({' = '.join(shared)})"
                )


def _in_one_memory(model: nn.Module) -> list[list[str]]:
    """Names of parameters and buffers that are one tensor, or begin at one place in memory."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        place = tensor.data_ptr() if is_plain else 0  # 0 also without memory: meta, or empty
        groups[(tensor.device, place) if place else id(tensor)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _check_layer(name: str, module: nn.Module, rank: int, finished_links: FinishedLinks) -> None:
    if (reason := obstacle(module)) is not None:
        raise UserError(f"model.target_modules: expected layers to which a link can be added, received {name!r}, {reason}")
    weight = module.get_parameter("weight")
    if finished_links == "merge" and not (type(weight) is nn.Parameter or tensors.is_sharded(weight)):
        raise UserError(
            f"model.finished_links: expected stack, for links cannot be merged into the weight of {name!r}, a "
            f"{type(weight).__name__}; received merge"
        )
    found = lora_class(module)
    assert found is not None
    n_in, n_out = found.matrix_sizes(module)
    if rank > min(n_in, n_out):
        raise UserError(
            f"model.rank: expected at most {min(n_in, n_out)}, the smaller side of {name!r} {(n_out, n_in)} (or "
            f"model.target_modules without it), received {rank}"
        )
