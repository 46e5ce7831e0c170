"""Hooks of a COLA module that its subclasses override: ours run even if theirs do not call ``super()``."""

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

# The hooks, and whether ours runs before a subclass' own.
HOOKS = {"on_save_checkpoint": True, "on_load_checkpoint": True, "configure_model": False}


def combine_hooks(cls: Any, ours: Any, make_callbacks: Callable[[Any], list[Callback]]) -> None:
    """Runs our hooks beside the overrides of a subclass, or of its mixin.

    If an override calls ``super()``, ours run twice, with the same effect as once.

    Args:
        cls: the subclass.
        ours: the class that defines our hooks.
        make_callbacks: makes the callbacks of a module.
    """
    for name, is_first in HOOKS.items():
        own, base = getattr(cls, name), getattr(ours, name)
        if own is not base and not hasattr(own, "runs_ours"):
            setattr(cls, name, _both(own, *((base, own) if is_first else (own, base))))
    cls.configure_callbacks = _with_ours(cls.configure_callbacks, make_callbacks)


def _both(own: Callable[..., None], *hooks: Callable[..., None]) -> Callable[..., None]:
    """A subclass' hook that runs these one after another."""

    @functools.wraps(own)
    def hook(*args: Any) -> None:
        for one in hooks:
            one(*args)

    hook.runs_ours = True  # type: ignore[attr-defined]
    return hook


def _with_ours(own: Callable[[Any], Any], make: Callable[[Any], list[Callback]]) -> Callable[[Any], list[Callback]]:
    """A subclass' ``configure_callbacks``, with the module's callbacks before its own."""

    @functools.wraps(own)
    def configure_callbacks(self: Any) -> list[Callback]:
        given = own(self)
        callbacks, ours = [given] if isinstance(given, Callback) else list(given), make(self)
        return callbacks if any(isinstance(c, type(ours[0])) for c in callbacks) else [*ours, *callbacks]

    return configure_callbacks
