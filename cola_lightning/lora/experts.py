r"""Mixtures of experts with a link for each projection: :math:`y = W_e x + b_e + \frac{\alpha}{r} B_e A_e x` for expert e.

transformers stores the weights of a layer's experts as two 3-D parameters, ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.
While such a projection has a link, a small module with the parameter as its ``weight`` takes the parameter's place, under its
name: a layer like any other. The experts then compute with :func:`experts_forward`, whatever implementation the model's
configuration names, so a change of it removes no link. Tokens are sorted by expert and multiplied in groups; W + B A is never
built in a forward pass.

Source: ``transformers.integrations.moe`` (5.24): the attributes of experts classes, and their forward.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from cola_lightning.lora.layer import LoRALayer

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
RANK_MULTIPLE = 8  # of padded factors: grouped products need rows of a multiple of 16 bytes


class ExpertsProjection(nn.Module):
    """One projection of all experts of a layer, without their biases.

    Args:
        weight: experts x out x in, or, if transposed, experts x in x out.
        weight_is_transposed: which of the two.
    """

    bias: Any = None

    def __init__(self, weight: Tensor, *, weight_is_transposed: bool) -> None:
        super().__init__()
        self.weight: Tensor = weight
        self.weight_is_transposed = weight_is_transposed

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The expert's product for each row.

        Shape:
            ``x``: rows x in, sorted by expert; ``offsets``: experts, the end of each one's rows; result: rows x out.
        """
        return grouped_mm(x, self.weight if self.weight_is_transposed else self.weight.mT, offsets)


class LoRAExpertsProjection(LoRALayer, ExpertsProjection):
    """A projection of experts with a link: A and B are those of each expert.

    Example:
        >>> from cola_lightning import LoRAConfig
        >>> plain = ExpertsProjection(nn.Parameter(torch.ones(6, 3, 4)), weight_is_transposed=False)
        >>> layer = LoRAExpertsProjection.adapt_(plain, LoRAConfig(rank=2, alpha=4))
        >>> layer.lora_A.shape, layer.lora_B.shape, layer.delta_weight().shape
        (torch.Size([6, 2, 4]), torch.Size([6, 3, 2]), torch.Size([6, 3, 4]))
    """

    @classmethod
    @override
    def matrix_sizes(cls, layer: Any) -> tuple[int, int]:
        _, n_out, n_in = (layer.weight.mT if layer.weight_is_transposed else layer.weight).shape
        return n_in, n_out

    @classmethod
    @override
    def batch_shape(cls, layer: Any) -> tuple[int, ...]:
        return (len(layer.weight),)

    @override
    def project_down(self, x: Tensor, lora_A: Tensor, *offsets: Tensor) -> Tensor:
        return grouped_mm(x, F.pad(lora_A, (0, 0, 0, -lora_A.shape[-2] % RANK_MULTIPLE)).mT, *offsets)

    @override
    def project_up(self, hidden: Tensor, lora_B: Tensor, *offsets: Tensor) -> Tensor:
        return grouped_mm(hidden, F.pad(lora_B, (0, -lora_B.shape[-1] % RANK_MULTIPLE)).mT, *offsets)


def grouped_mm(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """The product of each group of rows with its own matrix: one kernel, or a loop where there is none.

    Shape:
        ``x``: rows x in; ``weights``: groups x in x out; ``offsets``: groups, in int32, the end of each group's rows;
        result: rows x out.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):  # which does not cover this product
        dtype = torch.get_autocast_dtype(device)
        x, weights = x.to(dtype), weights.to(dtype)
    return F.grouped_mm(x, weights, offs=offsets) if _has_kernel(x, weights) else _grouped_mm_loop(x, weights, offsets)


def _has_kernel(x: Tensor, weights: Tensor) -> bool:
    """Whether torch has a kernel for this product: from 2.10 on, for rows of a multiple of 16 bytes, at aligned places."""
    is_built = x.device.type == "cpu" or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0))
    if not hasattr(F, "grouped_mm") or not is_built or any(n * x.dtype.itemsize % 16 for n in weights.shape[1:]):
        return False
    if torch.compiler.is_compiling():  # inductor has it for no other dtype
        return x.dtype == torch.bfloat16
    return x.dtype.itemsize <= 4 and not (x.data_ptr() % 16 or weights.data_ptr() % 16)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the sizes of groups are data
def _grouped_mm_loop(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    groups = torch.split(x, offsets.diff(prepend=offsets.new_zeros(1)).tolist())
    return torch.cat([rows @ weight for rows, weight in zip(groups, weights.unbind(), strict=True)])


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an experts module, some of whose projections are layers.

    Args:
        experts: a module of a class with transformers' ``use_experts_implementation``.
        hidden_states: the tokens.
        top_k_index: the experts of each.
        top_k_weights: their routing weights.

    Shape:
        ``hidden_states``: tokens x in; ``top_k_index`` and ``top_k_weights``: tokens x k; result: tokens x in.
    """
    tokens, k = top_k_index.shape
    indices, order = top_k_index.flatten().sort(stable=True)
    offsets = torch.searchsorted(indices, torch.arange(experts.num_experts, device=indices.device), right=True).int()

    def project(name: str, x: Tensor) -> Tensor:
        projection, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
        if isinstance(projection, Tensor):
            projection = ExpertsProjection(projection, weight_is_transposed=experts.is_transposed)
        y: Tensor = projection(x, offsets)
        return y if bias is None else y + bias[indices]

    x = hidden_states[order // k]
    x = experts._apply_gate(project("gate_up_proj", x)) if experts.has_gate else experts.act_fn(project("up_proj", x))
    y = project("down_proj", x)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = (y * top_k_weights.flatten()[order, None])[order.argsort()]
    return y.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


# ---------------------------------------------------------------------- the experts of a model


def expose_experts(model: nn.Module) -> None:
    """Makes the projections of a model's experts layers: modules, with the same parameters."""
    found: list[Any] = [module for module in model.modules() if is_experts(module)]
    for experts in found:
        for name in PROJECTIONS:
            if isinstance(weight := getattr(experts, name, None), nn.Parameter):
                delattr(experts, name)
                experts.add_module(name, ExpertsProjection(weight, weight_is_transposed=experts.is_transposed))
        experts.forward = functools.partial(experts_forward, experts)


def hide_experts(model: nn.Module) -> None:
    """Makes the projections without a link parameters of their experts again: the same objects."""
    for experts in model.modules():
        parts = experts.named_children() if "forward" in vars(experts) else ()
        projections = {name: part for name, part in parts if isinstance(part, ExpertsProjection)}
        for name, projection in projections.items():
            if not isinstance(projection, LoRALayer):
                delattr(experts, name)
                setattr(experts, name, projection.weight)
        if projections and not any(isinstance(projection, LoRALayer) for projection in projections.values()):
            del experts.forward


def is_experts(module: Any) -> bool:
    """Whether a module is of a class with ``use_experts_implementation``, not split over processes, and not in 8 bits."""
    is_whole = getattr(module, "_is_expert_parallel", None) is False  # no public attribute says so
    return is_whole and "forward" not in vars(module) and module.down_proj.dtype.itemsize > 1
