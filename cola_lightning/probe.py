"""Inputs for which a model's logits are known, to check a copy of it that was written and loaded again."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.errors import ExportError, UserError, one_line
from cola_lightning.modes import evaluating

log = getLogger(__name__)

TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Probe:
    """Inputs for a model, the expected logits, and whether these were computed in half precision."""

    inputs: Mapping[str, Any] | tuple[Any, ...]
    logits: Tensor
    is_half: bool = False

    def compare(self, model: nn.Module, how: str, *, where: str = "", is_same: bool = True) -> str:
        """Reports how far the logits of an export, loaded again, are from the expected ones.

        Args:
            model: the loaded model.
            how: how it was loaded, as the beginning of the line.
            where: the base on which it was loaded, as the end of the line.
            is_same: whether the logits are to be the same, and not those of an approximation.

        Raises:
            ExportError: if they differ by more than float32 rounding, or, in half precision or not ``is_same``, are not finite;
                and if there are none.
        """
        try:
            logits = logits_of(model, self.inputs)
        except Exception as error:  # in a dtype that its code does not expect, say
            raise ExportError(f"{how}, it has no logits ({one_line(repr(error))}){where}: it is not kept") from error
        # Infinite logits are those of masked classes.
        difference = float((logits - self.logits).abs().masked_fill(logits == self.logits, 0).max())
        largest = float(self.logits.masked_fill(self.logits.isinf(), 0).abs().max())
        line = f"{how}, its logits differ from the module's by at most {difference:.2g}, where the largest is {largest:.3g}"
        line += where
        is_close = is_same and not self.is_half and not _is_half(model)
        if not (difference <= TOLERANCE * largest if is_close else math.isfinite(difference)):
            raise ExportError(f"{line}: it is not kept")
        return line


def make_probe(model: nn.Module, example: Any = None) -> Probe | None:
    """A few tokens, or an example input, and the model's logits for them; None if no input is known.

    Args:
        model: as it was trained, or upcast, on the CPU.
        example: as Lightning's ``example_input_array``: a tensor, a tuple, or a dict.

    Raises:
        UserError: for an example that the model does not take.
    """
    parameters = inspect.signature(model.forward).parameters
    if example is None:
        return _probe_of_tokens(model) if "input_ids" in parameters else None
    inputs: Mapping[str, Any] | tuple[Any, ...]
    if isinstance(example, Mapping):
        inputs = dict(example)
    else:
        inputs = example if isinstance(example, tuple) else (example,)
        if not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY} & {p.kind for p in parameters.values()}:
            inputs = dict(zip(parameters, inputs, strict=False))
    try:
        return Probe(inputs, logits_of(model, inputs), _is_half(model))
    except Exception as error:  # of the model's code
        raise UserError(
            f"example_input_array: expected inputs of the model itself, a {type(model).__name__}, to compare its logits, "
            f"received others ({one_line(repr(error))}): verify=False (--no_verify) compares none"
        ) from error


def _probe_of_tokens(model: nn.Module) -> Probe | None:
    """None if tokens are not all that the model takes, as for an encoder-decoder, or a model of texts and images."""
    config: Any = getattr(model, "config", None)
    try:
        ids = _tokens(config.get_text_config())
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Probe(inputs, logits_of(model, inputs), _is_half(model))
    except Exception as error:  # of the model's code, or of a configuration that is not transformers'
        log.warning(
            "no logits are compared: %s does not take tokens alone (%s); example_input_array gives other inputs",
            type(model).__name__,
            one_line(repr(error)),
        )
        return None


def _tokens(config: Any) -> Tensor:
    """Two rows of random tokens, each with equally many ends of text, one at its end: some classifiers read only there."""
    row = torch.randint(config.vocab_size, (12,), generator=torch.Generator().manual_seed(0))
    rows = torch.stack([row, row.flip(0)])
    end: Any = getattr(config, "eos_token_id", None)
    return torch.cat([rows, torch.full((2, 1), end)], dim=1) if end in range(config.vocab_size) else rows


def _is_half(model: nn.Module) -> bool:
    return any(parameter.is_floating_point() and parameter.dtype.itemsize < 4 for parameter in model.parameters())


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Tensor:
    """A model's first output, its logits, in evaluation mode and float32."""
    with evaluating(model):
        output: Any = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    outputs = output.values() if isinstance(output, Mapping) else output
    logits: Tensor = output if isinstance(output, Tensor) else next(iter(outputs))
    return logits.float()
