r"""A layer plus its live link: :math:`y = W x + b + \frac{\alpha}{r} B A x`.

``LoRALayer`` is a mixin in front of the layer that it adapts: a :class:`LoRALinear` *is* the ``nn.Linear`` it replaces, with
the same weight and bias ``Parameter`` objects, and two more, ``lora_A`` and ``lora_B``. They are allocated once at the largest
rank of the chain; a link of rank r uses the slices ``lora_A[:r]`` and ``lora_B[:, :r]``, so a change of rank makes no new
parameters and every wrapper around the model (DDP, ``torch.compile``) stays valid.

Finished links are merged into the weight. A way to keep them beside it, for half-precision and quantised bases, belongs into
:meth:`LoRALayer.forward` and :meth:`LoRALayer.merge`: they are the two places that know where finished links are.

Source: Hu et al., "LoRA" (arXiv 2106.09685), section 4.1; Xia et al., "Chain of LoRA" (arXiv 2401.04151), section 3.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from cola_lightning import distributed

Init = Literal["kaiming", "gaussian"]


@torch.no_grad()
def low_rank_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The update ``scaling * B A`` of one link, computed the same way at the knot and when a chain is replayed.

    Neither autocast nor TF32 takes part, and the factors are made contiguous first: the same factors give the same bits.

    Shape:
        ``lora_A``: rank x in; ``lora_B``: out x rank; result: out x in.

    Example:
        >>> low_rank_delta(torch.ones(1, 3), torch.ones(2, 1), scaling=2.0)
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    with _full_float32(), torch.autocast(lora_A.device.type, enabled=False):
        return (lora_B.contiguous() @ lora_A.contiguous()).mul_(scaling)


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 or bf16 inside float32 products."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    befores = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, befores, strict=True):
            backend.fp32_precision = precision


class LoRALayer(nn.Module):
    """What every adapted layer has in common. Comes before the base layer's class: ``class LoRALinear(LoRALayer, nn.Linear)``.

    Attributes:
        lora_A: max_rank x in, the factor that is drawn at random.
        lora_B: out x max_rank, the factor that starts at zero.
        rank: rank of the live link; the rows of A and columns of B beyond it are zero and take no part.
        alpha: the update is scaled by ``alpha / rank``.
    """

    weight: Tensor
    bias: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    alpha: float

    weight_is_transposed = False  # True where the weight is in x out

    def _add_link(self, n_in: int, n_out: int, rank: int, alpha: float, dropout: float, init: Init) -> None:
        """Gives the layer its two factors; ``rank`` is the largest that a link of the chain will have."""
        # A and B are fp32 whatever the base is (float64 over a float64 base): an update is small against its weight.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(rank, n_in, dtype=dtype, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, dtype=dtype, device=self.weight.device))
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.init: Init = init
        self.rank, self.alpha = rank, alpha
        self.reset()

    @property
    def max_rank(self) -> int:
        """The largest rank that a link of this layer can have."""
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """The factor ``alpha / rank`` in front of B A."""
        return self.alpha / self.rank

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The live link's A (rank x in) and B (out x rank), as views of the parameters."""
        return self.lora_A[: self.rank], self.lora_B[:, : self.rank]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus the live link's.

        Shape:
            ``x``: ... x in; result: ... x out, in the dtype of ``x`` (under autocast, in autocast's).
        """
        dtype = x.dtype
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)  # a half-precision model around an fp32 layer
        lora_A, lora_B = self.factors
        hidden = F.linear(self.lora_dropout(x), lora_A) * self.scaling  # ... x rank: scaled where it is smallest
        y: Tensor = super().forward(x) + F.linear(hidden, lora_B)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(dtype)

    def delta_weight(self) -> Tensor:
        """The live link's update in the weight's own layout (out x in; Conv1D: in x out)."""
        delta = low_rank_delta(*self.factors, self.scaling)
        return delta.T if self.weight_is_transposed else delta

    def merge(self) -> None:
        """Adds the live link to the weight and sets B to zero: the layer's function stays what it was."""
        self.add_to_weight(*self.factors, self.scaling)
        with torch.no_grad():
            self.lora_B.zero_()

    def add_to_weight(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Adds ``scaling * B A`` to the weight, in place: what a knot does, and what replaying a chain does again."""
        delta = low_rank_delta(lora_A, lora_B, scaling)
        distributed.add_(self.weight, delta.T if self.weight_is_transposed else delta)

    def reset(self, generator: torch.Generator | None = None, *, rank: int | None = None, alpha: float | None = None) -> None:
        """Begins a new link in place: draws A, zeroes B, drops their gradients.

        A is drawn on the CPU in fp32 and then copied, so the same generator gives the same A on any device and in any dtype.

        Args:
            generator: where A is drawn from; None means torch's global generator.
            rank: the new link's rank, 1 to ``max_rank``; None keeps it.
            alpha: the new link's alpha; None keeps it.
        """
        self.rank = self.rank if rank is None else rank
        self.alpha = self.alpha if alpha is None else alpha
        full = torch.zeros(self.max_rank, self.lora_A.shape[1], dtype=torch.float32, device="cpu")
        if self.init == "gaussian":
            nn.init.normal_(full[: self.rank], std=1 / self.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(full[: self.rank], a=math.sqrt(5), generator=generator)
        distributed.copy_(self.lora_A, full)
        distributed.copy_(self.lora_B, torch.zeros_like(self.lora_B))
        self.lora_A.grad = self.lora_B.grad = None

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as ever, but never narrows this layer's parameters below fp32.

        Rounding to half precision would lose most of a merged link (an update of 1e-3 of the weight's norm is 78 % lost in
        bf16), and a cast back after Lightning's own would come too late for values that were just loaded.
        """

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device) if is_narrowed else moved

        result: Self = super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        return result

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


class LoRALinear(LoRALayer, nn.Linear):
    """``nn.Linear`` with a live link.

    Example:
        >>> linear = nn.Linear(4, 3)
        >>> layer = LoRALinear.from_linear(linear, rank=2, alpha=4)
        >>> layer.weight is linear.weight, layer.delta_weight().shape
        (True, torch.Size([3, 4]))
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, init: Init = "kaiming") -> Self:
        """Adapts a linear layer, keeping its weight and bias ``Parameter`` objects.

        Args:
            linear: the layer to adapt; it can be thrown away afterwards.
            rank: largest rank of a link, and the first link's.
            alpha: the update is scaled by ``alpha / rank``.
            dropout: probability of dropping an input of A while training.
            init: how A is drawn: ``kaiming`` (uniform, a = sqrt(5), PEFT's default) or ``gaussian`` (std 1 / rank).
        """
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        _take_over(layer, linear)
        layer._add_link(linear.in_features, linear.out_features, rank, alpha, dropout, init)
        return layer


def _take_over(layer: Any, base: Any) -> None:
    """Gives the layer, which was made on the meta device, the base's parameters and mode."""
    layer.weight, layer.bias = base.weight, base.bias
    layer.train(base.training)


@functools.cache
def _lora_conv1d() -> type[LoRALayer]:
    """``LoRAConv1D``, made when first asked for: its base class lives in transformers, which takes seconds to import."""
    from transformers.pytorch_utils import Conv1D

    class LoRAConv1D(LoRALayer, Conv1D):  # type: ignore[misc]  # both declare the weight
        """GPT-2's ``Conv1D`` (a linear layer whose weight is in x out) with a live link."""

        weight_is_transposed = True

        @classmethod
        def from_linear(cls, linear: Conv1D, rank: int, alpha: float, dropout: float = 0.0, init: Init = "kaiming") -> Self:
            """Adapts a Conv1D layer, as :meth:`LoRALinear.from_linear` does a linear one."""
            with torch.device("meta"):
                layer = cls(linear.nf, linear.nx)
            _take_over(layer, linear)
            layer._add_link(linear.nx, linear.nf, rank, alpha, dropout, init)
            return layer

    LoRAConv1D.__qualname__ = "LoRAConv1D"
    return LoRAConv1D


def is_adaptable(module: nn.Module) -> bool:
    """Whether there is a LoRA layer for exactly this type.

    A subclass may compute something else in its forward (torch's own attention never calls its output layer's), so it is not
    taken for its parent.
    """
    return type(module) is nn.Linear or _is_conv1d(module)


def adapt_layer(module: nn.Module, rank: int, alpha: float, dropout: float = 0.0, init: Init = "kaiming") -> LoRALayer:
    """The LoRA layer for an adaptable module, on the module's own parameters."""
    lora_class: Any = _lora_conv1d() if _is_conv1d(module) else LoRALinear
    layer: LoRALayer = lora_class.from_linear(module, rank, alpha, dropout, init)
    return layer


def plain_layer(layer: LoRALayer) -> nn.Module:
    """The layer without its link: the base layer's class around the same weight and bias ``Parameter`` objects."""
    plain: Any
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    else:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            plain = Conv1D(layer.nf, layer.nx)  # type: ignore[no-untyped-call]
    _take_over(plain, layer)
    module: nn.Module = plain
    return module


def _is_conv1d(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def __getattr__(name: str) -> Any:
    if name == "LoRAConv1D":
        return _lora_conv1d()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
