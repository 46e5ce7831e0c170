"""Injects LoRA layers into a model, in place, and removes them again.

Every reason to refuse a model is here: a target that matches nothing, a weight that two layers share, a layer that would
compute something else with a link, a quantised base to be merged into.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from cola_lightning.errors import UserError, nearest
from cola_lightning.lora.layer import DRAWS, FinishedLinks, Init, LoRALayer, cast_, is_quantized, lora_layers
from cola_lightning.lora.linear4bit import dequantize_, keep_layout
from cola_lightning.lora.registry import is_linear, layer_types, lora_class, obstacle

ALL_LINEAR = "all-linear"

log = logging.getLogger(__name__)

# Modules that do not multiply by their weights as a Linear layer does.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


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
        rank: largest rank of a link, and the first link's.
        alpha: updates are scaled by ``alpha / rank``.
        dropout: probability of dropping an input of A while training.
        modules_to_save: names or dotted name endings of fully trained modules (a new head).
        init: how A is drawn, see :meth:`LoRALayer.adapt_`.
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
    saved = _matches(model, list(modules_to_save), "model.modules_to_save")
    names = _linear_layers(model, saved) if target_modules == ALL_LINEAR else _matches(model, target_modules)
    targets = {name: model.get_submodule(name) for name in names}
    _check_not_shared(model, names, saved)
    classes = {name: _class_for(name, layer, finished_links) for name, layer in targets.items()}
    if inside := [name for name in names if is_inside(name, saved)]:
        raise UserError(f"model.modules_to_save: expected modules that hold no target, received the target {inside[0]!r}")

    model.requires_grad_(False)
    for module in model.modules():
        if is_quantized(module):
            keep_layout(module)
    for name, layer in targets.items():
        classes[name].adapt_(layer, rank, alpha, dropout, init, finished_links)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in lora_layers(module).values():
                layer.close_fused_paths()
    for name in saved:
        model.get_submodule(name).requires_grad_()
    return names


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
    lost = [name for name, layer in layers.items() if layer.has_begun or (layer.stack and layer.stack.rank)]
    if lost and not merge:
        raise UserError(f"merge: expected True, for layer {lost[0]!r} has links that would be lost; received False")
    dtypes = {name: dtype or _base_dtype(layer) for name, layer in layers.items()}
    stacked = unstack(model) if merge else {}
    for name, layer in lora_layers(model).items():
        if name in stacked:
            layer.add_finished_link(*stacked[name], 1.0)
        if merge:
            layer.finish(layer.scaling)
        layer.strip_()
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point():
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
    for name, value, is_valid, expected in (
        ("rank", rank, rank >= 1, "a whole number of at least 1"),
        ("alpha", alpha, 0 < alpha < math.inf, "a number above 0"),
        ("dropout", dropout, 0 <= dropout < 1, "a probability from 0 to below 1"),
        ("init", init, init in DRAWS, ", ".join(DRAWS)),
        ("finished_links", finished_links, finished_links in get_args(FinishedLinks), " or ".join(get_args(FinishedLinks))),
    ):
        if not is_valid:
            raise UserError(f"model.{name}: expected {expected}, received {value!r}")


def _linear_layers(model: nn.Module, saved: list[str]) -> list[str]:
    """The targets of all-linear; warns of matrices that stay frozen although they are used as a Linear's are (experts)."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()  # of a Hugging Face language model
    names: list[str] = []
    others: dict[str, str] = {}  # the first name of each class
    for name, module in model.named_modules():
        if module is head or is_inside(name, saved):
            continue
        if name and is_linear(module):
            names.append(name)
        elif not isinstance(module, NO_MATRICES) and any(p.dim() > 1 and len(p) > 1 for p in module.parameters(recurse=False)):
            others.setdefault(type(module).__name__, name)
    passed_over = ", ".join(f"{kind} ({name})" for kind, name in others.items())
    if not names:
        raise UserError(f"model.target_modules: expected linear layers for all-linear, received {passed_over or 'none'}")
    if passed_over:
        log.warning("model.target_modules: all-linear leaves matrices of other layers frozen: %s", passed_over)
    return names


def _matches(model: nn.Module, patterns: str | Sequence[str], field: str = "model.target_modules") -> list[str]:
    """Names of the modules that the patterns match; each pattern must match one."""
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if isinstance(patterns, str):
            try:
                hits = [name for name in named if re.fullmatch(pattern, name)]
            except re.error as error:
                raise UserError(f"{field}: expected a regular expression, received {pattern!r}: {error}") from error
        else:
            hits = [name for name in named if name == pattern or name.endswith(f".{pattern}")]
        if not hits:
            adaptable_first = sorted(named, key=lambda name: lora_class(named[name]) is None)
            near = nearest(pattern, dict.fromkeys(name.rpartition(".")[2] for name in adaptable_first))
            raise UserError(f"{field}: expected the name of a module of the model, received {pattern!r}{near}")
        found.update(hits)
    return [name for name in named if name in found]


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether this is the name of one of the modules, or of something inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def lies_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a name lies in one of the modules, which are given by their names or dotted name endings."""
    return any(f".{module}." in f".{name}." for module in modules)


def first_names(names: list[str]) -> str:
    """The first three names."""
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])


def _check_not_shared(model: nn.Module, targets: list[str], saved: list[str]) -> None:
    """Refuses weights that the model also uses elsewhere: adapting or training one would change, or miss, the other."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        groups[tensor.data_ptr() or id(tensor)].append(name)  # a view begins where the other does; 0 has no memory: meta, empty
    for shared in groups.values():
        adapted, trained = ([name for name in shared if is_inside(name, modules)] for modules in (targets, saved))
        if len(shared) > 1 and (adapted or 0 < len(trained) < len(shared)):
            field = "model.target_modules" if adapted else "model.modules_to_save"
            module = (adapted or trained)[0].rpartition(".")[0]
            raise UserError(
                f"{field}: expected modules with weights of their own, received {module!r}, whose weight is shared "
                f"({' = '.join(shared)})"
            )


def _class_for(name: str, layer: nn.Module, finished_links: FinishedLinks) -> type[LoRALayer]:
    """The LoRA class for a target, which must be a layer that can have links."""
    found = lora_class(layer)
    if found is None:
        raise UserError(
            f"model.target_modules: expected layers of type {layer_types()} (register_lora_layer adds others), received "
            f"{name!r}, which is a {type(layer).__name__}"
        )
    if (reason := obstacle(layer)) is not None:
        raise UserError(f"model.target_modules: expected layers to which a link can be added, received {name!r}, {reason}")
    if finished_links == "merge" and is_quantized(layer):
        raise UserError(f"model.finished_links: expected stack for the quantised weight of {name!r}, received merge")
    return found
