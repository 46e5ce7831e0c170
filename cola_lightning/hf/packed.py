"""Sequences that share a row, each with positions that start again: which models keep them apart, and by what."""

import logging
from typing import Any, Literal

import torch
from torch.nn import functional as F

from cola_lightning.constants import IGNORE_INDEX
from cola_lightning.contexts import evaluating
from cola_lightning.errors import one_line
from cola_lightning.hf.host_values import Batch
from cola_lightning.hf.logits import (
    HALF_TOLERANCE,
    UNCHANGED_TOLERANCE,
    are_near,
    logits_at,
    rounding_tolerance,
)

log = logging.getLogger(__name__)

# The tolerance for float32 logits computed in the same way in the same batch: a convolution with small weights shows little.
EXACT_TOLERANCE = 1e-5

# By what a model keeps sequences apart: positions in rows, as transformers' own masks do; positions in a single row, as flash
# attention does; or nothing.
Separation = Literal["rows", "one row", "none"]


def is_packed(batch: Batch) -> bool:
    """Whether positions start again inside a row, between tokens that are not padding."""
    starts, mask = batch["position_ids"].diff(dim=-1) < 1, batch.get("attention_mask")
    return bool((starts if mask is None else starts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)).any())


def separate(batch: Batch, separation: Separation) -> dict[str, Any]:
    """A batch whose sequences the model keeps apart, without a loss on the first token of a sequence.

    Args:
        batch: ``input_ids``, ``labels`` and ``position_ids`` (rows x length), which start again with each sequence; padding
            is a sequence without a loss, or is marked by ``attention_mask`` (rows x length).
        separation: by what the model keeps them apart.
    """
    positions, mask = batch["position_ids"].expand_as(batch["labels"]), batch.get("attention_mask")
    if mask is not None:  # transformers reads positions where there is none; each padded token is now a sequence
        positions = positions.masked_fill(mask == 0, 0)
    starts = F.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)  # of sequences, as transformers finds them
    labels = batch["labels"].masked_fill(starts, IGNORE_INDEX)
    packed = {name: value for name, value in batch.items() if name != "attention_mask"}
    packed |= {"position_ids": positions, "labels": labels}
    if separation == "one row":
        token_fields = [name for name, value in packed.items() if getattr(value, "shape", ())[:2] == positions.shape]
        packed |= {name: packed[name].flatten(0, 1)[None] for name in token_fields}
    return packed


@torch.no_grad()
def find_separation(model: Any) -> Separation:
    """By what a model keeps apart sequences whose positions start again: tried out on nine tokens.

    The logits of the second of two sequences must not change with the first, and must equal those of it alone.

    Args:
        model: a Hugging Face model.
    """
    n, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    tokens = (torch.arange(9, device=device) + n // 2) % n
    rows = torch.stack([tokens, torch.cat([(tokens[:5] - 7) % n, tokens[5:]])])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]], device=device).expand(2, -1)
    packed = {"input_ids": rows, "labels": rows, "position_ids": positions}
    ways: list[Separation] = ["rows", "one row"]
    # Autocast stays as it is: flash attention takes half precision alone.
    tolerance = HALF_TOLERANCE if torch.is_autocast_enabled(device.type) else rounding_tolerance(model)
    untouched = UNCHANGED_TOLERANCE if tolerance == HALF_TOLERANCE else EXACT_TOLERANCE
    with evaluating(model):
        alone = logits_at(model, {"input_ids": tokens[None, 5:], "attention_mask": torch.ones_like(tokens[None, 5:])}, 4)
        for way in ways:
            try:
                batch = separate(packed, way)
                both = logits_at(model, batch, torch.arange(batch["input_ids"].shape[1], device=device))
            except Exception as error:  # whatever a model raises that takes rows of one sequence alone
                log.info("%s does not take sequences that share a row: %s", type(model).__name__, one_line(str(error)))
                continue
            behind, behind_other = both.view(2, 9, -1)[:, 5:]
            if are_near(behind_other, behind, untouched) and are_near(behind, alone[0], tolerance):
                return way
    return "none"
