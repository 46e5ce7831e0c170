"""A language model under domain shift: a small GPT that reads English learns to read Python.

It is what a user would write: a module with ``build_model`` and its steps, and a data module with ``setup``; above them the
network and its texts. The base is trained once on each machine, and then read from a cache.
"""

import hashlib
import logging
import math
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from cola_lightning.data import PromptDataModule
from cola_lightning.data.base import EpochDataModule
from cola_lightning.data.reading import load_splits
from cola_lightning.errors import UserError
from cola_lightning.module.module import COLAModule
from cola_lightning.module.optimization import lr_factor
from cola_lightning.seeding import seeded
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

RECIPE = 1  # version of pre-training: to be incremented with every change of this file that changes the weights
PRETRAIN_SEED, PRETRAIN_BATCH_SIZE, PRETRAIN_LR, PRETRAIN_WARMUP = 0, 32, 3e-3, 100
CACHE = "COLA_CACHE_DIR"  # the environment variable that names the folder for pre-trained bases
N_BYTES = 256
ENGLISH = {"SQuAD": "context", "DROP": "passage", "BoolQ": "passage"}
ENGLISH_BYTES = 4_000_000  # at most: the complete data sets on the hub have ten times as many


# ---------------------------------------------------------------------- the network


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


# ---------------------------------------------------------------------- the texts


def english_passages() -> Tensor:
    """The passages of SQuAD, DROP and BoolQ, each once, as one tensor of bytes.

    They are read from the sources of the tasks of the same names: ``$COLA_DATA_DIR``, else the Hugging Face hub.
    """
    passages: dict[str, None] = {}  # an ordered set
    for task, field in ENGLISH.items():
        data = PromptDataModule(task)
        splits = load_splits(str(data.source), data.subset, data.revision)
        for split in ("train", "validation"):
            passages |= dict.fromkeys(row.text(field) for row in splits[split]())
    return as_bytes("\n\n".join(passages).encode()[:ENGLISH_BYTES])


def python_sources() -> Tensor:
    """The modules of this Python's standard library, in the order of their names, as one tensor of bytes.

    Packages and modules generated for each machine are omitted.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_sysconfigdata"))
    return as_bytes(b"\n\n".join(path.read_bytes() for path in paths))


def as_bytes(text: bytes) -> Tensor:
    """The text as a tensor of type ``uint8``.

    Example:
        >>> as_bytes(b"def").tolist()
        [100, 101, 102]
    """
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


# ---------------------------------------------------------------------- the module and its data


class COLAByteGPT(COLAModule):
    """A GPT on bytes, pre-trained on English passages; logs the mean loss of the next byte, in nats.

    Args:
        depth: number of blocks.
        width: width of the residual stream.
        heads: number of attention heads.
        context: context length, in bytes.
        pretrain_steps: optimizer steps of pre-training, of 32 windows each: 13 minutes on a CPU core for 3,000.
        arguments: the arguments of :class:`~cola_lightning.COLAModule`.
    """

    def __init__(
        self,
        depth: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 128,
        pretrain_steps: int = 3000,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.sizes = {"depth": int(depth), "width": int(width), "heads": int(heads), "context": int(context)}
        self.pretrain_steps = int(pretrain_steps)

    @override
    def build_model(self) -> nn.Module:
        return pretrained(self.pretrain_steps, **self.sizes)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = next_byte_loss(self.model, batch)
        self.log("train_loss", loss, batch_size=len(batch), prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._evaluate(batch, "val_loss")

    @override
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._evaluate(batch, "test_loss")

    def _evaluate(self, batch: Tensor, name: str) -> None:
        self.log(name, next_byte_loss(self.model, batch), batch_size=len(batch), prog_bar=True, sync_dist=True)


class PythonSourceDataModule(EpochDataModule):
    """Python's standard library as non-overlapping windows of bytes.

    The first nine tenths of the bytes are for training. The windows of the last tenth alternate between validation and test,
    each of which uses ``eval_size`` evenly spaced ones.

    Args:
        context: bytes of a window, without the target of its last byte.
        eval_size: number of validation windows, and of test windows.
        arguments: the arguments of :class:`~cola_lightning.EpochDataModule`.
    """

    def __init__(self, context: int = 128, eval_size: int = 512, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.context, self.eval_size = context, eval_size

    @override
    def setup(self, stage: str) -> None:
        text = python_sources()
        cut = len(text) * 9 // 10
        self.train = windows(text[:cut], self.context)
        rest = windows(text[cut:], self.context)
        self.val, self.test = (self._evenly(part) for part in (rest[::2], rest[1::2]))

    def _evenly(self, part: Tensor) -> Tensor:
        if self.eval_size > len(part):
            raise UserError(f"data.eval_size: expected at most {len(part)} windows of this length, received {self.eval_size}")
        return part[torch.arange(self.eval_size) * len(part) // self.eval_size]


def windows(text: Tensor, context: int) -> Tensor:
    """Windows (n, context + 1) over a text; the last byte of each is the first of the next.

    Example:
        >>> windows(torch.arange(8), context=3).tolist()
        [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    return text.unfold(0, context + 1, context)


def pretrained(steps: int, **sizes: int) -> ByteGPT:
    """A :class:`ByteGPT` pre-trained on English passages: from the cache, or trained now.

    The file is in ``$COLA_CACHE_DIR``, else in ``cola_lightning`` in the user's cache folder; its name contains a digest of
    everything that determines the weights, except the machine.

    Args:
        steps: optimizer steps.
        sizes: the arguments of :class:`ByteGPT`.
    """
    text = english_passages()
    recipe = [RECIPE, steps, sorted(sizes.items()), PRETRAIN_SEED, PRETRAIN_BATCH_SIZE, PRETRAIN_LR, PRETRAIN_WARMUP]
    digest = hashlib.sha256(repr(recipe).encode() + text.numpy().tobytes()).hexdigest()[:16]
    path = _cache_folder() / f"byte-gpt-{digest}.safetensors"
    with seeded(PRETRAIN_SEED):
        model = ByteGPT(**sizes)
        if not path.exists():
            log.info("pre-training on %.1f MB of English, once: %s", len(text) / 1e6, path)
            _pretrain(model, windows(text, sizes["context"]), steps)
            if not path.exists():  # another process may have been first
                with atomic_file(path, is_shared=True) as partial:
                    save_file(model.state_dict(), partial)
    model.load_state_dict(load_file(path))
    return model


def _pretrain(model: nn.Module, rows: Tensor, steps: int) -> None:
    """Trains by AdamW with a cosine decay, on batches drawn from torch's global generator; 0 steps leave it as it is."""
    if steps == 0:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor("cosine", step + 1, steps + 1, min(PRETRAIN_WARMUP, steps)))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(math.ceil(steps * PRETRAIN_BATCH_SIZE / len(rows)))])
    with torch.enable_grad():
        for step in track(range(steps), "pre-training", transient=True):
            places = order[step * PRETRAIN_BATCH_SIZE : (step + 1) * PRETRAIN_BATCH_SIZE]
            loss = next_byte_loss(model, rows[places])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    optimizer.zero_grad()


def _cache_folder() -> Path:
    own = os.environ.get(CACHE)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(home) / "cola_lightning"
