"""A module's class and constructor arguments, recorded so that a checkpoint alone is enough to make the module again."""

import functools
import inspect
import pydoc
import re
from argparse import Namespace
from collections import UserString
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml

import cola_lightning
from cola_lightning.errors import UserError
from cola_lightning.lora.config import LoRAConfig

# Neither written to a checkpoint nor taken from one: arguments of the training, of which inference needs none, and those by
# which another person's file could have code executed.
NOT_RECORDED = {"optimizer", "init_chain", "init_links", "compile", "activation_checkpointing"}
NOT_RECORDED |= {"trust_remote_code", "attn_implementation"}  # the latter may name a kernel of the hub

# Names of arguments that no file may hold. (``pad_token``, ``max_new_tokens`` and such are no secrets.)
SECRET = re.compile(
    r"(\A|_)(password|passwd|secret|credentials?|(api|access|private|secret)_?key)\Z"
    r"|\A((use|auth|hf|hub|huggingface|api|access|bearer|refresh|session|secret|wandb|github)_)*token\Z",
    re.IGNORECASE,
)


class WholeSignature:
    """The signature of a class, for ``help`` and completion, with the options that this package's classes pass on."""

    def __get__(self, instance: object, cls: type) -> inspect.Signature | None:
        """None where Python itself finds it: for a class of the user's with an ``__init__``, and for a call of a module."""
        owner = next(one for one in cls.__mro__ if "__init__" in vars(one))
        if instance is not None or not owner.__module__.startswith("cola_lightning."):
            return None
        own = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
        given = [one if one.name in own else one.replace(kind=one.KEYWORD_ONLY) for one in _parameters(cls)]
        return inspect.Signature(given[1:])


class RecordsArguments:
    """Records each instance's constructor arguments, whatever a subclass' ``__init__`` does with them.

    (A separate class: jsonargparse takes the signature of ``__new__`` where a class defines one beside its ``__init__``.)

    Attributes:
        constructor_arguments: ``class_path``; the plain ``init_args``; ``defaults`` of others, which may change later; and
            ``not_plain``: names of arguments without a plain value.
    """

    constructor_arguments: dict[str, Any]
    __signature__ = WholeSignature()

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Self:
        """Records the arguments, by name, as they are before ``__init__`` may change them."""
        self = super().__new__(cls)
        recorded: dict[str, Any] = {"class_path": class_path(cls), "init_args": {}, "not_plain": [], "defaults": {}}
        with suppress(TypeError):  # __init__ will raise it
            bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
            parameters = list(bound.signature.parameters.values())[1:]  # without self
            given = dict(list(bound.arguments.items())[1:])
            for parameter in parameters:
                if parameter.kind is parameter.VAR_KEYWORD:
                    given |= given.pop(parameter.name, {})
                if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY) and parameter.name in given:
                    given[parameter.name] = object()  # not plain: it has no name by which it could be given again
            for name in filter(is_recorded, given):
                try:
                    recorded["init_args"][name] = plain(given[name], is_json=True)
                except TypeError:
                    recorded["not_plain"].append(name)
            recorded["defaults"] = {name: value for name, value in _defaults(cls).items() if name not in given}
        self.__dict__["constructor_arguments"] = recorded
        return self


def _defaults(cls: type) -> dict[str, Any]:
    """The plain defaults of a class' arguments."""
    defaults: dict[str, Any] = {}
    for parameter in _parameters(cls):
        if is_recorded(parameter.name) and parameter.default is not parameter.empty:
            with suppress(TypeError):
                defaults[parameter.name] = plain(parameter.default, is_json=True)
    return defaults


def _parameters(cls: type) -> list[inspect.Parameter]:
    """The arguments of a class; of this package's classes also those that they pass on: to the base, and to LoRAConfig."""
    classes = [one for one in cls.__mro__[: cls.__mro__.index(LightningModule)] if "__init__" in vars(one)]
    found: dict[str, inspect.Parameter] = {}
    for owner in (*classes[:-1], LoRAConfig):  # the last, AdaptedModule, gets its arguments from COLAModule
        is_passing_on = owner.__module__.startswith("cola_lightning.")
        for name, parameter in inspect.signature(owner.__init__).parameters.items():  # type: ignore[misc]
            if parameter.kind is not parameter.VAR_KEYWORD or not is_passing_on:
                found.setdefault(name, parameter)
        if not is_passing_on:  # another class may give its base's arguments itself
            break
    return list(found.values())


def class_path(cls: type) -> str:
    """The import path of a class: the public one for this package's classes, whose files may move."""
    if cls.__module__.startswith("cola_lightning.") and getattr(cola_lightning, cls.__name__, None) is cls:
        return f"cola_lightning.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def is_recorded(name: str) -> bool:
    """Whether an argument of this name is stored: not what only training needs, what may be executed, or a secret.

    Example:
        >>> [name for name in ("rank", "pad_token", "token", "hf_token", "api_key", "optimizer") if is_recorded(name)]
        ['rank', 'pad_token']
    """
    return name not in NOT_RECORDED and not SECRET.search(name)


def plain(value: Any, *, is_json: bool = False) -> Any:
    """The value in types that ``torch.load(weights_only=True)`` reads: built-in ones, tensors, dtypes and devices.

    Args:
        value: the value.
        is_json: only numbers, texts, paths as texts, and lists and dicts of these: what is the same when JSON gives it back,
            except that a tuple is a list then.

    Raises:
        TypeError: if it cannot be expressed in them.
    """
    part = functools.partial(plain, is_json=is_json)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return part(value.item())
    for kind in (int, float, str):  # jsonargparse's restricted numbers are of subclasses
        if isinstance(value, kind) and not isinstance(value, Enum):  # which would not be one of its class when it comes back
            return kind(value)
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, list | tuple):
        return tuple(map(part, value)) if isinstance(value, tuple) else list(map(part, value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: part(item) for key, item in value.items()}
    if not is_json:  # other libraries' equivalents
        if type(value) in (torch.Tensor, torch.dtype, torch.device):
            return value
        if isinstance(value, Mapping | Namespace):
            items = vars(value) if isinstance(value, Namespace) else value
            return {part(key): part(item) for key, item in items.items()}
        if isinstance(value, Sequence) and not isinstance(value, UserString | bytes | bytearray | memoryview):
            return list(map(part, value))
    raise TypeError(f"expected plain values, received {type(value).__name__}")


def stored_arguments(cls: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments that a checkpoint holds, as far as a class takes them.

    Args:
        cls: the class to be made.
        recorded: the ``constructor_arguments`` of the checkpoint's module.
    """
    stored = recorded["defaults"] | recorded["init_args"]
    return {name: value for name, value in _of_class(cls, stored).items() if is_recorded(name)}


def read_arguments(path: str | PathLike[str], cls: type) -> dict[str, Any]:
    """The arguments in a file of hyperparameters that a class takes, as Lightning reads them."""
    read = load_hparams_from_tags_csv if Path(path).suffix == ".csv" else load_hparams_from_yaml
    return _of_class(cls, read(path))


def _of_class(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a class takes."""
    parameters = _parameters(cls)
    takes_any, names = any(one.kind is one.VAR_KEYWORD for one in parameters), {one.name for one in parameters}
    return {name: value for name, value in arguments.items() if takes_any or name in names}


def find_class(path: str) -> type:
    """The class at an import path; it may be nested in another.

    Raises:
        UserError: if it cannot be imported.
    """
    found = pydoc.locate(path)
    if isinstance(found, type):
        return found
    raise UserError(f"checkpoint: the class of its module, {path!r}, cannot be imported from here")
