"""The check of an export: whether it can be loaded again, and gives the module's logits."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cola_lightning.chain.names import matched
from cola_lightning.errors import ExportError, one_line
from cola_lightning.export.model import TrainedModel
from cola_lightning.files.plan import make_plan
from cola_lightning.files.stored import CannotStream, ModelFolder
from cola_lightning.files.verify import verify
from cola_lightning.merge import free

log = getLogger(__name__)

TOLERANCE = 1e-4  # of the largest logit


@contextmanager
def loading_again() -> Iterator[None]:
    """Inside the block, an export that cannot be read becomes an ExportError, because an OSError would read as a full disk.

    Raises:
        ExportError: with the library's message.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # transformers raises an OSError for an incomplete folder, too
        raise ExportError(f"the export could not be loaded again, so it was deleted ({one_line(str(error))})") from error


def prove_merged(model: TrainedModel, folder: Path) -> str:
    """Proves, tensor by tensor, that a written model is the base that was trained on with the links, each weight rounded once.

    Args:
        model: the model, whose base is built again and takes its memory.
        folder: the written model.

    Raises:
        ExportError: if a tensor is wrong.
    """
    base = model.adapted.merged_model(0, device="cpu", in_place=True, is_rounded=True)
    values = base.state_dict()
    try:
        merged = ModelFolder.open(str(folder), "output")
        plan = make_plan(ModelFolder(folder, values, merged.config), model.chain)
    except CannotStream as error:
        return f"its tensors were not compared: {error}"
    names = matched(values, merged.tensors)
    seen = {values[name].data_ptr() for name in names}
    others = [name for name, value in values.items() if value.data_ptr() not in seen]  # transformers stores them otherwise
    plan = replace(plan, tensors={name: plan.tensors[name] for name in names})
    proof = verify(plan, replace(merged, tensors={name: merged.tensors[name] for name in names.values()}), {})
    free(base)
    if proof.wrong:
        raise ExportError(f"the export was deleted: {proof.sentence}")
    return proof.sentence + (f"; not compared, because files store them otherwise: {', '.join(others)}" if others else "")


# ---------------------------------------------------------------------- logits


@dataclass(frozen=True)
class ReferenceLogits:
    """Inputs for a model, and the expected logits.

    Attributes:
        inputs: the model's inputs.
        logits: its logits for them.
        buffers: its buffers that no file holds, such as the scale of Gemma's embeddings, by name.
    """

    inputs: Mapping[str, Any] | tuple[Any, ...]
    logits: Tensor
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Self:
        """A model's logits for these inputs."""
        stored = model.state_dict().keys()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in stored}
        return cls(inputs, first_output(model, inputs), buffers)

    def copy_buffers(self, model: nn.Module) -> None:
        """Gives a model that was loaded the buffers of the module that no file holds, which half precision may have rounded.

        The comparison is of what the file holds.
        """
        for name, buffer in model.named_buffers():
            if name in self.buffers:
                buffer.copy_(self.buffers[name])

    def compare(self, model: nn.Module, loaded: str, *, is_same: bool = True) -> str:
        """Reports how far the logits of an export, loaded again, are from the expected ones.

        Args:
            model: the loaded model.
            loaded: how the model was loaded, as the beginning of the line.
            is_same: whether the logits are to be the same, and not those of an approximation.

        Raises:
            ExportError: if they differ by more than float32 rounding, or, in half precision or not ``is_same``, are not finite.
        """
        logits = first_output(model, self.inputs)
        # Infinite logits are those of masked classes.
        difference = float((logits - self.logits).abs().masked_fill(logits == self.logits, 0).max())
        largest = float(self.logits.masked_fill(self.logits.isinf(), 0).abs().max())
        line = f"{loaded}, its logits differ from the module's by at most {difference:.2g}, where the largest is {largest:.3g}"
        is_half = any(value.is_floating_point() and value.dtype.itemsize < 4 for value in model.parameters())
        if not (difference <= TOLERANCE * largest if is_same and not is_half else math.isfinite(difference)):
            raise ExportError(f"{line}. The export was deleted")
        return line


def reference_logits(model: Any, example: Any = None) -> ReferenceLogits | None:
    """The model's logits for an example input, for a few tokens or for random pictures; None if no input is known.

    The tokens are two random rows, each with equally many ends of text, one at its end: some classifiers read only there.

    Args:
        model: as it was trained, in float32, on the CPU.
        example: as Lightning's ``example_input_array``: a tensor, a tuple, or a dict.
    """
    if example is not None:
        inputs: Any = example if isinstance(example, Mapping | tuple) else (example,)
        return ReferenceLogits.of(model, inputs)
    parameters = inspect.signature(model.forward).parameters
    if not {"input_ids", "pixel_values"} & parameters.keys():
        return None
    try:
        if "input_ids" not in parameters:
            inputs = _random_pictures(model.config)
            return ReferenceLogits.of(model, inputs)
        config = model.config.get_text_config()
        row = torch.randint(config.vocab_size, (12,), generator=torch.Generator().manual_seed(0))
        ids = torch.stack([row, row.flip(0)])
        end: Any = getattr(config, "eos_token_id", None)
        if end in range(config.vocab_size):
            ids = torch.cat([ids, torch.full((2, 1), end)], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return ReferenceLogits.of(model, inputs)
    except Exception as error:  # an encoder-decoder, a model of texts and images, a configuration that is not transformers'
        what = f"{type(model).__name__} does not take tokens alone ({one_line(repr(error))})"
        log.warning("no logits are compared: %s. Set example_input_array of the module to compare those of other inputs", what)
        return None


def _random_pictures(config: Any) -> dict[str, Tensor]:
    """Two pictures of the size that a configuration of transformers names."""
    size = getattr(config, "image_size", 224)
    shape = [getattr(config, "num_channels", 3), *([size, size] if isinstance(size, int) else size)]
    shape = getattr(config, "pretrained_cfg", {}).get("input_size", shape)  # of timm's
    return {"pixel_values": torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))}


@torch.no_grad()
def first_output(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Tensor:
    """A model's first output, its logits, in float32; the model is in evaluation mode from then on."""
    model.eval()
    output: Any = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    if not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return cast(Tensor, output).float()
