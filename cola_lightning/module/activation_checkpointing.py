"""Activation checkpointing of Hugging Face models: less memory, for activations computed twice."""

from typing import Any

from cola_lightning.errors import UserError


def checkpoint_activations(model: Any) -> None:
    """Has a Hugging Face model store only the inputs of its blocks while training, and recompute their activations.

    Raises:
        UserError: for another model.
    """
    enable = _method(model, "enable")
    if enable is None:
        raise UserError(
            f"model.activation_checkpointing: {type(model).__name__} is not a Hugging Face model. Override "
            "checkpoint_activations of your module"
        )
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # needed by reentrant checkpointing alone; it would cost a gradient of the embeddings


def disable_activation_checkpointing(model: Any) -> None:
    """Undoes :func:`checkpoint_activations`, if the model supports it."""
    if (disable := _method(model, "disable")) is not None:
        disable()


def _method(model: Any, verb: str) -> Any:
    """Transformers' method, under its present or its former name."""
    return getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}", None)
