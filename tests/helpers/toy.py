"""A small model, data and trainer that the tests share."""

import copy
import csv
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cola_lightning import ChainOfLoRA, COLAModule, LoRAConfig, LoRALayer, lora_layers
from cola_lightning.lora import quantization
from cola_lightning.lora.inject import begin_merging, lora_class, restore_

# Of commands: a run of three links on the digits, and where its checkpoint is.
DIGITS = str(Path(__file__).parents[2] / "examples" / "digits.yaml")
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


def saved(module, folder):
    """The checkpoint of a module that no Trainer has fitted."""
    run = trainer(folder)
    run.strategy.connect(module)
    run.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


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


def strip_lora(model):
    """Merges the links of a model into its weights, in place, and makes its layers plain ones."""
    for layer in lora_layers(model).values():
        stack = layer.stack
        begin_merging(layer, torch.float32)
        if stack is not None:
            layer.add_finished_link(*(factor.float() for factor in stack.factors), 1.0)
        layer.finish()
        layer.strip_()
    restore_(model)


def with_trained_link(layer, seed=2):
    """The layer with a link that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.factors[1].copy_(torch.randn(layer.factors[1].shape, generator=generator) * 0.5)
    return layer


def with_trained_links(model, seed=0):
    """The model with such a link on each layer."""
    for k, layer in enumerate(lora_layers(model).values()):
        with_trained_link(layer, seed + k)
    return model


def adapt_layer(layer, rank, alpha, dropout=0.0, init="kaiming", finished_links="merge"):
    """A LoRA layer on the same parameters; the layer is not changed."""
    config = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, init=init, finished_links=finished_links)
    twin = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    return lora_class(layer).adapt_(twin, config)


def read_csv(path):
    """The rows of a file with a header."""
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def wait_for(is_so, seconds=120):
    """Waits until something is so, which another process makes so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Watch(Callback):
    """Runs a function at the start of each batch, after the knot if there is one."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(self.look(trainer, module))


class Grid(nn.Module):
    """A user's layer that is no kin of torch's: a weight of in x out, without a bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return x @ self.weight


class LoRAGrid(LoRALayer, Grid):
    weight_is_transposed, bias = True, None

    @classmethod
    def matrix_sizes(cls, layer):
        return tuple(layer.weight.shape)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, (3, 2)), nn.Flatten(1), nn.Linear(24, 5)
    )


def assert_same_chain(mine, theirs):
    """Everything of a chain that is of use: its updates, to the bit, and what is recorded of them."""
    assert mine.base == theirs.base
    assert len(mine) == len(theirs)
    for one, other in zip(mine.links, theirs.links, strict=True):
        facts = ("index", "rank", "alpha", "start_step", "end_step", "metrics")
        assert [getattr(one, name) for name in facts] == [getattr(other, name) for name in facts]
        assert one.is_same_update(other)
        assert one.extras.keys() == other.extras.keys()
        assert all(torch.equal(value, other.extras[name]) for name, value in one.extras.items())
