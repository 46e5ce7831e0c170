"""Activations that are computed twice, to save memory: Hugging Face's models can."""

from typing import Any

from cola_lightning.errors import UserError


def checkpoint_activations(model: Any) -> None:
    """Has a Hugging Face model keep only the inputs of its blocks while training, and compute what is inside them again.

    Raises:
        UserError: if it cannot.
    """
    enable = _method(model, "enable")
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            "model.activation_checkpointing: expected a Hugging Face model that can, or a module that overrides "
            f"checkpoint_activations, received a {type(model).__name__}"
        )
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # what only reentrant checkpointing needs; it would cost a gradient of the embeddings


def keep_activations(model: Any) -> None:
    """Undoes :func:`checkpoint_activations`, where a model can."""
    if (disable := _method(model, "disable")) is not None:
        disable()


def _method(model: Any, verb: str) -> Any:
    """Transformers' method, under its present name, or the one before it."""
    return getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}", None)
