"""Attention that reads the weights of its projections without calling a layer, so that no link of a layer would reach it.

``nn.MultiheadAttention`` has its input projections as parameters: ``in_proj_weight``, or, where keys or values are of other
sizes, ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``. While a projection has a link, layers with the same
parameters take their places (``in_proj``, or ``q_proj``, ``k_proj`` and ``v_proj``), and the module computes with
:func:`attention_forward`, which calls them and ``out_proj``. W + B A is never built, so links are as exact, in half precision
and with dropout too, as those of any linear layer. torch's fused kernels for evaluation, which read weights, are not used.

torchvision's attention in shifted windows has linear layers, whose weights it passes to a function: :func:`swin_forward`.

Source: ``torch.nn.MultiheadAttention`` and ``torch.nn.functional.multi_head_attention_forward`` (torch 2.13).
"""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from cola_lightning.lora.layer import LoRALayer

ALL = slice(None)

# Attributes of torch's encoders that let them evaluate with kernels that read the weights of their parts.
FUSED = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


class InputProjection(nn.Linear):
    """A projection of queries, keys or values, or of all three: a linear layer around parameters that are there already."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    @override
    def forward(self, x: Tensor, rows: slice = ALL) -> Tensor:
        """The outputs that these rows of the weight give.

        Shape:
            ``x``: ... x in; result: ... x rows.
        """
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])


class LoRAInputProjection(LoRALayer, InputProjection):  # type: ignore[misc]  # its forward pass takes rows by position
    """An input projection with a link.

    Example:
        >>> from cola_lightning import LoRAConfig
        >>> plain = InputProjection(nn.Parameter(torch.ones(12, 4)), None)
        >>> layer = LoRAInputProjection.adapt_(plain, LoRAConfig(rank=2, alpha=4))
        >>> layer.lora_A.shape, layer.lora_B.shape, layer(torch.ones(3, 4), slice(4, 8)).shape
        (torch.Size([2, 4]), torch.Size([12, 2]), torch.Size([3, 4]))
    """

    @override
    def project_up(self, hidden: Tensor, lora_B: Tensor, *rows: Any) -> Tensor:
        return F.linear(hidden, lora_B[rows])


# ---------------------------------------------------------------------- nn.MultiheadAttention


def attention_forward(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward pass of ``nn.MultiheadAttention``, whose arguments and results these are, with its projections called."""
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask must be given with is_causal, which only says that the mask is a causal one")
    is_batched, n_heads = query.dim() == 3, attention.num_heads
    q, k, v = _project(attention, query, key, value)
    if not is_batched:
        q, k, v = q[None], k[None], v[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not attention.batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    q, k, v = (x.view(*x.shape[:2], n_heads, -1).transpose(1, 2) for x in (q, k, v))
    is_causal = is_causal and key_padding_mask is None and not need_weights  # else the mask itself is needed
    mask = None if is_causal else _mask(attn_mask, key_padding_mask, q)
    dropout, weights = attention.dropout if attention.training else 0.0, None
    if need_weights:
        scores = q * attention.head_dim**-0.5 @ k.mT
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        y = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    y = attention.out_proj(y.transpose(1, 2).flatten(2))
    if not is_batched:
        return y[0], None if weights is None else weights[0]
    return y if attention.batch_first else y.transpose(0, 1), weights


def _project(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, in the layout of the inputs."""
    if hasattr(attention, "in_proj"):
        if query is key and key is value:
            q, k, v = attention.in_proj(query).chunk(3, -1)
        else:
            n = attention.embed_dim
            q, k, v = (attention.in_proj(x, slice(i * n, (i + 1) * n)) for i, x in enumerate((query, key, value)))
        return q, k, v
    q, k, v = attention.q_proj(query), attention.k_proj(key), attention.v_proj(value)
    if attention.in_proj_bias is not None:
        q, k, v = (x + bias.to(x.dtype) for x, bias in zip((q, k, v), attention.in_proj_bias.chunk(3), strict=True))
    return q, k, v


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The sum of both masks, which is added to scores of batch x heads x queries x keys."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(*q.shape[:2], *attn_mask.shape[1:])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    masks = []
    for mask in (attn_mask, key_padding_mask):
        if mask is not None and not mask.is_floating_point():
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
        if mask is not None:
            masks.append(mask.to(q.dtype))
    return functools.reduce(torch.add, masks) if masks else None


# ---------------------------------------------------------------------- attention in shifted windows


class _Calls(TorchFunctionMode):
    """Where a layer's weight would be multiplied with inputs, has the layer called."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.layers = layers

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for layer in self.layers if func is F.linear else ():
            if args[1] is layer.weight:
                x, _, bias = args  # version 2 uses no bias of keys
                return layer(x) if bias is layer.bias else layer(x) + (bias - layer.bias)
        return func(*args, **kwargs or {})


def swin_forward(attention: Any, x: Tensor) -> Tensor:
    """The forward pass of torchvision's attention in shifted windows, with its layers called."""
    with _Calls(attention.qkv, attention.proj):
        y: Tensor = type(attention).forward(attention, x)
    return y


# ---------------------------------------------------------------------- the attention of a model


def expose_projections(model: nn.Module) -> None:
    """Has a model's attention call layers for its projections, with the same parameters."""
    found: list[Any] = [module for module in model.modules() if "forward" not in vars(module)]
    for attention in found:
        if is_windows(attention):
            attention.forward = functools.partial(swin_forward, attention)
        elif _is_closed(attention):
            for name in input_projections(attention):
                bias = attention.in_proj_bias if name == "in_proj" else None
                attention.add_module(name, InputProjection(getattr(attention, f"{name}_weight"), bias))
                setattr(attention, f"{name}_weight", None)  # keeps the parameter's place
                if name == "in_proj":
                    attention.in_proj_bias = None
            attention.out_proj.__class__ = nn.Linear
            attention.forward = functools.partial(attention_forward, attention)


def hide_projections(model: nn.Module) -> None:
    """Makes attention whose projections have no links plain again, with the same parameters, and encoders without any."""
    found: list[Any] = [module for module in model.modules() if is_open(module)]
    for attention in found:
        if any(isinstance(part, LoRALayer) for part in attention.children()):
            continue
        if isinstance(attention, nn.MultiheadAttention):
            for name in input_projections(attention):
                projection = getattr(attention, name)
                delattr(attention, name)
                setattr(attention, f"{name}_weight", projection.weight)
                if name == "in_proj":
                    attention.in_proj_bias = projection.bias
            attention.out_proj.__class__ = NonDynamicallyQuantizableLinear
        del attention.forward
    _set_fused(model)


def input_projections(attention: Any) -> tuple[str, ...]:
    """The names of its input projections, as layers."""
    is_packed = attention.kdim == attention.vdim == attention.embed_dim
    return ("in_proj",) if is_packed else ("q_proj", "k_proj", "v_proj")


def is_open(module: nn.Module) -> bool:
    """Whether a module is attention that calls its projections."""
    return getattr(vars(module).get("forward"), "func", None) in (attention_forward, swin_forward)


def reads_weights(module: nn.Module) -> bool:
    """Whether a plain module of torch or torchvision reads the weights of its layers, and may call none of them."""
    return isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer) or is_windows(module)


def is_windows(module: nn.Module) -> bool:
    """Whether a module is torchvision's attention in shifted windows."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}".removesuffix("V2")
    return kind == "torchvision.models.swin_transformer.ShiftedWindowAttention"


def _is_closed(module: nn.Module) -> bool:
    """Whether a module computes as ``nn.MultiheadAttention`` does, with its weights as parameters and no keys of its own."""
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    weights = [getattr(module, f"{name}_weight") for name in input_projections(module)]
    is_whole = all(isinstance(weight, nn.Parameter) for weight in weights)
    has_own_keys = module.bias_k is not None or module.add_zero_attn
    return is_whole and not has_own_keys and type(module.out_proj) is NonDynamicallyQuantizableLinear


def _set_fused(model: nn.Module) -> None:
    """Turns the fused evaluation of torch's encoders off while a layer that it would read has a link, and on again."""
    for module, (kind, name) in itertools.product(model.modules(), FUSED.items()):
        if isinstance(module, kind):
            layers = LoRALayer if kind is nn.TransformerEncoderLayer else ()  # an encoder reads attention alone
            if any(is_open(part) or isinstance(part, layers) for part in module.modules()):
                vars(module).setdefault("value_before_links", getattr(module, name))
                setattr(module, name, 0)
            elif "value_before_links" in vars(module):
                setattr(module, name, vars(module).pop("value_before_links"))
