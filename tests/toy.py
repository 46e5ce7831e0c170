"""A small model, data and trainer that the tests share."""

import copy
import csv
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cola_lightning import ChainOfLoRA, COLAModule, LoRAConfig
from cola_lightning.lora import quantization
from cola_lightning.lora.inject import lora_class

# Of commands: a run of three links on the digits, and where its checkpoint is.
DIGITS = str(Path(__file__).parent.parent / "benchmarks" / "digits.yaml")
FAST = ["--trainer.max_epochs", "3", "--chain.every_n_epochs", "1", "--trainer.enable_progress_bar", "false"]
LAST = "runs/version_0/checkpoints/last.ckpt"


class Toy(COLAModule):
    """A regression with two layers; everything about it follows from the seed."""

    def build_model(self):
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self.model(x), y)
        self.log("train_loss", loss)
        return loss


class ValidatedToy(Toy):
    """The toy with a validation loss."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.mse_loss(self.model(x), y), batch_size=len(x))


def toy(cls=Toy, **arguments):
    return cls(**{"target_modules": "all-linear", "rank": 2, "alpha": 4, "seed": 0} | arguments)


def batches(n=10, batch_size=4, dtype=torch.float32):
    """A loader of n batches, in a fixed order."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(n * batch_size, size, generator=generator, dtype=dtype) for size in (8, 6))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(tmp_path, *callbacks, chain=None, **arguments):
    callbacks = [*callbacks, ChainOfLoRA(**chain)] if chain is not None else list(callbacks)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=tmp_path, callbacks=callbacks, **quiet | arguments)


def weights(module):
    """The module's parameters and buffers by name, as copies."""
    return {name: tensor.detach().clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def assert_bit_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def assert_near(mine, theirs, relative):
    """Close in norm, which for gradients, whose entries are of many sizes, says more than their entries."""
    assert torch.linalg.vector_norm(theirs) > 0
    assert torch.linalg.vector_norm(mine.double() - theirs.double()) <= relative * torch.linalg.vector_norm(theirs.double())


def difference(mine, theirs):
    """The largest, of the entries of two tensors."""
    return (mine - theirs).abs().max().item()


def quantized_linear(dtype=torch.float32, bias=True):
    """A linear layer in 4 bits, of a size that bitsandbytes can pack anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=bias, dtype=dtype))
    quantization.quantize(model, dtype)
    return model[0]


def with_trained_link(layer, seed=2):
    """The layer with a link that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.factors[1].copy_(torch.randn(layer.factors[1].shape, generator=generator) * 0.5)
    return layer


def adapt_layer(layer, rank, alpha, dropout=0.0, init="kaiming", finished_links="merge"):
    """A LoRA layer on the same parameters; the layer is not changed."""
    config = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, init=init, finished_links=finished_links)
    return lora_class(layer).adapt_(_shallow_copy(layer), config)


def _shallow_copy(module):
    """Another module on the same parameters, buffers and hooks."""
    twin = copy.copy(module)
    vars(twin).update({name: value.copy() for name, value in vars(twin).items() if isinstance(value, dict | set)})
    return twin


def read_csv(path):
    """The rows of a file with a header."""
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def wait_for(is_so, seconds=120):
    """Waits until something is so, which another process makes so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
