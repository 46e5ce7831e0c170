"""Chains as PEFT adapters: a PEFT LoRA is one link, and a whole chain is one LoRA of rank sum(r)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from cola_lightning.chain.base import BaseIdentity
from cola_lightning.chain.chain import Chain, Link, check_version, damage_refused, link_fields
from cola_lightning.errors import UserError
from cola_lightning.lora.config import value_of
from cola_lightning.lora.experts import PROJECTIONS

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."  # in the name of an adapted layer's own weight, which PEFT writes for embeddings and heads
LINKS_KEY = "cola_chain"  # in the safetensors metadata: the links whose factors are concatenated

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


def read_adapter(folder: str | Path) -> Chain:
    """An ordinary PEFT LoRA as a chain of one link; one that was exported from a chain, as that chain (equal up to rounding).

    Each layer's scaling is folded into B, and the factors are padded to the largest rank.

    Raises:
        UserError: for an adapter of another type, or a damaged one.
    """
    folder = Path(folder)
    with damage_refused(f"adapter: the LoRA in {str(folder)!r}"):
        config = {"peft_type": None, **json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))}
        for name, value in config.items():
            if value not in ORDINARY[name] if name in ORDINARY else value and name not in HARMLESS:
                raise UserError(f"adapter: {str(folder)!r} is not an ordinary LoRA: it has {name} {value!r}")
        with safe_open(folder / TENSORS_NAME, "pt") as file:
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            description = json.loads((file.metadata() or {}).get(LINKS_KEY, "null"))
        link = _as_link(tensors, config, str(folder))
        return Chain([link]) if description is None else _split(link, description, str(folder / TENSORS_NAME))


def _as_link(tensors: dict[str, Tensor], config: dict[str, Any], where: str) -> Link:
    """The factors as one link with the scaling folded into B; what else the adapter holds are fully trained values.

    Raises:
        UserError: for factors of something other than linear layers and convolutions.
        LookupError, TypeError, ValueError: if the factors do not match the configuration.
    """
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    pairs = {name: (tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")) for name in layers}
    unknown = [name for name in tensors if ".lora_" in name]
    unknown += [name for name, (lora_A, lora_B) in pairs.items() if len(lora_A) != lora_B.shape[1]]  # of groups
    if not pairs or unknown:
        raise UserError(
            f"adapter: {where} may contain only factors of linear layers and convolutions, got {(unknown or ['none'])[0]!r}"
        )
    scaled = {}
    for name, pair in pairs.items():
        lora_A, lora_B = (value.flatten(1).to(torch.promote_types(value.dtype, torch.float32)) for value in pair)
        if len(lora_A) != _value_of(config, name, "r", "rank_pattern") and (projection := _projection(config, name)):
            name, own = projection, _value_of(config, projection, "r", "rank_pattern")
            lora_A, lora_B = lora_A.view(-1, own, lora_A.shape[1]), lora_B.view(len(lora_B), own, -1).permute(2, 0, 1)
        alpha, own = _value_of(config, name, "lora_alpha", "alpha_pattern"), lora_A.shape[-2]
        scaled[name] = lora_A, lora_B * float(alpha / (own**0.5 if config.get("use_rslora") else own))
    rank, factors = max(lora_A.shape[-2] for lora_A, _ in scaled.values()), {}
    for name, (lora_A, lora_B) in scaled.items():
        missing = rank - lora_A.shape[-2]
        factors[name] = F.pad(lora_A, (0, 0, 0, missing)), F.pad(lora_B, (0, missing))
    extras = {}
    for name, value in tensors.items():
        layer, _, rest = name.rpartition(BASE_LAYER)
        extras[f"{layer}.{rest}" if layer in pairs else name] = value
    return Link(index=0, rank=rank, alpha=float(rank), start_step=0, end_step=0, factors=factors, extras=extras)


def _projection(config: dict[str, Any], name: str) -> str | None:
    """The experts' projection whose factors have this name in an adapter; None for those of a layer.

    PEFT wraps the experts module once for each parameter, the last one outside.

    Source: ``peft.tuners.lora.layer.ParamWrapper``.
    """
    experts, targets = re.sub(r"(\.base_layer)+$", "", name), config.get("target_parameters") or ()
    wrapped = [one for one in PROJECTIONS if any(f".{experts}.{one}".endswith(f".{target}") for target in targets)]
    return f"{experts}.{wrapped[-1 - name.count('.base_layer', len(experts))]}" if wrapped else None


def _value_of(config: dict[str, Any], name: str, field: str, pattern: str) -> Any:
    """A layer's value of a field that has patterns.

    Source: ``peft.LoraConfig`` (8 is the default of ``r`` and ``lora_alpha``).
    """
    return value_of(config.get(pattern), name, config.get(field, 8))


def _split(whole: Link, description: Mapping[str, Any], where: str) -> Chain:
    """Splits concatenated factors into the links of a description.

    Raises:
        UserError: for an unknown format version.
        LookupError, TypeError, ValueError: if the description does not match the factors.
    """
    check_version(description.get("format_version"), where)
    chain, described = Chain(base=BaseIdentity(**description["base"])), list(map(link_fields, description["links"]))
    ends = dict.fromkeys(whole.factors, 0)
    for fields in described:
        link = Link(**fields, factors={}, extras=whole.extras if fields is described[-1] else {})
        for name, (lora_A, lora_B) in whole.factors.items():
            start = ends[name]
            end = ends[name] = start + link.own_values.get(name, (link.rank, None))[0]
            link.factors[name] = lora_A[..., start:end, :].clone(), lora_B[..., start:end] / link.scaling(name)
        chain.append(link)
    return chain
