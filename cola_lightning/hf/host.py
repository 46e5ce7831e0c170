"""The values of batches on the host: to read them from a GPU, the host would wait for all that it has launched there."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

DECIDING = {"attention_mask", "labels", "n_sequences", "n_shared"}


class HostValues:
    """Finds the values that tensors had on the host, before they were moved to a device.

    The shapes of a step depend on such values: how many tokens have a loss, where padding ends.

    Example:
        >>> values = HostValues()
        >>> mine = {"labels": torch.tensor([3, -100])}
        >>> moved = {name: value.clone() for name, value in mine.items()}  # as to a GPU
        >>> values.remember(mine, moved)
        >>> values.of(moved["labels"]) is mine["labels"]
        True
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    def remember(self, batch: Any, moved: Any) -> None:
        """Stores the values of a batch, in place of an earlier one's.

        Args:
            batch: tensors by name, on the host; another batch has no values to be found.
            moved: the same on a device.
        """
        if not isinstance(batch, Mapping) or not isinstance(moved, Mapping):
            batch = moved = {}
        pairs = [(value, batch.get(name)) for name, value in moved.items()]
        self._found = {
            id(theirs): (theirs, _version(theirs), mine)
            for theirs, mine in pairs
            if isinstance(theirs, Tensor) and isinstance(mine, Tensor) and mine.device.type == "cpu"
        }

    def of(self, tensor: Tensor) -> Tensor:
        """The values of a tensor on the host: those stored, unless the tensor was changed since; else they are copied."""
        theirs, version, mine = self._found.get(id(tensor), (None, None, tensor))
        return mine if theirs is tensor and version == _version(tensor) else tensor.cpu()

    def of_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The values of a batch's tensors of at most two dimensions: not of a mask of pairs of tokens, nor of images."""
        found = ((name, value) for name, value in batch.items() if isinstance(value, Tensor) and value.dim() <= 2)
        return {name: self.of(value) for name, value in found}


def arrays_of(host: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Values on the host that decide on the shapes of a step, as arrays: what reads them is no work of a device."""
    return {name: host[name].numpy() for name in DECIDING & host.keys()}


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place, which autograd counts; inference tensors have no count."""
    return None if tensor.is_inference() else tensor._version


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without a wait: from pageable memory a copy to a GPU would be one."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
