"""A module's constructor arguments: recorded, stored in its checkpoints as plain values, and passed to its class again."""

import functools
import inspect
import logging
import pydoc
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml

import cola_lightning
from cola_lightning.chain.facts import ModuleArguments
from cola_lightning.errors import UserError
from cola_lightning.module.optimization import LinkConfig

log = logging.getLogger(__name__)

# Neither written to a checkpoint nor taken from one: arguments of the training, of which inference needs none, and those by
# which another person's file could have code executed.
NOT_RECORDED = {"optimizer", "init_chain", "init_links", "init_knot", "init_continues", "compile", "activation_checkpointing"}
NOT_RECORDED |= {"trust_remote_code", "attn_implementation"}  # attn_implementation may name a kernel of the hub

# Names of arguments that no file may hold. (``pad_token``, ``max_new_tokens`` and such are no secrets.)
SECRET = re.compile(
    r"(\A|_)(password|passwd|secret|credentials?|(api|access|private|secret)_?key)\Z"
    r"|\A((use|auth|hf|hub|huggingface|api|access|bearer|refresh|session|secret|wandb|github)_)*token\Z",
    re.IGNORECASE,
)


class WholeSignature:
    """The signature of a class, for ``help`` and completion, with the options that this package's classes pass on.

    Args:
        lightning_class: the class of Lightning's that the class is derived from.
        options: the class to which ``**options`` are passed in the end.
    """

    def __init__(self, lightning_class: type, options: type) -> None:
        self.lightning_class, self.options = lightning_class, options

    def __get__(self, instance: object, cls: type) -> inspect.Signature | None:
        """None where Python itself finds it: for a class of the user's with an ``__init__``, and for a call of a module."""
        owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
        if instance is not None or not owner.__module__.startswith("cola_lightning."):
            return None
        declared = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
        parameters = _parameters(cls, self.lightning_class, self.options)[1:]
        return inspect.Signature([p if p.name in declared else p.replace(kind=p.KEYWORD_ONLY) for p in parameters])


class RecordsArguments:
    """Records each instance's constructor arguments, whatever a subclass' ``__init__`` does with them.

    (A separate class: jsonargparse takes the signature of ``__new__`` where a class defines one next to its ``__init__``.)

    Attributes:
        constructor_arguments: how the module is made again.
    """

    constructor_arguments: ModuleArguments
    __signature__ = WholeSignature(LightningModule, LinkConfig)

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Self:
        """Records the arguments, by name, as they are before ``__init__`` may change them."""
        self = super().__new__(cls)
        recorded = ModuleArguments(class_path(cls))
        with suppress(TypeError):  # __init__ will raise it
            bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
            parameters = list(bound.signature.parameters.values())[1:]  # without self
            arguments = dict(list(bound.arguments.items())[1:])
            for parameter in parameters:
                if parameter.kind is parameter.VAR_KEYWORD:
                    arguments |= arguments.pop(parameter.name, {})
            for name in filter(is_recorded, arguments):
                try:
                    recorded.init_args[name] = to_plain(arguments[name], is_marked=True)
                except TypeError:
                    recorded.not_plain.append(name)
            recorded.defaults = {name: value for name, value in _defaults(cls).items() if name not in arguments}
        self.__dict__["constructor_arguments"] = recorded
        return self


def _defaults(cls: type) -> dict[str, Any]:
    """The plain defaults of a class' arguments."""
    defaults: dict[str, Any] = {}
    for parameter in _parameters(cls):
        if is_recorded(parameter.name) and parameter.default is not parameter.empty:
            with suppress(TypeError):
                defaults[parameter.name] = to_plain(parameter.default)
    return defaults


def _parameters(cls: type, lightning_class: type = LightningModule, options: type = LinkConfig) -> list[inspect.Parameter]:
    """The arguments of a class; of this package's classes also those that they pass on: to the base, and to ``options``."""
    classes = [base for base in cls.__mro__[: cls.__mro__.index(lightning_class)] if "__init__" in vars(base)]
    found: dict[str, inspect.Parameter] = {}
    for owner in (*classes, options):
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


def to_plain(value: Any, *, is_marked: bool = False) -> Any:
    """The value in types that JSON has: numbers, texts, and lists and dicts of these. A path is a text; secrets are left out.

    Args:
        value: the value.
        is_marked: whether a configuration of argparse's or OmegaConf's, and a dtype, is marked, so that :func:`from_plain`
            makes it again. Otherwise a configuration is a dict or list.

    Raises:
        TypeError: if it cannot be expressed in them.
    """
    if value is None or isinstance(value, bool):
        return value
    part = functools.partial(to_plain, is_marked=is_marked)
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
        return {key: part(item) for key, item in value.items() if not SECRET.search(key)}
    if isinstance(value, Namespace):
        mark, contents = "namespace", part(vars(value))
    elif type(value).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        mark, contents = "omegaconf", part(OmegaConf.to_container(value, resolve=True))
    elif isinstance(value, torch.dtype) and is_marked:
        mark, contents = "dtype", str(value)
    else:
        raise TypeError(f"a {type(value).__name__} is not a plain value")
    return {MARK: mark, "value": contents} if is_marked else contents


def from_plain(value: Any) -> Any:
    """An argument as it was before :func:`to_plain` marked parts of it."""
    if isinstance(value, list | tuple):
        return type(value)(map(from_plain, value))
    if not isinstance(value, dict):
        return value
    parts = {key: from_plain(part) for key, part in value.items()}
    return BY_MARK[value[MARK]](parts["value"]) if MARK in value else parts


def _configuration(contents: Any) -> Any:
    from omegaconf import OmegaConf

    return contents if "${" in str(contents) else OmegaConf.create(contents)  # a file's interpolation could call a resolver


MARK = "_type_"  # in a recorded argument, the key of an object that stands for what JSON does not have
BY_MARK: dict[str, Callable[[Any], Any]] = {
    "namespace": lambda contents: Namespace(**contents),
    "omegaconf": _configuration,
    "dtype": {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}.__getitem__,
}


def rebuilt(cls: Any, recorded: ModuleArguments, replacements: dict[str, Any]) -> Any:
    """A module that is made as a checkpoint's was, without its values.

    Args:
        cls: the requested class; the module is of the checkpoint's class if that is a subclass.
        recorded: the ``constructor_arguments`` of the checkpoint's module, of which those that the class takes are used.
        replacements: arguments in place of the checkpoint's.
    """
    try:
        found = find_class(recorded.class_path)
        cls = found if issubclass(found, cls) else cls
    except UserError as error:  # it was in a script, say
        if cls.__name__ != recorded.class_path.rpartition(".")[2]:
            log.warning("%s. It is loaded as a %s", error, cls.__name__)
    for name in recorded.not_plain:
        if name not in replacements:
            log.warning("checkpoint: %r is not stored, because it is not a plain value. Pass it, or its default is used", name)
    stored = _accepted(cls, recorded.defaults | recorded.init_args)
    return cls(**{name: from_plain(value) for name, value in stored.items() if is_recorded(name)} | replacements)


def read_arguments(path: str | Path, cls: type) -> dict[str, Any]:
    """The arguments in a file of hyperparameters that a class takes, as Lightning reads them."""
    read = load_hparams_from_tags_csv if Path(path).suffix == ".csv" else load_hparams_from_yaml
    return _accepted(cls, read(path))


def _accepted(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a class accepts."""
    parameters = _parameters(cls)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in arguments.items() if takes_any or name in names}


def find_class(path: str) -> type:
    """The class at an import path; it may be nested in another.

    Raises:
        UserError: if it cannot be imported.
    """
    found = pydoc.locate(path)
    if isinstance(found, type):
        return found
    advice = "Work in the folder that contains it, or install it"
    if path.startswith("__main__."):
        advice = "It was defined in a script. Move it to a module, and import it from there"
    raise UserError(f"checkpoint: its class {path!r} cannot be imported. {advice}")


def plain_hyperparameters(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a checkpoint that are plain: ``torch.load(weights_only=True)`` may not read others.

    Classes of hyperparameters are removed from the checkpoint, which Lightning would call to make a data module again. So a
    configuration of OmegaConf's comes back to a data module as a dict.
    """
    entries: dict[str, Any] = {}
    for owner in (LightningModule, LightningDataModule):
        checkpoint.pop(owner.CHECKPOINT_HYPER_PARAMS_TYPE, None)
        for name, value in checkpoint.get(owner.CHECKPOINT_HYPER_PARAMS_KEY, {}).items():
            found = entries.setdefault(owner.CHECKPOINT_HYPER_PARAMS_KEY, {})
            if SECRET.search(name):
                continue
            try:
                found[name] = to_plain(value)
            except TypeError:
                kind = type(value).__name__
                _warn_once(f"the hyperparameter {name!r} ({owner.CHECKPOINT_HYPER_PARAMS_KEY}) is of type {kind}")
    return entries


@functools.cache
def _warn_once(what: str) -> None:
    log.warning("%s. A checkpoint stores only plain values, so it is left out", what)


def device_of(map_location: Any) -> torch.device:
    """The device to which torch's ``map_location`` moves a tensor on the CPU, where a checkpoint is read."""
    if callable(map_location):
        storage = map_location(torch.UntypedStorage(0), "cpu")  # type: ignore[no-untyped-call]
        return torch.device("cpu") if storage is None else storage.device
    return torch.device(map_location.get("cpu", "cpu") if isinstance(map_location, Mapping) else map_location)
