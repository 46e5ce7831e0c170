"""Another LightningModule's layers, metrics and attributes, taken over by a COLA module."""

import inspect
import logging
from dataclasses import fields
from typing import Any

from lightning.pytorch import LightningModule

from cola_lightning.errors import UserError, nearest
from cola_lightning.module.optimization import LinkConfig

log = logging.getLogger(__name__)


def adopt(module: Any, task: LightningModule, own: type) -> None:
    """Gives a module the other one's attributes, see :meth:`COLAModule.adopt`.

    Args:
        module: the module that takes them over.
        task: the other module.
        own: COLAModule, whose attributes the other module may not have.

    Raises:
        UserError: if the module's class is not derived from the other class first, or both have an attribute of a name.
    """
    classes, name = type(module).__mro__, type(task).__name__
    if type(task) not in classes[: classes.index(own)]:  # else this class' optimizer would be used without a word
        raise UserError(f"adopt: {type(module).__name__} must be a class ({name}, COLAModule), with {name} first")
    names = {name for cls in own.__mro__ if cls.__module__.startswith("cola_lightning.") for name in vars(cls)}
    ours = {*names, *vars(own())}.difference(dir(LightningModule()), vars(type(task)))
    if both := ours.intersection([*vars(task), *task._modules, *task._parameters, *task._buffers]):
        raise UserError(f"adopt: {name} has an attribute {min(both)!r}, which is COLAModule's own. Rename the task's")
    module._modules.setdefault("model", None)  # first, so that its parameters have its name, and no other one
    initial = vars(LightningModule())
    for key, value in vars(task).items():
        if key in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            vars(module)[key].update(value)
        elif key not in initial or (not isinstance(initial[key], dict) and value != initial[key]):
            vars(module)[key] = value


def check_constructor(module: Any, own: type, received: set[str]) -> None:
    """Refuses a class that has another LightningModule's constructor, so that a link would be trained by default options.

    A constructor of the class' own that does not pass on an option is warned of: it may use the name for something else.

    Args:
        module: a module, while it is made.
        own: COLAModule.
        received: names of the options that reached ``COLAModule.__init__``.

    Raises:
        UserError: which names the line that the class needs.
        TypeError: for an option that there is not.
    """
    cls = type(module)
    constructor = next(base for base in cls.__mro__ if "__init__" in vars(base))
    if issubclass(constructor, LightningModule) and not issubclass(constructor, own) and not received:
        raise UserError(
            f"model: {cls.__name__} needs the line __init__ = COLAModule.__init__, because it has that of "
            f"{constructor.__name__}"
        )
    options = {option.name for option in fields(LinkConfig)}
    if unknown := sorted(received - options - {"seed"}):  # Python would name LinkConfig, to which they are passed on
        for base in cls.__mro__:
            options |= inspect.signature(base).parameters.keys() if issubclass(base, own) else set()
        raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {unknown[0]!r}{nearest(unknown[0], options)}")
    given = module.constructor_arguments.init_args
    if lost := [option.name for option in fields(LinkConfig) if option.name in given and option.name not in received]:
        log.warning(
            "model: %s has no effect: the __init__ of %s does not pass it on to COLAModule.__init__(self, **options)",
            ", ".join(lost),
            constructor.__name__,
        )
