"""A module's class and plain constructor arguments, recorded so that it can be rebuilt from a checkpoint alone."""

import contextlib
import inspect
import pydoc
import re
from collections import OrderedDict, UserString
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from os import PathLike
from pathlib import PurePath
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import cola_lightning
from cola_lightning.errors import UserError

# Neither written to a checkpoint nor taken from one: arguments of the training, of which inference needs none, and those by
# which another person's file could have code executed.
NOT_RECORDED = {"optimizer", "init_chain", "init_links", "compile", "activation_checkpointing"}
NOT_RECORDED |= {"trust_remote_code", "attn_implementation"}  # the latter may name a kernel of the hub

CONFIG = "_omegaconf_"  # the key under which a configuration's resolved values are stored


class RecordsArguments:
    """Records each instance's constructor arguments, whatever a subclass' ``__init__`` does with them.

    (A separate class: jsonargparse takes the signature of ``__new__`` where a class defines one beside its ``__init__``.)
    """

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Self:
        """Records the arguments, by name, as they are before ``__init__`` may change them."""
        self = super().__new__(cls)
        init_args, not_plain = dict[str, Any](), list[str]()
        with contextlib.suppress(TypeError):  # __init__ will raise it
            for name, value in _by_name(inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)):
                try:
                    init_args[name] = plain(value)
                except TypeError:
                    not_plain.append(name)
        defaults = {name: value for name, value in _defaults(cls).items() if name not in (*init_args, *not_plain)}
        recorded = {"class_path": class_path(cls), "init_args": init_args, "not_plain": not_plain, "defaults": defaults}
        self.__dict__["_constructor_arguments"] = recorded
        return self

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        """``class_path``, the plain ``init_args`` and ``defaults``, and ``not_plain``: names of those without a plain value."""
        recorded: dict[str, Any] = self.__dict__["_constructor_arguments"]
        return recorded


def _defaults(cls: type) -> dict[str, Any]:
    """The plain defaults of a class' arguments, which may change later.

    Of this package's classes also those of the ``**arguments`` that they pass on; another class may have given these itself.
    """
    defaults: dict[str, Any] = {}
    for owner in (one for one in cls.__mro__ if "__init__" in vars(one)):
        parameters = inspect.signature(owner.__init__).parameters.values()  # type: ignore[misc]
        for one in parameters:
            if one.default is not one.empty and one.name not in NOT_RECORDED:
                with contextlib.suppress(TypeError):
                    defaults.setdefault(one.name, plain(one.default))
        passes_on = any(one.kind is one.VAR_KEYWORD for one in parameters)
        if not passes_on or not owner.__module__.startswith("cola_lightning."):
            break
    return defaults


def class_path(cls: type) -> str:
    """The import path of a class: the public one for this package's classes, whose files may move."""
    if cls.__module__.startswith("cola_lightning.") and getattr(cola_lightning, cls.__name__, None) is cls:
        return f"cola_lightning.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _by_name(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """The arguments that define the model, by name; positional-only ones and ``*args`` count as not plain."""
    kinds = inspect.Parameter
    for name, value in list(bound.arguments.items())[1:]:  # without self
        kind = bound.signature.parameters[name].kind
        if kind is kinds.VAR_KEYWORD:
            yield from ((key, part) for key, part in value.items() if key not in NOT_RECORDED)
        elif name not in NOT_RECORDED:
            yield name, object() if kind in (kinds.VAR_POSITIONAL, kinds.POSITIONAL_ONLY) else value


def plain(value: Any) -> Any:
    """The value in built-in types, which ``torch.load(weights_only=True)`` reads.

    Raises:
        TypeError: if it cannot be expressed in them.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, np.generic):
        return plain(value.item())
    for kind in (int, float, str):  # jsonargparse's restricted numbers are of subclasses
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, PathLike):
        return str(value)
    if type(value).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        return {CONFIG: plain(OmegaConf.to_container(value, resolve=True))}
    if _is_list(value):
        return tuple(map(plain, value)) if isinstance(value, tuple) else list(map(plain, value))
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(f"expected plain values, received {type(value).__name__}")


def readable(value: Any) -> Any:
    """The value in types that ``torch.load(weights_only=True)`` reads: plain ones, tensors, dtypes, devices and sizes.

    Raises:
        TypeError: if it cannot be expressed in them.
    """
    if type(value) in (Tensor, torch.dtype, torch.device, torch.Size):
        return value
    if _is_list(value):
        return tuple(map(readable, value)) if isinstance(value, tuple) else list(map(readable, value))
    if isinstance(value, Mapping):
        return {plain(key): readable(item) for key, item in value.items()}
    return plain(value)


def _is_list(value: Any) -> bool:
    """Whether it is a list, a tuple, or another library's equivalent, such as OmegaConf's."""
    return isinstance(value, Sequence) and not isinstance(value, str | UserString | bytes | bytearray | memoryview)


def stored_arguments(cls: type, checkpoint: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A class' constructor arguments that a checkpoint holds, but for those that are not taken from a file.

    Args:
        cls: the class to be made.
        checkpoint: Lightning's, with its hyperparameters (``save_hyperparameters``).
        recorded: the ``constructor_arguments`` of its module; empty if that is not of the class, or of a base of it.
    """
    saved: dict[str, Any] = dict(checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {})
    whole = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_NAME)
    if whole in inspect.signature(cls.__init__).parameters and whole != "kwargs":  # type: ignore[misc]  # Lightning's "none"
        saved = {str(whole): saved}  # of save_hyperparameters(argument): they are that argument
    hints, of_cli = annotations(cls), {"_instantiator", "_class_path"}  # by which Lightning would call what they name
    stored = recorded.get("defaults", {}) | saved | recorded.get("init_args", {})  # an older checkpoint has no defaults
    return {
        name: _as_annotated(_with_configs(value), hints.get(name))
        for name, value in stored.items()
        if name not in NOT_RECORDED | of_cli
    }


def accepted(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a class' constructor takes."""
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return {name: value for name, value in arguments.items() if takes_any or name in parameters}


def _with_configs(value: Any) -> Any:
    """A plain value with OmegaConf's configurations in place of what :func:`plain` writes for them."""
    if isinstance(value, Mapping) and value.keys() == {CONFIG}:
        from omegaconf import OmegaConf

        return OmegaConf.create(_literal(value[CONFIG]))
    if isinstance(value, Mapping):
        return {key: _with_configs(part) for key, part in value.items()}
    return type(value)(map(_with_configs, value)) if type(value) in (list, tuple) else value


def _literal(value: Any) -> Any:
    """Resolved values of a configuration: an interpolation in a file, which may call a resolver, is text."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: _literal(part) for key, part in value.items()}
    return [_literal(part) for part in value] if isinstance(value, list | tuple) else value


def annotations(cls: type) -> dict[str, Any]:
    """The types of a class' constructor arguments, those that it passes on to its bases among them."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        with contextlib.suppress(NameError):  # annotations with names that are imported for type checkers alone
            hints |= get_type_hints(base.__init__)  # type: ignore[misc]
    return hints


def _as_annotated(value: Any, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    if get_origin(hint) not in (None, Union, UnionType) or value is None or type(value) in kinds:
        return value
    made = (kind(value) for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum | PurePath | OrderedDict))
    return next(made, value)


def find_class(path: str) -> type:
    """The class at an import path; it may be nested in another.

    Raises:
        UserError: if it cannot be imported.
    """
    try:
        found = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:  # raised by the code of its module
        raise error.value or error from None
    if isinstance(found, type):
        return found
    raise UserError(f"checkpoint: expected its module's class to be importable from here, received {path!r}, which is not")
