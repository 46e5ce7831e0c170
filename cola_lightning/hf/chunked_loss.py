"""The language-model loss without the logits of all positions: head and cross-entropy over chunks of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cola_lightning.contexts import with_attribute
from cola_lightning.hf.host_values import Batch
from cola_lightning.hf.logits import at_positions, forward

CHUNKED_ABOVE = 2**28  # bytes of float32 logits
CHUNK = 2**26  # bytes of float32 logits that exist together


def n_bytes(model: Any, n_positions: int) -> int:
    """The bytes of a model's float32 logits at so many positions."""
    return 4 * n_positions * int(model.config.get_text_config().vocab_size)


def chunked_token_losses(model: Any, batch: Batch, places: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    """The loss of each token with one.

    The gradient of a token's loss for its own input of the head is computed with the loss. Only where the head itself is
    trained are the logits computed again, because how the losses are combined is known only afterwards.

    Args:
        model: a Hugging Face model.
        batch: as in :func:`~cola_lightning.hf.logits.logits_at`.
        places: the positions with a loss in any row.
        labels: of all rows and positions in one dimension, -100 without a loss.
        indices: those of the labels with a loss, row by row.
    """
    compute_logits, hidden = _head_and_its_inputs(model, batch, places)
    hidden, labels = hidden.flatten(0, 1)[indices], labels[indices]
    chunks = zip(*(torch.split(values, max(1, CHUNK // n_bytes(model, 1))) for values in (hidden, labels)), strict=True)

    def losses_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(compute_logits(inputs).float(), targets, reduction="none")

    if not torch.is_grad_enabled():
        losses = [losses_of(*chunk) for chunk in chunks]
    elif any(p.requires_grad for p in model.get_output_embeddings().parameters()):
        losses = [checkpoint(losses_of, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        apply: Any = _TokenLosses.apply  # which has no types before torch 2.15
        losses = [apply(compute_logits, *chunk) for chunk in chunks]
    return torch.cat(losses)


def _head_and_its_inputs(model: Any, batch: Batch, places: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A function from inputs of a model's head to logits, and the head's inputs at the places."""
    head, inputs = model.get_output_embeddings(), list[Tensor]()

    def store_input(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden

    with with_attribute(head, "forward", store_input):
        output = forward(model, batch, places)
    hidden = at_positions(model, inputs[0], places)
    is_plain = output.logits is inputs[0]  # else it scales or caps its logits

    def compute_logits(chunk: Tensor) -> Tensor:
        logits: Tensor = head(chunk[None])
        return (logits if is_plain else _transform_logits(model, head, chunk[None], logits))[0]

    return compute_logits, hidden


def _transform_logits(model: Any, head: nn.Module, hidden: Tensor, logits: Tensor) -> Tensor:
    """The logits that the model's forward pass computes from its head's output: it scales or caps each of them."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    output, ids = BaseModelOutputWithPast(last_hidden_state=hidden), hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
    with (
        torch.compiler.set_stance("force_eager"),
        with_attribute(model.base_model, "forward", lambda *_, **__: output),
        with_attribute(head, "forward", lambda _: logits),
    ):
        transformed: Tensor = model.forward(input_ids=ids).logits
    return transformed


class _TokenLosses(torch.autograd.Function):
    """The losses of tokens; it computes the gradient of each with respect to its own input in the forward pass."""

    @staticmethod
    def forward(ctx: Any, compute_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
        inputs, targets = hidden.detach().requires_grad_(), targets[:, None]
        with torch.enable_grad():
            logits = compute_logits(inputs).float()
        logs = logits.detach().log_softmax(-1)
        losses = -logs.gather(1, targets).squeeze(1)
        gradient = logs.exp_().scatter_add_(1, targets, -torch.ones_like(targets, dtype=logs.dtype))  # softmax - one-hot
        ctx.save_for_backward(*torch.autograd.grad(logits, inputs, gradient))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (saved,) = ctx.saved_tensors
        return None, gradient[:, None].to(saved.dtype) * saved, None
