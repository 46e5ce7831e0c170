r"""A layer plus its current link: :math:`y = W x + b + \frac{\alpha}{r} B A x`.

``LoRALayer`` is a mixin in front of the layer that it adapts: a :class:`~cola_lightning.lora.layer_types.LoRALinear` *is* the
original ``nn.Linear``, the same object with another class, and so with the same parameters, buffers, hooks and attributes. It
gets two more parameters, ``lora_A`` and ``lora_B``. They are allocated once at the largest rank of the chain; a link of rank r
uses the slices ``lora_A[..., :r, :]`` and ``lora_B[..., :r]``, so a change of rank makes no new parameters and every wrapper
around the model (DDP, ``torch.compile``) stays valid.

A and B are matrices for every layer type, or, of experts, a matrix for each, stacked. A layer type defines the size of its
weight as a matrix (``matrix_sizes``), how its inputs are multiplied by A and B (``project_down``, ``project_up``), and how B A
is laid out as its weight (``update``).

Finished links are merged into the weight, which is then stored in float32, or, for half-precision and quantised bases, they are
stored next to it in a :class:`~cola_lightning.lora.stack.Stack`, and the weight is never modified.

Source: Hu et al., "LoRA" (arXiv 2106.09685), section 4.1; Xia et al., "Chain of LoRA" (arXiv 2401.04151), section 3.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.lora.config import DRAWS, LoRAConfig
from cola_lightning.lora.stack import Stack
from cola_lightning.seeding import derive_seed

LinkFactors = tuple[Tensor, Tensor, float]  # A, B and the scaling of a finished link

# The attributes that a LoRA layer adds to its base layer's.
LINK_ATTRIBUTES = (
    *("lora_A", "lora_B", "lora_dropout", "lora_config", "rank", "scaling", "stack"),
    *("base_class", "base_dtype", "source_dtype", "replacement"),
)


@torch.no_grad()
def low_rank_delta(lora_A: Tensor, lora_B: Tensor, scaling: float, *, is_transposed: bool = False) -> Tensor:
    """The update ``scaling * B A`` of one link, computed the same way at the knot and when a chain is replayed.

    Autocast and TF32 are off, and the factors are made contiguous first: the same factors give the same bits.

    Args:
        lora_A: the first factor.
        lora_B: the second factor.
        scaling: the layer's, alpha / rank.
        is_transposed: whether the result is in x out.

    Shape:
        ``lora_A``: rank x in; ``lora_B``: out x rank; result: out x in, or transposed, in x out.

    Example:
        >>> low_rank_delta(torch.ones(1, 3), torch.ones(2, 1), scaling=2.0)
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    with _full_float32(), torch.autocast(lora_A.device.type, enabled=False):
        rows, columns = (lora_A.mT, lora_B.mT) if is_transposed else (lora_B, lora_A)
        return (rows.contiguous() @ columns.contiguous()).mul_(scaling)


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
    """Base class of adapted layers. Comes before the base layer's class: ``class LoRALinear(LoRALayer, nn.Linear)``.

    By default, it fits layers that multiply the last dimension of their inputs by a weight of out x in (or, with
    ``weight_is_transposed``, in x out) and name these sizes ``out_features`` and ``in_features``. Another layer overrides
    ``matrix_sizes``, ``project_down``, ``project_up`` and ``update``; :func:`~cola_lightning.register_lora_layer` registers it.

    Attributes:
        lora_A: max_rank x in (of experts: experts x max_rank x in), the factor that is drawn at random. None, like lora_B, in a
            layer without a current link: only earlier links have it.
        lora_B: out x max_rank (experts x out x max_rank), the factor that starts at zero.
        rank: rank of the current link; the rows of A and columns of B beyond it are zero and unused.
        scaling: the factor in front of B A: ``alpha / rank``.
        lora_config: what the model's links are like.
        stack: the finished links, if they are not merged; else None.
        replacement: what replaces the current link and the stack while the layer is as it was at an earlier link; else None.
        base_class: the layer's class before it was adapted.
        base_dtype: the layer's compute dtype when it was adapted; a precision may have cast it since.
        source_dtype: the weight's original dtype; ``nf4`` or ``fp4`` for one in 4 bits.
    """

    weight: Tensor
    bias: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_dropout: nn.Module
    lora_config: LoRAConfig
    rank: int
    scaling: float
    stack: Stack | None
    replacement: Stack | None
    base_class: Any
    base_dtype: torch.dtype
    source_dtype: str

    weight_is_transposed = False  # True where the weight is in x out

    # ------------------------------------------------------------------ defined by a layer type

    @classmethod
    def matrix_sizes(cls, layer: Any) -> tuple[int, int]:
        """The inputs and outputs of a plain layer's weight as a matrix: columns of A and rows of B."""
        return layer.in_features, layer.out_features

    @classmethod
    def batch_shape(cls, layer: Any) -> tuple[int, ...]:
        """How many weights of these sizes a plain layer has, as the first sizes of A and B: one for each expert; () is one."""
        return ()

    @classmethod
    def why_unsupported(cls, layer: Any) -> str | None:
        """Why a plain layer of this type cannot be adapted ("which ..."); None if it can."""
        return None

    def project_down(self, x: Tensor, lora_A: Tensor, *more: Tensor) -> Tensor:
        """A x: the layer's inputs in the link's rank.

        Shape:
            ``x``: ... x in; ``lora_A``: rank x in; result: ... x rank.
        """
        return F.linear(x, lora_A)

    def project_up(self, hidden: Tensor, lora_B: Tensor, *more: Tensor) -> Tensor:
        """B (A x): what a link adds to the layer's outputs, without its scaling.

        Shape:
            ``hidden``: ... x rank; ``lora_B``: out x rank; result: ... x out.
        """
        return F.linear(hidden, lora_B)

    def update(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """``scaling * B A``, laid out as the weight is (out x in; Conv1D: in x out; Conv2d: out x in x height x width).

        Shape:
            ``lora_A``: rank x in; ``lora_B``: out x rank; result: as the weight.
        """
        return low_rank_delta(lora_A, lora_B, scaling, is_transposed=self.weight_is_transposed)

    # ------------------------------------------------------------------ from a plain layer, and back

    @classmethod
    def adapt_(cls, layer: Any, config: LoRAConfig, name: str = "", *, has_link: bool = True) -> Self:
        """Makes a plain layer a LoRA layer, in place: it stays the same object, with its parameters, buffers and hooks.

        Args:
            layer: the layer to adapt, of the base class.
            config: what its links are like.
            name: its name in the model, for the patterns of the config.
            has_link: whether it has a current link, and not only finished ones of an earlier training.
        """
        (n_in, n_out), batch_shape = cls.matrix_sizes(layer), cls.batch_shape(layer)
        layer.base_class, layer.__class__ = type(layer), cls
        adapted: Self = layer
        is_stacking, device = config.should_stack([layer.weight]), layer.weight.device
        dtype = adapted._prepare_weight(is_stacking=is_stacking)
        adapted.base_dtype, adapted.stack, adapted.replacement = dtype, None, None
        if is_stacking:
            adapted.begin_stack()
        # A and B are fp32 whatever the base is (float64 over a float64 base): an update is small against its weight.
        factor_dtype = torch.promote_types(dtype, torch.float32)
        adapted.rank, adapted.scaling = config.size_of(name, config.rank, config.alpha)
        adapted.lora_dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        adapted.lora_config = config
        if not has_link:
            adapted.register_parameter("lora_A", None)
            adapted.register_parameter("lora_B", None)
            return adapted
        adapted.lora_A = nn.Parameter(torch.zeros(*batch_shape, adapted.rank, n_in, dtype=factor_dtype, device=device))
        adapted.lora_B = nn.Parameter(torch.zeros(*batch_shape, n_out, adapted.rank, dtype=factor_dtype, device=device))
        adapted.reset()
        return adapted

    def begin_stack(self) -> None:
        """Has finished links stored next to the weight, into which none is merged yet."""
        (n_in, n_out), batch_shape = self.matrix_sizes(self), self.batch_shape(self)
        self.stack = Stack(n_in, n_out, self.base_dtype, self.weight.device, batch_shape)

    def strip_(self) -> nn.Module:
        """Makes this layer a plain one again, in place, without its link and its stack."""
        base_class = self.base_class
        for name in LINK_ATTRIBUTES:
            delattr(self, name)
        self.__class__ = base_class
        return self

    def _prepare_weight(self, *, is_stacking: bool) -> torch.dtype:
        """Prepares the weight for merging or stacking; returns the layer's compute dtype."""
        self.source_dtype = str(self.weight.dtype).removeprefix("torch.")
        if not is_stacking:
            self.cast_base_(torch.promote_types(self.weight.dtype, torch.float32))
        return self.weight.dtype

    def cast_base_(self, dtype: torch.dtype) -> None:
        """Casts weight and bias in place, not if they are complex or in 4 bits."""
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)  # as nn.Module.to does: the one way to keep the object

    @property
    def has_link(self) -> bool:
        """Whether the current link has this layer."""
        return self.lora_A is not None

    @property
    def max_rank(self) -> int:
        """The largest rank that a link of this layer can have."""
        return self.lora_A.shape[-2]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The current link's A (rank x in) and B (out x rank): the parameters, or views of them."""
        if self.rank == self.max_rank:  # a view of all is an operation, too
            return self.lora_A, self.lora_B
        return self.lora_A[..., : self.rank, :], self.lora_B[..., : self.rank]

    @property
    def is_narrowed(self) -> bool:
        """Whether a precision has rounded the base: half precision does if links are stacked, and so not merged into it."""
        return self.dtype != self.base_dtype and self.dtype.itemsize < 4

    @property
    def dtype(self) -> torch.dtype:
        """The layer's compute dtype without autocast: its weight's; in 4 bits, its stack's."""
        return self.weight.dtype if self.stack is None or self.weight.is_floating_point() else self.stack.A.dtype

    @override
    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The base layer's output plus the links', for one input x: by position, or by whatever name the base layer gives it.

        Shape:
            x: as the base layer's, for a linear one ... x in; result: as the base layer's, ... x out, in the dtype of x
            (under autocast, in autocast's; where x are indices, in the layer's).
        """
        x, *more = (*inputs, *named.values())
        is_autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        is_index = not (x.is_floating_point() or x.is_complex())  # for a lookup: no cast, no dropout
        dtype = self.dtype if is_index else x.dtype
        if not is_autocast:  # autocast does the same to each product
            x = x.to(self.dtype) if x.is_floating_point() else x
        if self.replacement is not None:
            y = self.replacement.add_to(self.base_forward(x, *more), x, self.project_down, self.project_up, *more)
            return y if is_autocast else y.to(dtype)
        if self.has_link:
            lora_A, lora_B = self.factors
            if not is_autocast:
                lora_A, lora_B = lora_A.to(self.dtype), lora_B.to(self.dtype)
            hidden = self.project_down(x if is_index else self.lora_dropout(x), lora_A, *more)
            hidden = hidden * self.scaling  # here, where it is smallest
            y = self.base_forward(x, *more) + self.project_up(hidden, lora_B, *more)
        else:
            y = self.base_forward(x, *more)
        if self.stack is not None:  # apart from the link, which is in float32: one product would copy all factors in each step
            y = self.stack.add_to(y, x, self.project_down, self.project_up, *more)
        return y if is_autocast else y.to(dtype)

    def full_weight(self) -> Tensor:
        """The frozen weight as the forward pass uses it, in its own layout."""
        return self.weight.detach()

    def base_forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """The layer's output without any link; ``x`` is in :attr:`dtype`, except under autocast."""
        y: Tensor = self.base_class.forward(self, x, *more)
        return y

    def delta_weight(self) -> Tensor:
        """The current link's update in the weight's own layout."""
        return self.update(*self.factors, self.scaling)

    def finish(self, share: float = 1.0) -> None:
        """Makes a share of the current link a finished one, and leaves the rest in B: the layer's function does not change."""
        self.add_finished_link(*self.factors, self.scaling * share)
        layout.copy_(self.lora_B, self.lora_B * (1 - share))

    def add_finished_link(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Merges or stacks a finished link: at a knot, and when a chain is replayed.

        Shape:
            ``lora_A``: rank x in; ``lora_B``: out x rank.
        """
        if self.stack is None:  # where the weight is sharded, each process adds its part of the same update
            layout.add_(self.weight, self.update(lora_A, lora_B, scaling))
        else:
            self.stack.push(lora_A, lora_B, scaling)

    def replacement_by(self, links: Sequence[LinkFactors], finished: Sequence[LinkFactors]) -> Stack:
        """What :attr:`replacement` must be for the layer to have only its first links.

        Args:
            links: the first links. The last of them may have another scaling here: it is whole, but its knot merged a share.
            finished: all finished links, as they are merged or stacked.
        """
        both = zip(links, finished, strict=False)
        n = sum(link[0] is now[0] and link[2] == now[2] for link, now in both)  # the first ones, which stay as they are
        if self.stack is not None:
            stack = self.stack.first(sum(lora_A.shape[-2] for lora_A, _, _ in finished[:n]))
        else:
            (n_in, n_out), batch_shape = self.matrix_sizes(self), self.batch_shape(self)
            device = self.lora_A.device if self.has_link else self.weight.device
            stack = Stack(n_in, n_out, self.dtype, device, batch_shape)
            for lora_A, lora_B, scaling in finished[n:]:  # the others are in the weight
                stack.push(lora_A, lora_B, -scaling)
        for link in links[n:]:
            stack.push(*link)
        return stack

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Begins a new link of the present rank in place: draws A, zeroes B, drops their gradients.

        A is drawn on the CPU in fp32 and then copied, so the same generator gives the same A on any device and in any dtype.

        Args:
            generator: for drawing A; None means torch's global generator.
        """
        *batch_shape, _, n_in = self.lora_A.shape
        rows = torch.zeros(*batch_shape, self.rank, n_in, dtype=torch.float32, device="cpu")
        DRAWS[self.lora_config.init](rows, generator)
        layout.copy_(self.lora_A, F.pad(rows, (0, 0, 0, self.max_rank - self.rank)))
        layout.copy_(self.lora_B, torch.zeros_like(self.lora_B))
        self.lora_A.grad = self.lora_B.grad = None

    @property
    def wide_parameters(self) -> list[Tensor]:
        """Those that no cast narrows below float32: A and B, a weight that links are merged into, and its bias."""
        merged_into = (self.weight, self.bias) if self.stack is None else ()
        return [parameter for parameter in (self.lora_A, self.lora_B, *merged_into) if parameter is not None]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as usual, but never narrows below fp32: A and B, a weight that links are merged into, and its bias.

        Rounding to half precision would lose most of a merged link (an update of 1e-3 of the weight's norm is 78 % lost in
        bf16), and a cast back after Lightning's own would come too late for values that were just loaded.
        """
        wide_ids = {id(tensor) for parameter in self.wide_parameters for tensor in (parameter, parameter.grad)}

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device) if is_narrowed and id(tensor) in wide_ids else moved

        result: Self = super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        if self.stack is not None:
            self.stack.apply_(fn)
        return result


# ---------------------------------------------------------------------- the layers of a model


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by name, in the model's order.

    Example:
        >>> from cola_lightning import inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = inject_lora(model, LoRAConfig("all-linear", rank=1))
        >>> list(lora_layers(model))
        ['0']
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    return dict(zip(layout.plain_names(layers), layers.values(), strict=True))


def names_of_factors(model: nn.Module) -> set[str]:
    """The names of the adapted layers' A and B: a parameter of the base may also end with these letters."""
    return {f"{name}.lora_{factor}" for name in lora_layers(model) for factor in "AB"}


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit layers, adapted or not."""
    return any((base.__module__, base.__name__) == ("bitsandbytes.nn.modules", "Linear4bit") for base in type(module).__mro__)


def is_quantized_model(model: nn.Module) -> bool:
    """Whether a model has 4-bit layers."""
    return any(is_quantized(module) for module in model.modules())


def initialize_link(layers: Mapping[str, LoRALayer], seed: int, index: int, rank: int, alpha: float) -> None:
    """Initialises a link in every layer: A drawn from (seed, link, layer name), B zero.

    The draw depends on nothing else: not on the global generator, the device, or the number of processes.
    """
    for name, layer in layers.items():
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, index, name))
        layer.rank, layer.scaling = layer.lora_config.size_of(name, rank, alpha)
        layer.reset(generator)
