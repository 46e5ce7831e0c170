"""The check that options are given as such, and none is ``null`` that needs a value: jsonargparse accepts it for every type."""

import inspect
import pydoc
from typing import Any, TypeVar, get_args

from jsonargparse import Namespace

from cola_lightning.callbacks import ChainOfLoRA, LastCheckpoint
from cola_lightning.errors import UserError
from cola_lightning.modules.arguments import annotations


def check_options(config: Namespace) -> None:
    """Refuses a configuration of ``cola fit`` with something else in the place of options, or ``null`` in that of a value.

    Raises:
        UserError: for the first such option.
    """
    for group in ("model", "data", "trainer", "chain", "last"):
        if not isinstance(value := config.get(group), Namespace):
            raise UserError(f"{group}: expected options, each with its value, received {value!r}")
    for group in ("model", "data"):
        check_class(group, config[group])
    for group, of in {"chain": ChainOfLoRA, "last": LastCheckpoint}.items():
        check_nulls(group, config[group], of)


def check_nulls(field: str, options: Namespace, of: type) -> None:
    """Refuses ``null``, or nothing after the colon, for a constructor argument whose type does not include None.

    Args:
        field: the name of the options in messages.
        options: the arguments by name; classes among them as their ``class_path`` and ``init_args``.
        of: the class that they are for.

    Raises:
        UserError: for the first such argument.
    """
    hints = annotations(of)
    with_none = {
        name
        for base in of.__mro__
        for name, parameter in inspect.signature(base.__init__).parameters.items()  # type: ignore[misc]
        if parameter.default is None
    }
    for name, value in vars(options).items():
        hint = hints.get(name, Any)
        if value is None and name not in with_none and not _includes_none(hint):
            expected = hint.__name__ if type(hint) is type else "a value"
            raise UserError(f"{field}.{name}: expected {expected}, received null")
        if isinstance(value, Namespace):
            check_class(f"{field}.{name}", value)


def check_class(field: str, given: Namespace) -> None:
    """:func:`check_nulls` for a class and its arguments, as jsonargparse parses them; other groups of options pass."""
    of, options = pydoc.locate(given.get("class_path", "")), given.get("init_args")
    if isinstance(of, type) and isinstance(options, Namespace):
        check_nulls(field, options, of)


def _includes_none(hint: Any) -> bool:
    return hint in (Any, object, None) or isinstance(hint, TypeVar) or type(None) in get_args(hint)
