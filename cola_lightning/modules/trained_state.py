"""The part of a module's state that training changes: the content of its state dict, inside of the model and outside of it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain import Chain
from cola_lightning.chain.store import EXTRA_STATE
from cola_lightning.errors import UserError
from cola_lightning.sharded import tensors
from cola_lightning.weights import weight_of

UNCHANGED = torch.empty(0, dtype=torch.uint8)  # an extra state that changes nothing


class StateDictError(UserError, RuntimeError):
    """Names that do not fit: a mistake of the user's, and the RuntimeError that torch raises for it, with its message."""


class TrainedState:
    """The state that training changes: links, fully trained modules, buffers, and what the module holds outside its model.

    Args:
        module: the module, with its model as ``module.model``.
        adapted: that model.

    Attributes:
        first_outside: the trained values outside of the model, before the first link.
        values_to_load: the values that replace a checkpoint's in the next load.
        is_packing: whether a state dict contains the finished links, which take time to pack.
    """

    def __init__(self, module: Any, adapted: AdaptedModel) -> None:
        self.module, self.adapted = module, adapted
        self.first_outside: dict[str, Tensor] = {}
        self.values_to_load: dict[str, Tensor] | None = None
        self.is_packing = True

    # ------------------------------------------------------------------ names and values

    def frozen_names(self) -> list[str]:
        """Names of the model's frozen parameters, in the module."""
        return [f"model.{name}" for name in self.adapted.frozen_names()]

    def aliases(self) -> list[str]:
        """Other names of the model's parameters and buffers, for a module that holds a part of the model a second time."""
        model, module = self.adapted.model, self.module
        inside = {id(value) for value in (*model.parameters(), *model.buffers())}
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        names = [name for name, value in named if id(value) in inside]
        return [name for name in tensors.plain_names(names) if not name.startswith("model.")]

    @property
    def is_all_in_values(self) -> bool:
        """Whether parameters and buffers are all of the state: no links, no base, and no extra state of a subclass."""
        is_ours = getattr(type(self.module).get_extra_state, "is_chain", False)
        return is_ours and self.adapted.live is None and not self.adapted.frozen_names()

    def without_frozen(self, state: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A full state dict of the module, without the model's frozen parameters and other names of the model's parts."""
        omitted = {*self.frozen_names(), *self.aliases()}
        if self.is_all_in_values:
            state.pop(prefix + EXTRA_STATE, None)
        for name in list(state):
            own = name.removeprefix(prefix)
            if name.startswith(prefix) and not omitted.isdisjoint({own, weight_of(own)}):
                del state[name]
        return state

    def unpacked(self) -> dict[str, Any]:
        """The module's state dict, with its own tensors, and an empty one in place of the finished links."""
        self.is_packing = False
        try:
            state: dict[str, Any] = self.module.state_dict(keep_vars=True)
            return state
        finally:
            self.is_packing = True

    def values(self) -> dict[str, Tensor]:
        """The parameters and buffers in the module's state dict themselves."""
        state = self.unpacked().items()
        return {name: value for name, value in state if isinstance(value, Tensor) and name != EXTRA_STATE}

    # ------------------------------------------------------------------ outside of the model

    def values_outside(self) -> dict[str, Tensor]:
        """Those of :meth:`values` outside of the model, by name in the module; lazy ones have none yet."""
        return {name: value for name, value in self.values().items() if not name.startswith("model.") and not is_lazy(value)}

    def outside(self) -> dict[str, Tensor]:
        """CPU copies of what training changes outside of the model: trained parameters, and buffers that have changed."""
        values, first = self.values_outside(), self.first_outside
        copies = {name: tensors.gather(value) for name, value in values.items() if not _is_frozen(value) or name in first}
        trained = {name: value for name, value in copies.items() if isinstance(values[name], nn.Parameter)}
        buffers = {name: value for name, value in copies.items() if name not in trained}
        changed = {name: value for name, value in buffers.items() if name not in first or not torch.equal(value, first[name])}
        return trained | changed

    def remember_outside(self) -> None:
        """Stores the trained values outside of the model before training; those already stored are not replaced."""
        values = self.values_outside().items()
        self.first_outside = {name: tensors.gather(v) for name, v in values if not _is_frozen(v)} | self.first_outside

    def outside_after(self, chain: Chain) -> dict[str, Tensor]:
        """The trained values outside of the model after the last of these links; before the first if there are none."""
        own = chain.links[-1].outside if chain.links else {}
        trained = {name for name, value in self.values().items() if value.requires_grad}
        return {name: value for name, value in self.first_outside.items() if not chain.links or name not in trained} | own

    # ------------------------------------------------------------------ loading

    def load(self, load: Callable[..., Any], received: Mapping[str, Any], *, strict: bool, assign: bool) -> Any:
        """Loads a state dict of the module.

        Args:
            load: torch's ``load_state_dict`` of the module.
            received: the state dict.
            strict: whether it must have exactly the module's names.
            assign: see ``nn.Module.load_state_dict``.

        Raises:
            StateDictError: if a name is missing or unknown.
        """
        values, self.values_to_load = self.values_to_load, None
        if values is not None and received and EXTRA_STATE not in received:  # a checkpoint's, whose chain is applied by now
            received = {name: values.get(name, value) for name, value in received.items()} | {EXTRA_STATE: UNCHANGED}
        own = self.unpacked()
        missing = own.keys() - received.keys()
        unexpected = received.keys() - {EXTRA_STATE, *own, *self.frozen_names(), *self.aliases()}
        if strict and (missing or unexpected):
            raise StateDictError(
                f"checkpoint: expected values for all that this module trains, and for nothing else. Missing key(s) in "
                f"state_dict: {_quoted(missing)}. Unexpected key(s) in state_dict: {_quoted(unexpected)}"
            )
        result = load(_laid_out(received, own), strict=False, assign=assign)
        result.missing_keys[:] = [name for name in result.missing_keys if name in own]  # what is frozen is not missing
        return result


def _laid_out(received: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a state dict in the layout of the module's own."""
    return {
        name: tensors.lay_out(value, own[name]) if isinstance(value, Tensor) and name in own else value
        for name, value in received.items()
    }


def add_frozen_values(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Adds a nested module's frozen values, which no state dict contains: their absence would be an error there.

    Its finished links, if it has any, must be in the state dict. A checkpoint's contains none, and Lightning's weight
    averaging loads that into a copy of the module inside another one.
    """
    if prefix:
        for name, parameter in module.model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state_dict.setdefault(f"{prefix}model.{name}", parameter.detach())
        if module.trained_state.is_all_in_values or not len(module.chain):
            state_dict.setdefault(prefix + EXTRA_STATE, UNCHANGED)


def _is_frozen(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) and not value.requires_grad


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names)) or "none"
