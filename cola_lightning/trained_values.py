"""What training changes besides the links: fully trained parameters, and buffers, in the adapted model and outside of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cola_lightning import layout
from cola_lightning.chain.base import base_values, weight_of
from cola_lightning.chain.chain import OUTSIDE
from cola_lightning.errors import UserError
from cola_lightning.lora.layer import names_of_factors


class TrainedValues:
    """What training changes besides the links of an adapted model; each link records it.

    Args:
        model: the adapted model.
        outer_module: the module that has it as its ``model``, such as a LightningModule; None: nothing is around it.

    Attributes:
        initial: the values outside of the model before the first link.
    """

    def __init__(self, model: nn.Module, outer_module: nn.Module | None = None) -> None:
        self.model, self.outer_module = model, outer_module
        self.initial: dict[str, Tensor] = {}
        self.record_trainable()

    def record_trainable(self) -> None:
        """Records which parameters are trainable now. They count as trained from here on, also while they are frozen."""
        names = layout.plain_names(name for name, _ in self.model.named_parameters(remove_duplicate=False))
        self._trained = names_of_factors(self.model) | set(names).difference(self._frozen_now())

    def record_initial(self) -> None:
        """Stores the values outside of the model, before training; those already stored are not replaced."""
        self.initial = {name: layout.gather(value) for name, value in self.outside().items()} | self.initial

    def frozen_names(self) -> list[str]:
        """Names of the model's parameters that are not trained, each under all of its names; see :meth:`record_trainable`."""
        return [name for name in self._frozen_now() if name not in self._trained]

    def _frozen_now(self) -> list[str]:
        named = self.model.named_parameters(remove_duplicate=False)
        return layout.plain_names(name for name, parameter in named if not parameter.requires_grad)

    def state(self, prefix: str = "", *, keep_vars: bool = True, into: Any = None) -> dict[str, Any]:
        """The parameters, buffers and extra states of the module around the model that training may change.

        All but the model's frozen ones, and each under one name.

        Args:
            prefix: begins the names.
            keep_vars: see ``nn.Module.state_dict``.
            into: a state dict to add them to; None: a new one.
        """
        assert self.outer_module is not None
        if layout.has_fsdp1(self.outer_module):
            state = layout.state_dict(self.outer_module, prefix, keep_vars=keep_vars)
        else:
            state = nn.Module.state_dict(self.outer_module, destination=into, prefix=prefix, keep_vars=keep_vars)
        omitted = {*(f"model.{name}" for name in self.frozen_names()), *self.aliases()}
        for name in list(state):
            name_in_module = name.removeprefix(prefix)
            if name.startswith(prefix) and not omitted.isdisjoint({name_in_module, weight_of(name_in_module)}):
                del state[name]
        return state

    def aliases(self) -> dict[str, str]:
        """Other names of the model's parameters and buffers, in a module that holds a part of the model a second time.

        Returns:
            By the other name, the value's name in the module around the model.
        """
        outer = self.outer_module
        assert outer is not None
        found = [*outer.named_parameters(remove_duplicate=False), *outer.named_buffers(remove_duplicate=False)]
        named = list(zip(layout.plain_names(name for name, _ in found), (id(value) for _, value in found), strict=True))
        inside = {key: name for name, key in named if name.startswith("model.")}
        return {name: inside[key] for name, key in named if key in inside and not name.startswith("model.")}

    def outside(self) -> dict[str, Tensor]:
        """The tensors that training changes around the model, by names that begin with ``self.``; lazy ones have no values."""
        return {
            name: value
            for key, value in (self.state() if self.outer_module is not None else {}).items()
            if not key.startswith("model.") and isinstance(value, Tensor) and not is_lazy(value)
            if (name := OUTSIDE + key) in self.initial or not is_frozen(value)
        }

    def values(self) -> dict[str, Tensor]:
        """Fully trained parameters, and persistent buffers, themselves."""
        return base_values(self.model, without=set(self.frozen_names())) | self.outside()

    def recorded(self) -> dict[str, Tensor]:
        """The :meth:`values` that a link records: all but buffers outside of the model that have not changed."""
        values = self.values()
        buffers = [name for name in values.keys() & self.initial.keys() if not isinstance(values[name], nn.Parameter)]
        constant = {name for name in buffers if torch.equal(layout.gather(values[name]), self.initial[name])}
        return {name: value for name, value in values.items() if name not in constant}

    def copies(self, before: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        """CPU copies of the :meth:`recorded` values.

        Args:
            before: earlier copies. A value that has not changed since is that copy again, so a checkpoint stores it once.
        """
        values = {name: layout.gather(value) for name, value in self.recorded().items()}
        unchanged = (name for name in values.keys() & before.keys() if torch.equal(_bits(values[name]), _bits(before[name])))
        return values | {name: before[name] for name in unchanged}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Writes :meth:`copies` into the present values; names that are unknown here are ignored."""
        present = layout.state_dict(self.model) | self.outside()
        for name in present.keys() & values.keys():
            layout.copy_(present[name], values[name])

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block, the model has tensors with these values; afterwards it has its own tensors again.

        Tensors are exchanged, and not their values: autocast and a backward pass may still need what is in them.

        Args:
            values: :meth:`copies`; names that are unknown here are ignored.
        """
        root = self.model if self.outer_module is None else self.outer_module
        present = layout.state_dict(self.model, keep_vars=True) | self.outside() if values else {}
        others = {id(present[name]): _like(present[name], values[name]) for name in present.keys() & values.keys()}
        places = [
            (module, name, value)
            for module in (root.modules() if others else ())
            for named in (module.named_parameters, module.named_buffers)
            for name, value in named(recurse=False, remove_duplicate=False)
            if id(value) in others
        ]
        try:
            for module, name, value in places:
                setattr(module, name, others[id(value)])
            yield
        finally:
            for module, name, value in places:
                setattr(module, name, value)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Writes another run's values into the present ones.

        Raises:
            UserError: for a value without a counterpart of its shape.
        """
        present = self.values()
        for name, value in values.items():
            if name not in present or present[name].shape != value.shape:
                raise UserError(
                    f"model.init_chain: has values for {name!r} of shape {tuple(value.shape)}, which is not fully trained here "
                    "(model.modules_to_save)"
                )
        self.write(values)


def _bits(value: Tensor) -> Tensor:
    """A value's bytes: unlike numbers, they show the signs of zeros."""
    return value.reshape(-1).view(torch.uint8)


def is_frozen(value: Any) -> bool:
    """Whether a value is a parameter that needs no gradient."""
    return isinstance(value, nn.Parameter) and not value.requires_grad


def _like(present: Tensor, value: Tensor) -> Tensor:
    """A value as a tensor that can take the place of another one, without a gradient."""
    value = layout.lay_out(value.to(present.device, present.dtype), present)
    return nn.Parameter(value, requires_grad=False) if isinstance(present, nn.Parameter) else value
