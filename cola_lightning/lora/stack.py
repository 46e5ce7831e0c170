"""The finished links of one layer next to its weight: one frozen low-rank pair, for bases that cannot be merged into.

Rounding a merged link into a half-precision weight loses most of it, and a 4-bit weight cannot be added to at all; a sum of
links is itself of low rank, and its factors are the links' own, side by side.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[..., Tensor]


class Stack:
    """Links side by side, added in one go: ``x A^T B`` is the sum of each link's ``scaling * B A x``.

    No module and no buffers: DDP would send those at every step, and a state dict would contain them; the chain does already.

    Args:
        n_in: inputs of the layer.
        n_out: outputs of the layer.
        dtype: compute dtype of the layer, and so of the factors.
        device: device of the factors.
        batch_shape: the first sizes of A and B, for a pair of them for each expert.

    Attributes:
        A: capacity x in, or for experts, experts x capacity x in. The capacity is a power of two.
        B: capacity x out, also with a row for each rank, so that a part of it is contiguous.
        rank: how many rows are in use; those beyond it are zero.

    Example:
        >>> stack = Stack(3, 2, torch.float32, "cpu")
        >>> stack.push(torch.ones(1, 3), torch.ones(2, 1), scaling=0.5)
        >>> stack.add_to(torch.zeros(1, 2), torch.ones(1, 3))
        tensor([[1.5000, 1.5000]])
    """

    def __init__(
        self, n_in: int, n_out: int, dtype: torch.dtype, device: torch.device | str, batch_shape: tuple[int, ...] = ()
    ) -> None:
        self.A = torch.zeros(*batch_shape, 0, n_in, dtype=dtype, device=device)
        self.B = torch.zeros(*batch_shape, 0, n_out, dtype=dtype, device=device)
        self.rank = 0

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank x in) and B (out x rank) of all links together; their scalings are in B."""
        return self.A[..., : self.rank, :], self.B[..., : self.rank, :].mT

    @torch.no_grad()
    def push(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Adds a link: ``lora_A`` is rank x in, ``lora_B`` out x rank."""
        end = self.rank + lora_A.shape[-2]
        self._grow(end)
        dtype = torch.promote_types(lora_B.dtype, self.B.dtype)
        lora_A, lora_B = lora_A.to(self.A.device), lora_B.to(self.B.device, dtype) * scaling
        # B is small compared with A: fp16 would store it as subnormal numbers. Scaling by a power of two is exact.
        shift = torch.exp2(torch.log2(_size(lora_A) / _size(lora_B)).div(2).round())
        self.A[..., self.rank : end, :] = lora_A / shift
        self.B[..., self.rank : end, :] = lora_B.mT * shift
        self.rank = end

    def first(self, rank: int) -> "Stack":
        """A stack of the first links, up to this total rank; it shares their memory."""
        stack = copy.copy(self)
        stack.A, stack.B, stack.rank = self.A[..., :rank, :], self.B[..., :rank, :], rank
        return stack

    def _grow(self, rank: int) -> None:
        """Makes room for this total rank, up to the next power of two: a compiled model is compiled anew for each size."""
        missing = (1 << (rank - 1).bit_length()) - self.A.shape[-2]
        if missing > 0:
            with torch.inference_mode(False):  # for a knot in a validation: the next training step uses these tensors
                self.A, self.B = (F.pad(factor, (0, 0, 0, missing)) for factor in (self.A, self.B))

    def clear(self) -> None:
        """Removes the links; their memory stays allocated."""
        self.A.zero_()
        self.B.zero_()
        self.rank = 0

    def add_to(
        self, y: Tensor, x: Tensor, project_down: Product = F.linear, project_up: Product = F.linear, *more: Tensor
    ) -> Tensor:
        """Adds the links' outputs for the inputs ``x`` to the layer's outputs ``y``, in place.

        Args:
            y: ... x out.
            x: ... x in.
            project_down: how the layer multiplies its inputs by A; in a linear layer, along the last dimension.
            project_up: how it multiplies the result by B.
            *more: what both need besides, such as which rows are which expert's.
        """
        A, B = self.A, self.B
        if not torch.compiler.is_compiling():  # compiled, with the zeros behind it: their shape changes more rarely
            A, B = A[..., : self.rank, :], B[..., : self.rank, :]
        is_autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if A.dtype != y.dtype and not is_autocast:  # the weight is cast for its product alone
            A, B = A.to(y.dtype), B.to(y.dtype)
        if A.shape[-2]:  # nested tensors support no other product than linear
            y += project_up(project_down(x, A, *more), B.mT, *more)
        return y

    def apply_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves and casts the factors, as ``nn.Module.to`` does parameters."""
        self.A, self.B = fn(self.A), fn(self.B)


def _size(factor: Tensor) -> Tensor:
    """The largest absolute value, or 1 where all are zero."""
    largest = factor.abs().amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))
