"""How a module was made, so that it can be made again from a checkpoint alone: its class, and its plain arguments."""

import importlib
import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any, Self

from cola_lightning.errors import UserError

# How a module trains, not what it is: a module that is only to be used needs none of it.
NOT_KEPT = {"optimizer", "init_chain", "init_links"}


class RemembersArguments:
    """A class whose instances know what they were made with, whatever a subclass' ``__init__`` does with its arguments."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Notes the arguments, by name."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        except TypeError:  # __init__ will say so
            return self
        self.__dict__["_arguments"] = _by_name(bound)
        return self

    def recipe(self) -> dict[str, Any]:
        """The class, its plain arguments, and the names of those that are not plain: ``class_path, init_args, not_plain``."""
        arguments = {name: value for name, value in self.__dict__["_arguments"].items() if name not in NOT_KEPT}
        init_args, not_plain = {}, []
        for name, value in arguments.items():
            try:
                init_args[name] = plain(value)
            except TypeError:
                not_plain.append(name)
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args, "not_plain": not_plain}


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:  # without self
        is_rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        arguments |= value if is_rest else {name: value}
    return arguments


def plain(value: Any) -> Any:
    """The value in the plainest types: ``torch.load(weights_only=True)`` reads no others.

    Raises:
        TypeError: if it has none.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # jsonargparse's restricted numbers and an enum's texts are of classes of their own
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(f"expected plain values, received {type(value).__name__}")


def find_class(class_path: str) -> type:
    """The class of a recipe.

    Raises:
        UserError: if it cannot be imported.
    """
    parts = class_path.split(".")
    for n_module in range(len(parts) - 1, 0, -1):  # a class may be inside another
        try:
            found: Any = importlib.import_module(".".join(parts[:n_module]))
        except ImportError:
            continue
        for name in parts[n_module:]:
            found = getattr(found, name, None)
        if isinstance(found, type):
            return found
    raise UserError(
        f"checkpoint: expected its module's class to be importable from here, received {class_path!r}, which is not"
    )
