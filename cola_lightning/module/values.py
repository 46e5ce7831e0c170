"""The values of a module that training may change, and that its state dict therefore contains."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cola_lightning import layout
from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.link import OUTSIDE
from cola_lightning.trained import weight_of


def values_of(
    module: LightningModule, adapted: AdaptedModel, prefix: str = "", *, keep_vars: bool = True, into: Any = None
) -> dict[str, Any]:
    """The parameters, buffers and extra states of a module that training may change: no frozen ones of the model's.

    Args:
        module: the module.
        adapted: its adapted model, which is ``module.model``.
        prefix: begins the names.
        keep_vars: see ``nn.Module.state_dict``.
        into: a state dict to add them to; None: a new one.
    """
    if layout.has_fsdp1(module):
        state = layout.state_dict(module, prefix, keep_vars=keep_vars)
    else:
        state = nn.Module.state_dict(module, destination=into, prefix=prefix, keep_vars=keep_vars)
    omitted = {*frozen_names(adapted), *aliases(module)}
    for name in list(state):
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and not omitted.isdisjoint({own, weight_of(own)}):
            del state[name]
    return state


def values_outside(module: LightningModule, adapted: AdaptedModel) -> dict[str, Tensor]:
    """The tensors that training changes outside of a module's model; lazy ones have no values yet."""
    first = adapted.trained.first
    return {
        name: value
        for key, value in values_of(module, adapted).items()
        if not key.startswith("model.") and isinstance(value, Tensor) and not is_lazy(value)
        if (name := OUTSIDE + key) in first or not is_frozen(value)
    }


def frozen_names(adapted: AdaptedModel) -> list[str]:
    """The names in the module of the model's parameters that are not trained."""
    return [f"model.{name}" for name in adapted.trained.frozen_names()]


def aliases(module: LightningModule) -> dict[str, str]:
    """Other names of the model's parameters and buffers, for a module that holds a part of the model a second time.

    Returns:
        By the other name, the value's name in the module's model.
    """
    found = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    named = list(zip(layout.plain_names(name for name, _ in found), (id(value) for _, value in found), strict=True))
    inside = {key: name for name, key in named if name.startswith("model.")}
    return {name: inside[key] for name, key in named if key in inside and not name.startswith("model.")}


def is_frozen(value: Any) -> bool:
    """Whether a value is a parameter that needs no gradient."""
    return isinstance(value, nn.Parameter) and not value.requires_grad
