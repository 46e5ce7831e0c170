"""Which base a chain was trained on: its name, a fingerprint of its weights, and the checks of a base against it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cola_lightning.adapt import lora_layers
from cola_lightning.errors import UserError

SAMPLED_VALUES = 64  # of each adapted layer's weight


def describe_base(model: nn.Module, name: str = "") -> dict[str, Any]:
    """What identifies the base under a model's LoRA layers before any link is merged.

    Args:
        model: an adapted model without any link in its weights.
        name: what people call it: a hub id, say.

    Returns:
        ``name``; ``fingerprint``: a hash of the adapted layers' names, shapes and a sample of their values; ``dtypes``: the
        dtypes they came in (``nf4``, ``fp4``: 4 bits); ``weight_norms``: the Frobenius norm of each weight, by name.
    """
    digest = hashlib.sha256()
    layers = lora_layers(model)
    norms = {}
    for layer_name, layer in layers.items():
        weight = layer.full_weight()
        generator = torch.Generator("cpu").manual_seed(0)
        places = torch.randint(weight.numel(), (SAMPLED_VALUES,), generator=generator, device="cpu")
        sample = weight.flatten()[places.to(weight.device)].cpu().double()
        digest.update(f"{layer_name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms[layer_name] = float(torch.linalg.vector_norm(weight, dtype=wide))
    dtypes = sorted({layer.source_dtype for layer in layers.values()})
    return {"name": name, "fingerprint": digest.hexdigest(), "dtypes": dtypes, "weight_norms": norms}


def check_same_base(expected: Mapping[str, Any], received: Mapping[str, Any]) -> None:
    """Refuses a base on which the chain was not trained.

    Args:
        expected: what :func:`describe_base` said of the chain's base.
        received: what it says of this one.

    Raises:
        UserError: if it has other adapted layers, another dtype, or other values.
    """
    check_same_layers(expected["weight_norms"], received["weight_norms"])
    if expected["dtypes"] != received["dtypes"]:
        raise UserError(
            f"base: expected one in {' and '.join(expected['dtypes'])}, in which the chain was trained, "
            f"received one in {' and '.join(received['dtypes'])}"
        )
    if expected["fingerprint"] != received["fingerprint"]:
        raise UserError(
            f"base: expected the one on which the chain was trained, {_named(expected)}, received another, "
            f"{_named(received)}: the same model, revision, seed and target_modules are needed, or save_base: true in training"
        )


def _named(base: Mapping[str, Any]) -> str:
    return f"{base['name']!r} (fingerprint {base['fingerprint'][:12]})"


def check_same_layers(expected: Mapping[str, Any], received: Mapping[str, Any]) -> None:
    """Refuses a model in which other layers are adapted than in the one that the chain was trained on.

    Args:
        expected: something for each layer of the chain, by name.
        received: something for each adapted layer of this model, by name.

    Raises:
        UserError: naming a layer that is adapted in one of them alone.
    """
    if missing := sorted(expected.keys() - received.keys()):
        raise UserError(f"model.target_modules: expected the chain's layers, with {missing[0]!r}, received none such")
    if unknown := sorted(received.keys() - expected.keys()):
        raise UserError(f"model.target_modules: expected the chain's layers alone, received {unknown[0]!r} too")
