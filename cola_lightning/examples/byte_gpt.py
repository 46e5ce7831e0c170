"""A small GPT whose tokens are bytes, in plain torch."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

N_BYTES = 256


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each after a layer norm and with a residual connection.

    Args:
        width: width of the residual stream.
        heads: number of attention heads; a divisor of ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width) -> (batch, length, width)
        x = x + self.proj(self._attend(self.qkv(self.attention_norm(x))))
        out: Tensor = x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        return out

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, length, _ = qkv.shape
        # 3 x (batch, heads, length, width / heads)
        query, key, value = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, -1)


class ByteGPT(nn.Module):
    """A decoder with learned positions, pre-norm blocks and an untied head.

    Args:
        depth: number of blocks.
        width: width of the residual stream.
        heads: number of attention heads.
        context: context length, in bytes.

    Shape:
        bytes (batch, length) of at most ``context`` -> logits (batch, length, 256).

    Example:
        >>> ByteGPT(depth=1, width=16, heads=2, context=8)(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 256])

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019: layout and initialisation.
    """

    def __init__(self, depth: int = 4, width: int = 128, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(N_BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, N_BYTES, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                is_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if is_residual else 0.02)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean cross-entropy of each window's bytes from the second on, in nats.

    Args:
        model: computes logits of the next byte.
        windows: bytes (batch, length + 1).
    """
    windows = windows.long()
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
