"""Context managers that change a model inside a block and restore it afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module's mode is restored."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, is_training in before.items():
            module.training = is_training


@contextmanager
def with_attribute(module: object, name: str, value: Any) -> Iterator[None]:
    """Inside the block, an attribute of an object, such as a module's ``forward``, has another value."""
    had_value, before = name in vars(module), vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
        if had_value:
            setattr(module, name, before)
