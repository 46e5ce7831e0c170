"""Logits of a causal language model at the requested positions, with as little computation as possible."""

import inspect
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola_lightning.contexts import evaluating
from cola_lightning.errors import UserError
from cola_lightning.hf.host_values import Batch

log = logging.getLogger(__name__)

# The tolerance for logits computed in the same way, next to other tokens: hardly any rounding, in any dtype.
UNCHANGED_TOLERANCE = 1e-3

# The tolerance for logits in half precision, computed in different ways.
HALF_TOLERANCE = 1e-1

# The fields of a language-model batch with one value per token. All but the labels go to the model, as far as it takes them.
TOKEN_FIELDS = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"}


def logits_at(model: nn.Module, batch: Batch, logits_to_keep: int | Tensor) -> Tensor:
    """The logits of a causal language model, in float32, at the requested positions.

    Args:
        model: a Hugging Face model.
        batch: ``input_ids`` and ``attention_mask`` (rows x length), padded on either side.
        logits_to_keep: the number of positions at the end, or the positions.

    Shape:
        result: rows x positions x vocabulary.
    """
    return logits_and_router_loss(model, batch, logits_to_keep)[0]


def logits_and_router_loss(model: Any, batch: Batch, logits_to_keep: int | Tensor) -> tuple[Tensor, Tensor | float]:
    """The logits of :func:`logits_at`, and what Hugging Face adds to the tokens' loss: 0 unless :func:`has_router_loss`."""
    output = forward(model, batch, logits_to_keep)
    return at_positions(model, output.logits, logits_to_keep).float(), router_loss(model, output)


def forward(model: Any, batch: Batch, logits_to_keep: int | Tensor) -> Any:
    """A model's output for a batch, with logits at the requested positions if its forward pass takes them."""
    parameters = forward_parameters(model)
    inputs = {name: value for name, value in batch.items() if name in parameters and name != "labels" and value is not None}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and inputs.keys() <= TOKEN_FIELDS | {"inputs_embeds"}:
        # A row begins at position 0, also after padding on the left. An image's tokens may have more than one position.
        inputs.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
    inputs |= {"use_cache": False, "logits_to_keep": logits_to_keep}
    return model(**{name: value for name, value in inputs.items() if name in parameters})


def forward_parameters(model: Any) -> set[str]:
    """The names that a model's forward pass takes, with those of transformers' common keywords if it passes keywords on."""
    from transformers.utils.generic import TransformersKwargs

    parameters = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return set(parameters) | (TransformersKwargs.__annotations__.keys() - TOKEN_FIELDS if passes_on else set())


def check_fields(model: Any, batch: Batch, others: Collection[str] = ()) -> None:
    """Refuses a batch with values that would vanish.

    Args:
        model: a Hugging Face model.
        batch: the batch.
        others: names that the caller reads.

    Raises:
        UserError: for values that are neither by token nor taken by the model's forward pass; it names them.
    """
    unknown = batch.keys() - TOKEN_FIELDS - set(others)
    if unknown and (unknown := unknown - forward_parameters(model)):
        raise UserError(
            f"batch: {type(model).__name__} does not take {', '.join(sorted(unknown))}. Leave them out of the batches, in the "
            "collator for example."
        )


def at_positions(model: Any, values: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The values at the requested positions, of a head's input or output: rows x positions x size."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return values  # of these alone: only an older architecture's head computes all positions
    return values[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else values[:, logits_to_keep]


def router_loss(model: Any, output: Any) -> Tensor | float:
    """What Hugging Face adds to the tokens' loss: 0 unless :func:`has_router_loss`."""
    loss: Tensor | None = getattr(output, "aux_loss", None) if has_router_loss(model) else None
    return 0.0 if loss is None else loss * model.router_aux_loss_coef  # a model without experts has none


def has_router_loss(model: Any) -> bool:
    """Whether the load-balancing loss of a mixture of experts is used: ``output_router_logits`` of its configuration."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


# ---------------------------------------------------------------------- what a model must be


@torch.no_grad()
def check_decoder(model: Any) -> None:
    """Refuses a model that, on three tokens, is not a decoder or gives other logits after padding on the left.

    The latter are models that count positions without taking ``position_ids``. Only three tokens are tried: what appears only
    in longer sequences, or with other tokens, is not found.

    Raises:
        UserError: if the last token's logits are not those with four tokens of padding before them, or if the logits of the
            first two change with the last.
    """
    tokens = torch.arange(3)[None] + model.config.get_text_config().vocab_size // 2
    mask = torch.ones_like(tokens)
    with evaluating(model):  # at the model's own positions, except for the padded tokens
        alone, changed = (
            model(input_ids=ids, attention_mask=mask).logits.float() for ids in (tokens, tokens - torch.tensor([0, 0, 2]))
        )
        padded = logits_at(model, {"input_ids": F.pad(tokens, (4, 0)), "attention_mask": F.pad(mask, (4, 0))}, 1)
    is_padded = are_near(padded, alone[:, -1:], rounding_tolerance(model))
    if not is_padded or not are_near(changed[:, :-1], alone[:, :-1], UNCHANGED_TOLERANCE):
        raise UserError(
            f"model.model_name: {type(model).__name__} is not a decoder that can be padded on the left: its logits change with "
            f"{'a later token' if is_padded else 'that padding'}. Is it an encoder, or is_decoder false in its config.json?"
        )


def rounding_tolerance(model: Any) -> float:
    """The tolerance for logits computed in different ways: rounding alone, of which half precision has more."""
    return 1e-2 if model.dtype.itemsize >= 4 else HALF_TOLERANCE


def are_near(logits: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits are as expected, up to this share of the largest."""
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())
