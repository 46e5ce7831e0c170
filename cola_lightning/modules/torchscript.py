"""Hides annotations and properties of our classes from TorchScript, which reads them even if ``forward`` does not use them."""

import inspect
from typing import Any

from cola_lightning.errors import UserError


def hide_from_torchscript(cls: Any) -> None:
    """Hides annotations and properties of one of our classes, and of its bases of ours, from TorchScript."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("cola_lightning.")]
    annotated = [name for base in ours for name in inspect.get_annotations(base) if name != "model"]
    properties = [name for base in ours for name, value in vars(base).items() if isinstance(value, property)]
    cls.__jit_ignored_attributes__ = annotated
    cls.__jit_unused_properties__ = cls.__jit_unused_properties__ + properties


def refuse_links(module: Any) -> Any:
    """Called first by ``torch.jit.script``, which cannot compile links.

    Raises:
        UserError: for a module with links.
    """
    if module.adapted.live is not None:
        raise UserError("torch.jit.script: expected a model without links, as merged_model() gives it, received one with them")
    return module
