"""Logits of a causal language model at the requested positions, with as little computation as possible."""

import inspect
import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola_lightning.contexts import evaluating
from cola_lightning.errors import UserError
from cola_lightning.hf.host_values import Arrays, Batch, to_device

log = logging.getLogger(__name__)

# The cost of one more forward pass, in tokens. On a CPU it reads the weights once more: 14 to 20 per thread were measured (135
# million parameters, 1 and 2 threads). Elsewhere, not measured, as many as keep a GPU busy.
PASS_COST_PER_THREAD = 16
PASS_COST_ELSEWHERE = 4096

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
    logits: Tensor = forward(model, batch, logits_to_keep).logits
    return at_positions(model, logits, logits_to_keep).float()


def forward(model: Any, batch: Batch, logits_to_keep: int | Tensor) -> Any:
    """A model's output for a batch, with logits at the requested positions if its forward pass takes them.

    In training, the weighted loss of a mixture's routers is left in the model, as ``router_loss``.
    """
    parameters = forward_parameters(model)
    inputs = {name: value for name, value in batch.items() if name in parameters and name != "labels" and value is not None}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and inputs.keys() <= TOKEN_FIELDS | {"inputs_embeds"}:
        # A row begins at position 0, also after padding on the left. An image's tokens may have more than one position.
        inputs.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
    inputs |= {"use_cache": False, "logits_to_keep": logits_to_keep}
    output = model(**{name: value for name, value in inputs.items() if name in parameters})
    if torch.is_grad_enabled() and has_router_loss(model):
        model.router_loss = output.aux_loss * getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
    return output


def has_router_loss(model: Any) -> bool:
    """Whether training adds the load-balancing loss of a mixture of experts: if its configuration asks for router logits."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


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
        raise UserError(f"batch: {type(model).__name__} does not take {', '.join(sorted(unknown))}. Leave them out")


def at_positions(model: Any, values: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The values at the requested positions, of a head's input or output: rows x positions x size."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return values  # of these alone: only an older architecture's head computes all positions
    return values[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else values[:, logits_to_keep]


# ---------------------------------------------------------------------- rows of similar length


def split_by_length(batch: Batch, arrays: Arrays | None = None) -> list[tuple[list[int], Batch]]:
    """Splits a batch into parts of rows of similar length, without the padding that only longer rows of other parts need.

    Each part is a separate forward pass, so there are only as many as save time.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (rows x length), padded on the left, and other values per token.
        arrays: the mask on the host; None: that of the batch.

    Returns:
        the row indices and the batch of each part. A batch without padding on the left is one part, itself.
    """
    ids = batch["input_ids"]
    whole = [(list(range(len(ids))), batch)]
    by_token = {name: batch[name] for name in TOKEN_FIELDS & batch.keys() if batch[name] is not None}
    if "attention_mask" not in by_token or any(value.shape != ids.shape for value in by_token.values()):
        return whole
    mask = by_token["attention_mask"].numpy(force=True) if arrays is None else arrays["attention_mask"]
    lengths = (ids.shape[1] - (mask != 0).argmax(1)).tolist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    cuts = cut_by_length([lengths[row] for row in order], pass_cost(ids.device))
    if len(cuts) == 1:
        return whole
    parts: list[tuple[list[int], Batch]] = []
    for start, end in zip(cuts, [*cuts[1:], len(order)], strict=True):
        rows, longest = order[start:end], lengths[order[start]]
        indices = to_device(torch.tensor(rows), ids.device)
        parts.append((rows, {name: value[indices, -longest:] for name, value in by_token.items()}))
    return parts


def pass_cost(device: torch.device) -> float:
    """The cost of one more forward pass on a device, in tokens."""
    return PASS_COST_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else PASS_COST_ELSEWHERE


def cut_by_length(lengths: Sequence[int], part_cost: float) -> list[int]:
    """Where to cut rows, so that the parts, each padded to its longest row, have the lowest total cost.

    Args:
        lengths: of the rows, from the longest to the shortest.
        part_cost: cost of a part, besides its tokens.

    Returns:
        where each part begins.

    Example:
        >>> cut_by_length([90, 80, 20, 20], 10), cut_by_length([90, 80, 20, 20], 200)
        ([0, 2], [0])
    """
    cheapest: list[tuple[float, int]] = [(0, 0)]  # of the first rows: the cost, and where the last part begins
    for end in range(1, len(lengths) + 1):
        costs = ((cheapest[start][0] + lengths[start] * (end - start) + part_cost, start) for start in range(end))
        cheapest.append(min(costs))
    cuts, end = [], len(lengths)
    while end:
        end = cheapest[end][1]
        cuts.append(end)
    return cuts[::-1]


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
