"""How a module was made, so that it can be made again from a checkpoint alone: its class, and its plain arguments."""

import contextlib
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from enum import Enum
from os import PathLike
from pathlib import PurePath
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from cola_lightning.errors import UserError

# How a module trains, not what it is: a module that is only to be used needs none of it.
NOT_KEPT = {"optimizer", "init_chain", "init_links", "compile", "activation_checkpointing"}


class RemembersArguments:
    """A class whose instances know what they were made with, whatever a subclass' ``__init__`` does with its arguments."""

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Self:
        """Notes the arguments, by name, as they are before ``__init__`` may change them."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        except TypeError:  # __init__ will say so
            return self
        init_args, not_plain = {}, []
        for name, value in _by_name(bound):
            try:
                init_args[name] = plain(value)
            except TypeError:
                not_plain.append(name)
        self.__dict__["_init_args"], self.__dict__["_not_plain"] = init_args, not_plain
        return self

    def recipe(self) -> dict[str, Any]:
        """The class, its plain arguments, and the names of those that are not plain: ``class_path, init_args, not_plain``."""
        cls = type(self)
        init_args, not_plain = self.__dict__["_init_args"], self.__dict__["_not_plain"]
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args, "not_plain": not_plain}


def _by_name(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """The arguments that say what a module is; those without a name of their own are no plain values."""
    kinds = inspect.Parameter
    for name, value in list(bound.arguments.items())[1:]:  # without self
        kind = bound.signature.parameters[name].kind
        if kind is kinds.VAR_KEYWORD:
            yield from ((key, part) for key, part in value.items() if key not in NOT_KEPT)
        elif name not in NOT_KEPT:
            yield name, object() if kind in (kinds.VAR_POSITIONAL, kinds.POSITIONAL_ONLY) else value


def plain(value: Any) -> Any:
    """The value in the plainest types: ``torch.load(weights_only=True)`` reads no others.

    Raises:
        TypeError: if it has none.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, np.generic):
        return plain(value.item())
    for kind in (int, float, str):  # jsonargparse's restricted numbers are of classes of their own
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, list | tuple):
        return tuple(map(plain, value)) if isinstance(value, tuple) else list(map(plain, value))
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(f"expected plain values, received {type(value).__name__}")


def readable(value: Any) -> Any:
    """The value in types that ``torch.load(weights_only=True)`` reads: plain ones, tensors, dtypes, devices and sizes.

    Raises:
        TypeError: if it has none.
    """
    if type(value) in (Tensor, torch.dtype, torch.device, torch.Size):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(readable, value)) if isinstance(value, tuple) else list(map(readable, value))
    if isinstance(value, Mapping):
        return {plain(key): readable(item) for key, item in value.items()}
    return plain(value)


def as_annotated(cls: type, init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Plain arguments as the class' ``__init__`` annotates them: members of an Enum, paths and ordered dicts."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        with contextlib.suppress(NameError):  # annotations of what is imported for type checkers alone
            hints |= get_type_hints(base.__init__)  # type: ignore[misc]
    return {name: _as_annotated(value, hints.get(name)) for name, value in init_args.items()}


def _as_annotated(value: Any, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    if get_origin(hint) not in (None, Union, UnionType) or value is None or type(value) in kinds:
        return value
    made = (kind(value) for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum | PurePath | OrderedDict))
    return next(made, value)


def find_class(class_path: str) -> type:
    """The class of a recipe.

    Raises:
        UserError: if it cannot be imported.
    """
    parts = class_path.split(".")
    for n_module in range(len(parts) - 1, 0, -1):  # a class may be inside another
        try:
            found: Any = importlib.import_module(".".join(parts[:n_module]))
        except ModuleNotFoundError as error:
            if error.name is None or not f"{class_path}.".startswith(f"{error.name}."):
                raise  # of what the module itself imports
            continue
        for name in parts[n_module:]:
            found = getattr(found, name, None)
        if isinstance(found, type):
            return found
    raise UserError(
        f"checkpoint: expected its module's class to be importable from here, received {class_path!r}, which is not"
    )
