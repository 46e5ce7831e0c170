"""The values of a batch that stay on the host, so that no step waits for a device to read them back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = Mapping[str, Any]
Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]  # a batch's values on the host

SHAPE_FIELDS = {"attention_mask", "labels"}  # the fields whose values decide on the shapes of a step


class HostValues:
    """Finds the values that tensors had on the host, before they were moved to a device.

    The shapes of a step depend on such values: how many tokens have a loss, where padding ends. To read them from a GPU, the
    host would wait for all that it has launched there.

    Example:
        >>> values = HostValues()
        >>> batch = {"labels": torch.tensor([3, -100])}
        >>> moved = {name: value.clone() for name, value in batch.items()}  # as to a GPU
        >>> values.remember(batch, moved)
        >>> values.get(moved["labels"]) is batch["labels"]
        True
    """

    def __init__(self) -> None:
        self._on_host: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    def remember(self, batch: Any, moved: Any) -> None:
        """Stores the values of a batch, in place of an earlier one's.

        Args:
            batch: tensors by name, on the host; another batch has no values to be found.
            moved: the same on a device.
        """
        if not isinstance(batch, Mapping) or not isinstance(moved, Mapping):
            batch = moved = {}
        pairs = [(value, batch.get(name)) for name, value in moved.items()]
        self._on_host = {
            id(copy): (copy, _version(copy), original)
            for copy, original in pairs
            if isinstance(copy, Tensor) and isinstance(original, Tensor) and original.device.type == "cpu"
        }

    def get(self, tensor: Tensor) -> Tensor:
        """The values of a tensor on the host: those stored, unless the tensor was changed since; else they are copied."""
        copy, version, original = self._on_host.get(id(tensor), (None, None, tensor))
        return original if copy is tensor and version == _version(tensor) else tensor.cpu()

    def get_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The values of a batch's tensors of at most two dimensions: not of a mask of pairs of tokens, nor of images."""
        return {name: self.get(value) for name, value in batch.items() if isinstance(value, Tensor) and value.dim() <= 2}


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place, which autograd counts; inference tensors have no count."""
    return None if tensor.is_inference() else tensor._version


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without a wait: from pageable memory a copy to a GPU would be one."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
