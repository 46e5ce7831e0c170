"""A module's class and constructor arguments, recorded so that a checkpoint alone is enough to make the module again."""

import functools
import inspect
import pydoc
import re
from argparse import Namespace
from collections import UserString
from collections.abc import Callable, Mapping, Sequence
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

MARK = "_type_"  # in recorded arguments: the key of an object that stands for what JSON does not have


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
    """The value in types that ``torch.load(weights_only=True)`` reads: built-in ones, tensors, dtypes, devices and sizes.

    Args:
        value: the value.
        is_json: in types that JSON has; others are marked, so that :func:`stored_arguments` makes them again.

    Raises:
        TypeError: if it cannot be expressed in them.
    """
    if value is None or type(value) is bool:
        return value
    part = functools.partial(plain, is_json=is_json)
    if isinstance(value, np.generic):
        return part(value.item())
    for kind in (int, float, str):  # jsonargparse's restricted numbers are of subclasses
        if isinstance(value, kind) and not isinstance(value, Enum):  # which would not be one of its class when it comes back
            return kind(value)
    if isinstance(value, PathLike):
        return str(value)
    if (name := type(value).__name__) in OF_TORCH and type(value).__module__ in ("builtins", "torch"):
        express, _ = OF_TORCH[name]
        return {MARK: name, "value": part(express(value))} if is_json else value
    if type(value).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        name, contents = "omegaconf", part(OmegaConf.to_container(value, resolve=True))
    elif isinstance(value, Namespace):
        name, contents = "namespace", part(vars(value))
    # A list, a tuple, or another library's equivalent.
    elif isinstance(value, Sequence) and not isinstance(value, str | UserString | bytes | bytearray | memoryview):
        contents = list(map(part, value))
        if not isinstance(value, tuple) or not is_json:
            return tuple(contents) if isinstance(value, tuple) else contents
        name = "tuple"
    elif isinstance(value, Mapping):
        contents = [[part(key), part(item)] for key, item in value.items()]
        if not is_json or all(type(key) is str and key != MARK for key in value):
            return dict(contents)
        name = "dict"
    else:
        raise TypeError(f"expected plain values, received {type(value).__name__}")
    return {MARK: name, "value": contents} if is_json else contents


def stored_arguments(cls: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments that a checkpoint holds, as far as a class takes them.

    Args:
        cls: the class to be made.
        recorded: the ``constructor_arguments`` of the checkpoint's module.
    """
    stored = recorded.get("defaults", {}) | recorded.get("init_args", {})
    return {name: unmarked(value) for name, value in _of_class(cls, stored).items() if is_recorded(name)}


def read_arguments(path: str | PathLike[str], cls: type) -> dict[str, Any]:
    """The arguments in a file of hyperparameters that a class takes, as Lightning reads them."""
    reads: dict[str, Callable[[Any], Any]] = {
        ".csv": load_hparams_from_tags_csv,
        ".yaml": load_hparams_from_yaml,
        ".yml": load_hparams_from_yaml,
    }
    if (read := reads.get(Path(path).suffix.lower())) is None or not Path(path).is_file():
        raise UserError(f"hparams_file: {str(path)!r} must be a .csv, .yml or .yaml file that exists")
    return _of_class(cls, read(path))


def _of_class(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a class takes."""
    parameters = _parameters(cls)
    takes_any, names = any(one.kind is one.VAR_KEYWORD for one in parameters), {one.name for one in parameters}
    return {name: value for name, value in arguments.items() if takes_any or name in names}


def unmarked(value: Any) -> Any:
    """A plain value again from what :func:`plain` writes for JSON."""
    if isinstance(value, list):
        return list(map(unmarked, value))
    if not isinstance(value, Mapping):
        return value
    return MADE[value[MARK]](unmarked(value["value"])) if MARK in value else {key: unmarked(value[key]) for key in value}


def _configuration(contents: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(_literal(contents))


def _literal(value: Any) -> Any:
    """Resolved values of a configuration: an interpolation in a file, which may call a resolver, is text."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: _literal(part) for key, part in value.items()}
    return [_literal(part) for part in value] if isinstance(value, list | tuple) else value


# How torch's types are expressed, and made again, by their names.
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
OF_TORCH: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dtype": (str, DTYPES.__getitem__),
    "device": (str, torch.device),
    "Size": (list, torch.Size),
    "Tensor": (
        lambda value: [value.cpu().flatten().view(torch.uint8).tolist(), value.dtype, value.shape],
        lambda parts: torch.tensor(parts[0], dtype=torch.uint8).view(parts[1]).reshape(parts[2]),
    ),
}
MADE: dict[str, Callable[[Any], Any]] = {name: make for name, (_, make) in OF_TORCH.items()}
MADE |= {"tuple": tuple, "dict": dict, "namespace": lambda contents: Namespace(**contents), "omegaconf": _configuration}


def find_class(path: str) -> type:
    """The class at an import path; it may be nested in another.

    Raises:
        UserError: if it cannot be imported.
    """
    found = pydoc.locate(path)
    if isinstance(found, type):
        return found
    raise UserError(f"checkpoint: the class of its module, {path!r}, cannot be imported from here")
