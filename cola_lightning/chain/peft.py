"""Chains as PEFT adapters: a PEFT LoRA is one link, and a whole chain is one LoRA of rank sum(r)."""

import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.chain.base import BaseIdentity
from cola_lightning.chain.chain import Chain
from cola_lightning.chain.link import Link, core_of_product
from cola_lightning.chain.store import check_version, link_fields
from cola_lightning.errors import UserError, one_line
from cola_lightning.lora.registry import is_linear

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."  # in the name of an adapted layer's own weight, which PEFT writes for embeddings and heads
LINKS_KEY = "cola_chain"  # in the safetensors metadata: the links whose factors are concatenated

# The fields of PEFT's configuration that are read here ...
READ = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# ... those that say which layers the tensors belong to, which the tensors' names also say ...
WITHOUT_MEANING = {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"}
WITHOUT_MEANING |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
# ... and those of training, of memory, of initialisations (see INITS), and those that have an effect only beside a field that
# is refused. Any other field that is set may change what an adapter computes.
WITHOUT_MEANING |= {"lora_dropout", "fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size"}
WITHOUT_MEANING |= {"eva_config", "corda_config", "loftq_config", "lora_ga_config"}
# Initialisations that leave the base unchanged; the others modify it, and the modified base is not available here.
INITS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal")


def adapter_config(folder: Path) -> dict[str, Any]:
    """The fields of an adapter's configuration.

    Raises:
        UserError: if the file cannot be read, or is not a JSON object.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"adapter: expected {CONFIG_NAME} of PEFT in {str(folder)!r}, received a file that cannot be read "
            f"({one_line(str(error))})"
        ) from error
    return config


def read_adapter(folder: str | Path) -> Chain:
    """An ordinary PEFT LoRA as a chain of one link; one that was exported from a chain, as that chain (equal up to rounding).

    Each layer's scaling is folded into B, and the factors are padded to the largest rank.

    Raises:
        UserError: for an adapter of another type, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    config = adapter_config(folder)
    try:
        with safe_open(folder / TENSORS_NAME, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            links = json.loads((file.metadata() or {}).get(LINKS_KEY, "null"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"adapter: expected {TENSORS_NAME} of PEFT in {str(folder)!r}, received a file that cannot be read "
            f"({one_line(str(error))})"
        ) from error
    if (kind := _other_kind(config)) is not None:
        raise UserError(f"adapter: expected an ordinary LoRA in {str(folder)!r}, received one with {kind}")

    pairs, extras = _sort(tensors, str(folder))
    try:
        link = _as_link(pairs, extras, config)
        if links is None:
            return Chain([link])
        check_version(links.get("format_version"), str(folder / TENSORS_NAME))
        return _split(link, links)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, re.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"adapter: expected a whole LoRA of PEFT in {str(folder)!r}, received a damaged one ({one_line(repr(error))})"
        ) from error


def _as_link(pairs: Mapping[str, tuple[Tensor, Tensor]], extras: dict[str, Tensor], config: dict[str, Any]) -> Link:
    """The factors as one link with the scaling, alpha / rank, folded into B.

    Raises:
        TypeError, ValueError: if the factors do not match the configuration.
    """
    rank = max(A.shape[0] for A, _ in pairs.values())
    factors = {}
    for name, pair in pairs.items():
        lora_A, lora_B = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in pair)
        scaling = _scaling(config, name, lora_A.shape[0])
        factors[name] = _padded(lora_A, lora_B * scaling, rank)
    return Link(index=0, rank=rank, alpha=float(rank), start_step=0, end_step=0, factors=factors, extras=extras)


def _other_kind(config: dict[str, Any]) -> str | None:
    """The setting that makes an adapter something other than an ordinary LoRA; None for an ordinary one."""
    if config.get("peft_type") != "LORA":
        return f"peft_type {config.get('peft_type')}"
    if config.get("bias", "none") != "none":
        return f"bias {config['bias']}"
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        return f"init_lora_weights {init}"
    unknown = {name: value for name, value in config.items() if value and name not in READ | WITHOUT_MEANING}
    return next((name for name, value in unknown.items() if value != _defaults().get(name)), None)


@functools.cache
def _defaults() -> dict[str, Any]:
    """The default values of PEFT's configuration; empty without peft."""
    try:
        from peft import LoraConfig
    except ImportError:
        return {}
    return dict(LoraConfig().to_dict())  # type: ignore[no-untyped-call]


def _sort(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The factors by layer, and other values by name: of fully trained modules, and of adapted embeddings and heads."""
    names = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    layers = [name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")]
    try:
        pairs = {layer: (names.pop(f"{layer}.lora_A.weight"), names.pop(f"{layer}.lora_B.weight")) for layer in layers}
    except KeyError as error:
        raise UserError(f"adapter: expected two factors for each layer in {where}, received none of {error}") from error
    unknown = [name for name in names if ".lora_" in name]
    unknown += [name for name, pair in pairs.items() if not _are_factors(*pair)]
    if not pairs or unknown:
        raise UserError(
            f"adapter: expected the factors of linear layers and convolutions in {where}, received {(unknown or ['none'])[0]!r}"
        )
    values = {_plain(name, pairs): tensor for name, tensor in names.items()}
    return {name: (A.flatten(1), B.flatten(1)) for name, (A, B) in pairs.items()}, values


def _plain(name: str, adapted: Collection[str]) -> str:
    """A value's name without PEFT's part in that of an adapted layer's own weight."""
    layer, _, rest = name.rpartition(BASE_LAYER)
    return f"{layer}.{rest}" if layer in adapted else name


def _are_factors(lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether these are two matrices of equal rank, or the kernels of two convolutions, the second of size 1."""
    return 2 <= lora_A.dim() == lora_B.dim() and len(lora_A) == lora_B.shape[1] and set(lora_B.shape[2:]) <= {1}


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    """PEFT's factor in front of B A; a pattern's keys are regular expressions for the end of a layer's name.

    Raises:
        TypeError, ValueError: if a value is not a number, or the layer's rank is not the configuration's.

    Source: ``peft.utils.other.get_pattern_key`` and ``peft.LoraConfig`` (8 is the default of ``r`` and ``lora_alpha``).
    """

    def value_of(field: str, pattern: str) -> Any:
        patterns = config.get(pattern) or {}
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config.get(field, 8))

    alpha, expected, is_root = value_of("lora_alpha", "alpha_pattern"), value_of("r", "rank_pattern"), config.get("use_rslora")
    if type(expected) is not int or expected != rank:
        raise ValueError(f"rank of {name!r} is {rank}, and not {expected!r}")
    if type(alpha) not in (int, float) or not isinstance(is_root, bool | None):
        raise TypeError(f"lora_alpha and use_rslora are {alpha!r} and {is_root!r}")
    return float(alpha / (rank**0.5 if is_root else rank))


def _padded(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product at a larger rank."""
    missing = rank - lora_A.shape[0]
    return torch.nn.functional.pad(lora_A, (0, 0, 0, missing)), torch.nn.functional.pad(lora_B, (0, missing))


# ---------------------------------------------------------------------- a chain as an adapter


def concatenate(chain: Chain) -> dict[str, tuple[Tensor, Tensor]]:
    """The whole chain as one pair of factors per layer: A's rows and the scaled B's columns, link after link.

    Shape:
        A: sum(r) x in; B: out x sum(r), in float32; zeros where a link does not adapt the layer.
    """
    factors = {}
    for name in chain.layers:
        shapes = ((A.shape[1], B.shape[0]) for A, B in (link.factors[name] for link in chain.links if name in link.factors))
        n_in, n_out = next(shapes)
        parts = [link.factors.get(name, (torch.zeros(link.rank, n_in), torch.zeros(n_out, link.rank))) for link in chain.links]
        lora_B = torch.cat([B * link.scaling for (_, B), link in zip(parts, chain.links, strict=True)], dim=1)
        factors[name] = torch.cat([A for A, _ in parts]).float(), lora_B.float()
    return factors


def compress(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A by a smaller rank, and its relative error in the Frobenius norm.

    Shape:
        A: rank x in; B: out x rank.

    Source: Eckart and Young (1936).
    """
    q, core, p = core_of_product(lora_A, lora_B)
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    total = float(torch.linalg.vector_norm(values))
    error = float(torch.linalg.vector_norm(values[rank:])) / total if total else 0.0
    root = values[:rank].sqrt()
    smaller = (root[:, None] * (v[:rank] @ p.T)).float(), (q @ u[:, :rank] * root).float()
    return *_padded(*smaller, rank), error  # a layer's side may be smaller than the rank


def _split(whole: Link, description: Mapping[str, Any]) -> Chain:
    """Splits concatenated factors into the links of a description.

    Raises:
        LookupError, TypeError, ValueError: if the description does not match the factors.
    """
    links, start = [], 0
    described = [link_fields(facts) for facts in description["links"]]
    if sum(facts["rank"] for facts in described) != whole.rank or [f["index"] for f in described] != list(
        range(len(described))
    ):
        raise ValueError(f"the links are not those of rank {whole.rank} in all")
    for facts in described:
        end, scaling = start + facts["rank"], facts["alpha"] / facts["rank"]
        factors = {name: (A[start:end], B[:, start:end] / scaling) for name, (A, B) in whole.factors.items()}
        links.append(Link(**facts, factors=factors, extras=whole.extras if end == whole.rank else {}))
        start = end
    return Chain(links, BaseIdentity(**description["base"]))


def saved_by_peft(base: nn.Module, layers: Iterable[str], modules_to_save: Iterable[str]) -> list[str]:
    """The modules that PEFT loads whole from an adapter with these ``modules_to_save``: it matches the ends of names.

    Args:
        base: the plain model.
        layers: the adapted layers.
        modules_to_save: names or dotted name endings.

    Returns:
        Names that make PEFT load exactly these modules: the requested ones, and others whose names end in one of them.

    Raises:
        UserError: if one of them is, contains, or is part of another adapted or saved module.

    Source: ``peft.utils.other._set_trainable``, and ``PeftModelForSequenceClassification``, which adds two endings.
    """
    requested = tuple(modules_to_save)
    names = [name for name, _ in base.named_modules() if name]
    wanted = tuple(name for name in names if name in requested or name.endswith(tuple(f".{one}" for one in requested)))
    endings = (*wanted, *(("classifier", "score") if _task(base) == "SEQ_CLS" else ()))
    saved = [name for name in names if name.endswith(endings)]
    for name in saved:
        others = [*layers, *(other for other in saved if other != name)]
        if any(f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") for other in others):
            ending = next(one for one in endings if name.endswith(one))
            raise UserError(
                f"format: expected merged, for PEFT matches {name!r} by {ending!r}, and it, or a module in or around it, is "
                "adapted or saved as well; received peft"
            )
    return saved


def _task(base: nn.Module) -> str | None:
    kinds = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    return next((task for ending, task in kinds.items() if type(base).__name__.endswith(ending)), None)


def peft_config(
    base: nn.Module, layers: list[str], rank: int, modules_to_save: list[str], base_name: str, revision: str | None
) -> Any:
    """The ``LoraConfig`` of an adapter whose scaling is 1.

    Raises:
        UserError: if peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("format: expected the package peft, received none: pip install peft") from error
    modules = dict(base.named_modules())
    return LoraConfig(
        task_type=_task(base),
        base_model_name_or_path=base_name,
        revision=revision,
        r=rank,
        lora_alpha=rank,
        target_modules=_target_modules(layers, list(modules)),
        modules_to_save=modules_to_save or None,
        fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in layers),
        inference_mode=True,
    )


def _target_modules(layers: list[str], modules: list[str]) -> list[str] | str:
    """``target_modules`` that match exactly these layers in PEFT: last parts of their names, else full names, else a regex."""
    for names in (sorted({name.rpartition(".")[2] for name in layers}), layers):
        endings = tuple(f".{name}" for name in names)
        if {name for name in modules if name in names or name.endswith(endings)} == set(layers):
            return names
    return "|".join(map(re.escape, layers))


def as_peft_weights(base: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors in PEFT's shapes: a convolution's are kernels, of rank x in x kernel and out x rank x 1.

    Args:
        base: the plain model.
        factors: A and B by layer, as matrices.

    Raises:
        UserError: for a layer that PEFT does not adapt, or adapts differently.

    Source: ``peft.tuners.lora.layer``, ``_ConvNd.update_layer`` (0.21: it makes A without the layer's dilation).
    """
    weights, modules = dict(factors), dict(base.named_modules())
    for name, (lora_A, lora_B) in factors.items():
        layer = modules[name]
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            if set(layer.dilation) != {1}:
                raise UserError(
                    f"format: expected merged, for PEFT's LoRA has no dilation, and that of {name!r} is {layer.dilation}; "
                    "received peft"
                )
            size = layer.kernel_size
            weights[name] = lora_A.reshape(-1, layer.in_channels, *size), lora_B[(..., *[None] * len(size))]
        elif not is_linear(layer):
            raise UserError(
                f"format: expected merged, for no LoRA of PEFT is known for {name!r}, a {type(layer).__name__}; received peft"
            )
    return weights


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    whole: Mapping[str, Tensor],
    config: Any,
    description: Mapping[str, Any] | None,
) -> None:
    """Writes the two files of an adapter into a folder.

    Args:
        folder: the folder.
        factors: A and B by layer, with scaling 1, from :func:`as_peft_weights`.
        whole: the fully trained parameters, by name.
        config: the ``LoraConfig``.
        description: the chain's :func:`~cola_lightning.chain.store.describe`; None if the factors are not a chain's.
    """
    from safetensors.torch import save_file

    tensors = {f"{PREFIX}{name}": value for name, value in whole.items()}
    for name, pair in factors.items():
        tensors |= {f"{PREFIX}{name}.lora_{factor}.weight": value for factor, value in zip("AB", pair, strict=True)}
    metadata = {"format": "pt"} | ({LINKS_KEY: json.dumps(description)} if description else {})
    config.save_pretrained(str(folder))
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, folder / TENSORS_NAME, metadata)
