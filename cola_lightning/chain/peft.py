"""Chains as PEFT adapters: a PEFT LoRA is read as one link, and a whole chain is written as one LoRA of rank sum(r).

Each fact about PEFT's format stands here once, next to the function that reads it and the one that writes it.
"""

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cola_lightning.chain.chain import Chain, Link, damage_refused, factors_of_sum, is_of_experts
from cola_lightning.errors import UserError
from cola_lightning.lora.attention import reads_weights
from cola_lightning.lora.config import value_of
from cola_lightning.lora.experts import PROJECTIONS, is_experts
from cola_lightning.lora.inject import is_linear

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"  # in the names of what PEFT has wrapped: an adapted layer's own weight, or an inner wrapper
FACTORS = ".lora_A.weight", ".lora_B.weight"  # end the names of a layer's two factors

# The values of an ordinary LoRA; the initialisations are those that leave the base unchanged: a modified one is not available.
ORDINARY = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Any other field of PEFT's configuration that is set may change what an adapter computes, except those that are read here ...
HARMLESS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# ... those that say which layers the tensors belong to, which the tensors' names also say ...
HARMLESS |= {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"}
HARMLESS |= {"target_modules", "target_parameters", "exclude_modules"}
HARMLESS |= {"layers_to_transform", "layers_pattern", "modules_to_save"}
# ... and those of training, of memory, of initialisations, and those without an effect unless a refused field is set.
HARMLESS |= {"lora_dropout", "fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size"}
HARMLESS |= {"eva_config", "corda_config", "loftq_config", "lora_ga_config"}

# The last parts of the names of layers which, in a model with experts, PEFT takes for layers that transformers 4 had for each
# expert. Source: ``peft.utils.transformers_weight_conversion`` (0.21).
RENAMED = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------------- experts


def experts_to_peft(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of an experts' projection in PEFT's shapes: in A one expert after the other, in B one rank after the other.

    Shape:
        A: experts x rank x in -> (experts x rank) x in; B: experts x out x rank -> out x (rank x experts).

    Source: ``peft.tuners.lora.layer.ParamWrapper`` (0.21).
    """
    return lora_A.flatten(end_dim=1), lora_B.movedim(0, -1).flatten(start_dim=1)


def experts_from_peft(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`experts_to_peft`, for this rank."""
    return lora_A.view(-1, rank, lora_A.shape[1]), lora_B.view(len(lora_B), rank, -1).movedim(-1, 0)


def wrapper_names(experts: str, parameters: Sequence[str]) -> dict[str, str]:
    """PEFT's names for an experts module's parameters with a LoRA: it wraps the module for each of them, the last one outside.

    Example:
        >>> wrapper_names("mlp.experts", ["gate_up_proj", "down_proj"])
        {'mlp.experts.down_proj': 'mlp.experts', 'mlp.experts.gate_up_proj': 'mlp.experts.base_layer'}

    Source: ``peft.tuners.lora.layer.ParamWrapper`` (0.21).
    """
    return {f"{experts}.{name}": experts + BASE_LAYER * place for place, name in enumerate(reversed(parameters))}


# ---------------------------------------------------------------------- reading


def read_adapter(folder: str | Path) -> Chain:
    """An ordinary PEFT LoRA as a chain of one link.

    It has the adapter's rank and alpha, and those of its patterns.

    Raises:
        UserError: for an adapter of another type, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / TENSORS_NAME).exists() and (folder / "adapter_model.bin").exists():
        raise UserError(f"adapter: {str(folder)!r} has a pickle, adapter_model.bin. Load it with peft, and save it again")
    with damage_refused(f"adapter: the LoRA in {str(folder)!r}"):
        config = {"peft_type": None, **read_config(folder)}
        for name, value in config.items():
            if value not in ORDINARY[name] if name in ORDINARY else value and name not in HARMLESS:
                raise UserError(f"adapter: {str(folder)!r} is not an ordinary LoRA: it has {name} {value!r}")
        with safe_open(folder / TENSORS_NAME, "pt") as file:
            names = {name: _plain(name) for name in file.keys()}  # noqa: SIM118  # no dict
            tensors = {name: file.get_tensor(key) for key, name in names.items() if ".original_module." not in name}
        return Chain([_as_link(tensors, config, str(folder))])


def _plain(name: str) -> str:
    """A tensor's name without what PEFT and ``torch.compile`` add to it.

    Source: ``peft.utils.other.ModulesToSaveWrapper``, whose names are stored for resized embeddings (0.21).
    """
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", name.replace("_orig_mod.", "").removeprefix(PREFIX))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter."""
    return dict(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))


def _as_link(tensors: dict[str, Tensor], config: dict[str, Any], where: str) -> Link:
    """The factors as one link; what else the adapter holds are fully trained values.

    Raises:
        UserError: for factors of something other than linear layers and convolutions.
        LookupError, TypeError, ValueError: if the factors do not match the configuration.
    """
    layers = [name.removesuffix(FACTORS[0]) for name in tensors if name.endswith(FACTORS[0])]
    pairs = {name: (tensors.pop(name + FACTORS[0]), tensors.pop(name + FACTORS[1])) for name in layers}
    unknown = [name for name in tensors if ".lora_" in name]
    unknown += [name for name, (lora_A, lora_B) in pairs.items() if len(lora_A) != lora_B.shape[1]]  # of groups
    if not config.get("target_parameters"):
        unknown += [name for name in pairs if BASE_LAYER in name]  # of nn.MultiheadAttention
    if not pairs or unknown:
        raise UserError(
            f"adapter: {where} may contain only factors of linear layers and convolutions, got {(unknown or ['none'])[0]!r}"
        )
    rank, alpha = int(operator.index(config.get("r", 8))), float(config.get("lora_alpha", 8))
    link = Link(0, rank=rank, alpha=alpha, start_step=0, end_step=0, factors={})
    for name, pair in pairs.items():
        lora_A, lora_B = (value.flatten(1).to(torch.promote_types(value.dtype, torch.float32)) for value in pair)
        layer = name
        if len(lora_A) != value_of_layer(config, name, "r", "rank_pattern") and (projection := projection_of(config, name)):
            layer = projection
            lora_A, lora_B = experts_from_peft(lora_A, lora_B, value_of_layer(config, layer, "r", "rank_pattern"))
        alpha, rank = value_of_layer(config, layer, "lora_alpha", "alpha_pattern"), lora_A.shape[-2]
        link.factors[layer] = lora_A, lora_B
        size = rank, float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
        if size != link.size_of(layer):
            link.own_sizes[layer] = size
    for name, value in tensors.items():
        layer, _, parameter = name.rpartition(f"{BASE_LAYER}.")
        link.extras[f"{layer}.{parameter}" if layer in pairs else name] = value
    return link


def projection_of(config: dict[str, Any], name: str) -> str | None:
    """The experts' projection whose factors have this name in an adapter; None for those of a layer."""
    experts, targets = re.sub(rf"({re.escape(BASE_LAYER)})+$", "", name), config.get("target_parameters") or ()
    wrapped = [part for part in PROJECTIONS if any(f".{experts}.{part}".endswith(f".{target}") for target in targets)]
    return {wrapper: projection for projection, wrapper in wrapper_names(experts, wrapped).items()}[name] if wrapped else None


def value_of_layer(config: Mapping[str, Any], name: str, field: str, pattern: str) -> Any:
    """A layer's value of a field: that of the first pattern that matches its name, or else that of all layers.

    Source: ``peft.LoraConfig`` (8 is the default of ``r`` and ``lora_alpha``).
    """
    targets = config.get("target_parameters") or ()  # PEFT matches a pattern with the parameter's name
    end = ".weight" if any(f".{name}.weight".endswith(f".{target}") for target in targets) else ""
    return value_of(config.get(pattern), name + end, config.get(field, 8))


# ---------------------------------------------------------------------- writing


@dataclass(frozen=True)
class AdapterBase:
    """The base of an adapter.

    Attributes:
        model: the plain model without any link.
        name: where PEFT finds it; None: by no name.
        modules_to_save: names, or dotted name endings, of modules that were fully trained, or are not in the named base.
        revision: on the hub.
        task: PEFT's name for its task; None: PEFT has none.
    """

    model: nn.Module
    name: str | None
    modules_to_save: Sequence[str]
    revision: str | None = None
    task: str | None = None


def concatenate(chain: Chain) -> dict[str, tuple[Tensor, Tensor]]:
    """The whole chain as one pair of factors per layer: A's rows and the scaled B's columns, link after link.

    Shape:
        A: sum(r) x in; B: out x sum(r), in float32.
    """
    factors = {}
    for name in chain.layers:
        lora_A, lora_B = factors_of_sum(chain.link_factors(name))
        factors[name] = lora_A.float(), lora_B.float()
    return factors


def write_adapter(folder: Path, chain: Chain, base: AdapterBase, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Writes factors, and the fully trained values of a chain's last link, as an adapter that :func:`read_adapter` reads.

    Args:
        folder: an empty folder.
        chain: the chain, of whose last link the values are.
        base: the adapter's base.
        factors: A and the scaled B by layer, see :func:`concatenate`.

    Raises:
        UserError: for a layer or a value that an adapter cannot hold.
    """
    weights = as_peft_weights(base.model, factors)
    config = peft_config(base, factors)
    tensors = _saved_values(chain, base.model, config.modules_to_save or ())
    for name, pair in weights.items():
        tensors |= {name + ending: factor for ending, factor in zip(FACTORS, pair, strict=True)}
    tensors = {f"{PREFIX}{name}": value.clone().contiguous() for name, value in tensors.items()}
    config.save_pretrained(str(folder))
    save_file(tensors, folder / TENSORS_NAME, {"format": "pt"})


def as_peft_weights(base: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors by PEFT's names and in its shapes: those of a convolution are kernels, others as PEFT wraps modules.

    Args:
        base: the plain model.
        factors: A and B by layer, as matrices.

    Shape:
        A convolution's A: rank x in x kernel; B: out x rank x 1.

    Raises:
        UserError: for a layer that PEFT does not adapt, or adapts differently.

    Source: ``peft.tuners.lora.layer``, ``_ConvNd.update_layer`` (0.21: it makes A without the layer's dilation).
    """
    weights = {}
    for name, (lora_A, lora_B) in factors.items():
        if is_of_experts(lora_A):
            experts = name.rpartition(".")[0]
            parameters = base.get_submodule(experts).named_parameters(recurse=False)
            wrappers = wrapper_names(experts, [key for key, _ in parameters if f"{experts}.{key}" in factors])
            weights[wrappers[name]] = experts_to_peft(lora_A, lora_B)
            continue
        if reads_weights(base.get_submodule(name.rpartition(".")[0])):
            raise UserError(f"format: PEFT's LoRA has no effect in {name!r}, because the model reads its weight. Use merged")
        layer: Any = base.get_submodule(name)
        is_convolution = isinstance(layer, nn.Conv1d | nn.Conv2d)
        if (is_convolution and set(layer.dilation) != {1}) or not (is_convolution or is_linear(layer)):
            what = f"PEFT has no LoRA, or another, for {name!r}, a {layer}"
            raise UserError(f"format: {what}. Use merged")
        if is_convolution:
            size = layer.kernel_size
            lora_A, lora_B = lora_A.reshape(-1, layer.in_channels, *size), lora_B[(..., *[None] * len(size))]
        weights[name] = lora_A, lora_B
    return weights


def peft_config(base: AdapterBase, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """The ``LoraConfig`` of an adapter whose scaling is 1.

    ``target_modules`` are the last parts of the layers' names, if these match no other layer, else an expression for the full
    names; ``target_parameters`` are the names of the experts' projections, and the weights of layers that PEFT would take for
    experts by their names, in addition to any (``RENAMED``).
    """
    from peft import LoraConfig

    modules = dict(base.model.named_modules())
    has_experts = any(map(is_experts, modules.values()))
    projections = [name for name, (lora_A, _) in factors.items() if is_of_experts(lora_A)]
    layers = [name for name in factors if name not in projections]
    renamed = [name for name in layers if has_experts and name.rpartition(".")[2] in RENAMED]
    layers = [name for name in layers if name not in renamed]
    endings = sorted({name.rpartition(".")[2] for name in layers})
    matched = {name for name in modules if name.rpartition(".")[2] in endings}
    ranks = {name: lora_A.shape[-2] for name, (lora_A, _) in factors.items()}
    rank = max(ranks.values())
    names = {name: re.escape(f"{name}.weight" if name in renamed else name) for name in ranks}
    patterns = {f"^{names[name]}": smaller for name, smaller in ranks.items() if smaller != rank}
    return LoraConfig(
        task_type=base.task,
        base_model_name_or_path=base.name,
        revision=base.revision,
        r=rank,
        lora_alpha=rank,
        rank_pattern=patterns,
        alpha_pattern=patterns,
        target_modules=endings if matched == set(layers) else "|".join(map(re.escape, layers)),
        target_parameters=[*projections, *(f"{name}.weight" for name in renamed)] or None,
        modules_to_save=_modules_saved_by_peft(base) or None,
        fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in layers),
        inference_mode=True,
    )


def _modules_saved_by_peft(base: AdapterBase) -> list[str]:
    """The modules that PEFT loads whole from an adapter of this base: it matches the ends of names.

    Source: ``peft.utils.other._set_trainable``, and ``PeftModelForSequenceClassification``, which adds two endings.
    """
    names = [name for name, _ in base.model.named_modules() if name]
    wanted = [name for name in names if f".{name}".endswith(tuple(f".{module}" for module in base.modules_to_save))]
    added = ("classifier", "score") if base.task == "SEQ_CLS" else ()
    return [name for name in names if name.endswith((*wanted, *added))]


def _saved_values(chain: Chain, base: nn.Module, saved: Sequence[str]) -> dict[str, Tensor]:
    """The values of an adapter's saved modules: the trained ones, or else the base's.

    Raises:
        UserError: for a value elsewhere that training has changed: PEFT has no place for it.
    """
    state, trained = base.state_dict(), chain.links[-1].extras
    starts = tuple(f"{name}." for name in saved)
    values = {name: trained.get(name, value) for name, value in state.items() if name.startswith(starts)}
    if changed := [
        name for name, value in trained.items() if name in state.keys() - values.keys() and not torch.equal(state[name], value)
    ]:
        raise UserError(f"format: training has changed {changed[0]!r}, which an adapter cannot store. Use merged")
    return values
