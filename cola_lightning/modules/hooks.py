"""Hooks of a COLA module that its subclasses override: ours run even if theirs do not call ``super()``."""

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback


def keep_hooks(cls: Any, ours: Any, make_callbacks: Callable[[Any], list[Callback]]) -> None:
    """Runs our hooks beside the overrides of a subclass, or of its mixin.

    If an override calls ``super()``, ours run twice, with the same effect as once.

    Args:
        cls: the subclass.
        ours: the class that defines our hooks.
        make_callbacks: makes the callbacks of a module.
    """
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        found = getattr(cls, name)
        if found is not getattr(ours, name) and not hasattr(found, "runs_ours"):
            setattr(cls, name, _after(getattr(ours, name), found))
    if cls.configure_model is not ours.configure_model and not hasattr(cls.configure_model, "runs_ours"):
        cls.configure_model = _before(ours.configure_model, cls.configure_model)
    cls.configure_callbacks = _with_ours(cls.configure_callbacks, make_callbacks)


def _after(ours: Callable[..., None], own: Callable[..., None]) -> Callable[..., None]:
    """A subclass' hook after ours."""

    @functools.wraps(own)
    def hook(self: Any, checkpoint: dict[str, Any]) -> None:
        ours(self, checkpoint)
        own(self, checkpoint)

    hook.runs_ours = True  # type: ignore[attr-defined]
    return hook


def _before(ours: Callable[..., None], own: Callable[..., None]) -> Callable[..., None]:
    """A subclass' ``configure_model`` before ours."""

    @functools.wraps(own)
    def configure_model(self: Any) -> None:
        own(self)
        ours(self)

    configure_model.runs_ours = True  # type: ignore[attr-defined]
    return configure_model


def _with_ours(own: Callable[[Any], Any], make: Callable[[Any], list[Callback]]) -> Callable[[Any], list[Callback]]:
    """A subclass' ``configure_callbacks``, with the module's callbacks before its own."""

    @functools.wraps(own)
    def configure_callbacks(self: Any) -> list[Callback]:
        given = own(self)
        callbacks, ours = [given] if isinstance(given, Callback) else list(given), make(self)
        return callbacks if any(isinstance(c, type(ours[0])) for c in callbacks) else [*ours, *callbacks]

    return configure_callbacks
