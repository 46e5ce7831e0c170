"""A module's constructor arguments: recorded, stored in its checkpoints as plain values, and passed to its class again."""

import inspect
import logging
import pydoc
import re
from contextlib import suppress
from enum import Enum
from os import PathLike
from typing import Any, Self

import numpy as np

import cola_lightning
from cola_lightning.chain.facts import ModuleArguments
from cola_lightning.errors import UserError

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


class RecordsArguments:
    """Records each instance's constructor arguments, whatever a subclass' ``__init__`` does with them.

    (A separate class: jsonargparse takes the signature of ``__new__`` where a class defines one next to its ``__init__``.)

    Attributes:
        constructor_arguments: how the module is made again.
    """

    constructor_arguments: ModuleArguments

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
                    recorded.init_args[name] = to_plain(arguments[name])
                except TypeError:
                    recorded.not_plain.append(name)
        self.__dict__["constructor_arguments"] = recorded
        return self


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


def to_plain(value: Any) -> Any:
    """The value in types that JSON has: numbers, texts, and lists and dicts of these. A path is a text; secrets are left out.

    Raises:
        TypeError: if it cannot be expressed in them.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return to_plain(value.item())
    for kind in (int, float, str):  # jsonargparse's restricted numbers are of subclasses
        if isinstance(value, kind) and not isinstance(value, Enum):  # which would not be one of its class when it comes back
            return kind(value)
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, list | tuple):
        return type(value)(map(to_plain, value)) if type(value) in (list, tuple) else list(map(to_plain, value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: to_plain(item) for key, item in value.items() if not SECRET.search(key)}
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def rebuilt(cls: Any, recorded: ModuleArguments, replacements: dict[str, Any]) -> Any:
    """A module that is made as a checkpoint's was, without its values.

    Args:
        cls: the requested class; the module is of the checkpoint's class if that is a subclass.
        recorded: the ``constructor_arguments`` of the checkpoint's module.
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
    return cls(**{name: value for name, value in recorded.init_args.items() if is_recorded(name)} | replacements)


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
