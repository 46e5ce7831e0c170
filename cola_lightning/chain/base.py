"""The base that a chain was trained on: its identity, a name with fingerprints of its values, and the checks against it."""

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cola_lightning import layout
from cola_lightning.errors import UserError
from cola_lightning.lora.layer import lora_layers, names_of_factors

SAMPLED_VALUES = 64  # per parameter and buffer


@dataclass(frozen=True)
class BaseIdentity:
    """What identifies the base under a model's LoRA layers, before any link is merged.

    Attributes:
        name: the model's name, such as a hub id.
        fingerprint: a hash of what is known of ``values``; empty if the base is unknown.
        dtypes: their original dtypes (``nf4``, ``fp4``: 4 bits).
        weight_norms: the Frobenius norm of each adapted weight, by the layer's name.
        values: a hash of shape and sampled values for each parameter and persistent buffer, by name; None if it is trained.
        labels: a classifier's labels, in the order of its outputs; None: not known.
    """

    name: str = ""
    fingerprint: str = ""
    dtypes: list[str] = field(default_factory=list)
    weight_norms: dict[str, float] = field(default_factory=dict)
    values: dict[str, str | None] = field(default_factory=dict)
    labels: list[str] | None = None

    def __str__(self) -> str:
        return f"{self.name!r} (fingerprint {self.fingerprint[:12]})"


def describe_base(model: nn.Module, name: str = "") -> BaseIdentity:
    """The identity of an adapted model's base.

    Args:
        model: an adapted model with no link merged into its weights.
        name: the model's name.
    """
    layers, norms = lora_layers(model), dict[str, float]()
    for layer_name, layer in layers.items():
        weight = layer.full_weight()
        compute_dtype = torch.promote_types(weight.dtype, torch.float32)
        norms[layer_name] = float(torch.linalg.vector_norm(weight, dtype=compute_dtype))
    dtypes = sorted({layer.source_dtype for layer in layers.values()})
    named = model.named_parameters(remove_duplicate=False)
    trained = set(layout.plain_names(key for key, parameter in named if parameter.requires_grad))
    values = {key: None if key in trained else hash_of(value) for key, value in base_values(model).items()}
    known = sorted((key, value) for key, value in values.items() if value is not None)
    return BaseIdentity(name, hashlib.sha256(repr(known).encode()).hexdigest(), dtypes, norms, values)


def fingerprint_of(values: Mapping[str, Tensor]) -> str:
    """A hash of tensors' names, shapes and samples of their values."""
    hashes = "".join(f"{name} {hash_of(values[name])}\n" for name in sorted(values))
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def hash_of(value: Tensor) -> str:
    """A hash of a tensor's shape and of a sample of its values, in float64: the same whichever wider dtype stores them."""
    sample = value.detach().flatten()
    if value.numel() > SAMPLED_VALUES:
        places = torch.randint(value.numel(), (SAMPLED_VALUES,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        sample = sample[places.to(value.device)]
    numbers = torch.view_as_real(sample) if sample.is_complex() else sample
    return hashlib.sha256(f"{tuple(value.shape)}".encode() + numbers.cpu().double().numpy().tobytes()).hexdigest()[:16]


def check_same_base(expected: BaseIdentity, received: BaseIdentity) -> None:
    """Refuses a base on which the chain was not trained, or that ``build_model`` made again with other values.

    Args:
        expected: the chain's base.
        received: this model's.

    Raises:
        UserError: if the adapted layers, the labels, the dtypes or the values differ.
    """
    check_layers(expected.weight_norms, received.weight_norms)
    check_layers(received.weight_norms, expected.weight_norms, "the chain")
    if None not in (expected.labels, received.labels) and expected.labels != received.labels:
        raise UserError(f"model.label_names: must be {expected.labels}, on which the chain was trained, got {received.labels}")
    mine, theirs = received.values, expected.values
    alone = mine.keys() ^ theirs.keys()
    changed = {name for name in mine.keys() - alone if mine[name] != theirs[name] and None not in (mine[name], theirs[name])}
    if expected.dtypes != received.dtypes:
        where = f"in {' and '.join(received.dtypes)} and not in {' and '.join(expected.dtypes)}"
    elif different := sorted(alone) + sorted(changed):
        what = "with other values of" if different[0] in changed else "with" if different[0] in mine else "without"
        where = f"{what} {different[0]!r}" + (f" and {len(different) - 1} more" if len(different) > 1 else "")
    else:
        return
    raise UserError(
        f"base: the chain was trained on another base: on {expected}, and this is {received}, {where}. Use the same model, "
        "revision, seed and target_modules, and a build_model that makes the same base again (it may draw from the global "
        "generators, which are seeded for it). One that is trained there is best stored in a file"
    )


def check_unchanged(model: nn.Module, base: BaseIdentity, merged: Collection[str]) -> None:
    """Refuses a model whose frozen parameters are not those of its base: checkpoints do not contain them.

    Args:
        model: an adapted model that is not sharded.
        base: its base, as ``build_model`` made it.
        merged: the layers whose weights may hold finished links.

    Raises:
        UserError: naming a parameter.
    """
    values = base_values(model)
    for name, parameter in model.named_parameters():
        expected = base.values.get(name)
        if parameter.requires_grad or expected is None or name.removesuffix(".weight") in merged:
            continue
        if name in values and hash_of(parameter) != expected:
            raise UserError(
                f"model: {name!r} has other values than in the model that build_model() returned. Checkpoints do not contain "
                "frozen weights, so load them in build_model(), and not later, in setup() for example"
            )


def check_layers(layers: Collection[str], received: Collection[str], whose: str = "this module") -> None:
    """Refuses a model, or a chain, that does not adapt all layers; it may adapt more.

    Args:
        layers: the names of the layers.
        received: the names of the layers that are adapted.
        whose: what adapts them, for the message.

    Raises:
        UserError: naming a layer.
    """
    if missing := [name for name in layers if name not in received]:
        raise UserError(f"model.target_modules: must name the layers of the chain, but {whose} does not adapt {missing[0]!r}")


def check_same_norms(expected: BaseIdentity, received: BaseIdentity, sizes: Mapping[str, int]) -> None:
    """Refuses a base whose weights have other norms than those of a chain, whose base's other values may not be known.

    A norm may differ by what another dtype changes. Rounding n values to bfloat16 changes their norm by about 0.002 / sqrt(n),
    or by a few times more where some values are much larger than others.

    Args:
        expected: the chain's base.
        received: this base.
        sizes: the number of values of each adapted weight, by the layer's name.

    Raises:
        UserError: naming a layer.
    """
    is_in_4_bits = not {"nf4", "fp4"}.isdisjoint([*expected.dtypes, *received.dtypes])
    for name, norm in expected.weight_norms.items():
        tolerance = 0.02 if is_in_4_bits else 1e-4 + 0.1 / math.sqrt(sizes.get(name, 1))
        if name in received.weight_norms and abs(received.weight_norms[name] - norm) > tolerance * norm:
            norms = f"its norm is {received.weight_norms[name]:.5g}, and not {norm:.5g}"
            raise UserError(
                f"base: the weight of {name!r} is another one than that of the chain's base {expected.name!r}: {norms}"
            )


# ---------------------------------------------------------------------- its values


def base_values(model: nn.Module, without: Set[str] = frozenset()) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers by name, without its links and the names in ``without``."""
    state, factors = layout.state_dict(model), names_of_factors(model)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and name not in factors and without.isdisjoint({name, weight_of(name)})
    }


def weight_of(name: str) -> str:
    """The weight to which an entry of a state dict belongs, such as a 4-bit weight's scales (``fc.weight.absmax``)."""
    return re.sub(r"\.weight\..*", ".weight", name)
