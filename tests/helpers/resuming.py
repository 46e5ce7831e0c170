"""Fits that stop at one moment and resume, with a module and data in which a wrong resume shows; two runs are compared."""

import re

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from cola_lightning import EpochDataModule, LastCheckpoint
from tests.helpers.toy import ValidatedToy, toy, trainer


class Data(EpochDataModule):
    """32 rows in 8 batches, shuffled, and 3 batches of validation."""

    def setup(self, stage):
        generator = torch.Generator().manual_seed(3)
        x, y = (torch.randn(44, size, generator=generator) for size in (8, 6))
        self.train, self.val = TensorDataset(x[:32], y[:32]), TensorDataset(x[32:], y[32:])
        self.test = self.val


class Normed(ValidatedToy):
    """The toy with dropout, a head that is trained whole, and running statistics that move in training."""

    def build_model(self):
        return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 6))


class Outside(Normed):
    """With a layer outside of the model, which is trained, too."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        torch.manual_seed(0)
        self.outside = nn.Linear(6, 6)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.outside(self.model(batch[0])), batch[1])


class Stopped(Exception):
    pass


class Recorder(Callback):
    """Writes down what happens, and stops the run at one moment of it: a hook's name, and how often it was called before."""

    def __init__(self, stop=None):
        self.stop, self.counts = stop, {}
        self.losses, self.validations, self.rows, self.rates, self.steps = {}, {}, {}, {}, {}

    def _count(self, hook):
        count = self.counts[hook] = self.counts.get(hook, -1) + 1
        if self.stop == (hook, count):
            raise Stopped

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        place = trainer.current_epoch, batch_idx
        self.rows[place] = batch[0].float().numpy().tobytes()
        self.rates[place] = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.steps[place] = trainer.global_step
        self._count("batch_start")

    def on_before_backward(self, *_):
        self._count("forward")

    def on_after_backward(self, *_):
        self._count("backward")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses[trainer.current_epoch, batch_idx] = outputs["loss"].item()
        self._count("batch_end")

    def on_validation_batch_end(self, trainer, *_):
        self._count("validation")

    def on_validation_end(self, trainer, module):
        self.validations[trainer.fit_loop.total_batch_idx] = trainer.callback_metrics["val_loss"].item()
        self._count("validation_end")

    def on_train_epoch_start(self, *_):
        self._count("epoch_start")

    def on_train_epoch_end(self, *_):
        self._count("epoch_end")

    @property
    def all(self):
        return self.losses, self.validations, self.rows, self.rates


# Those of a fit, except for those after its last step, where nothing is left to be done.
OTHERS = "exception|checkpoint|test|predict|sanity|train_end|fit_end"
HOOKS = [name for name in vars(Callback) if name.startswith("on_") and not re.search(OTHERS, name)]


def _stopping(name):
    def hook(self, *args, **options):
        getattr(Recorder, name)(self, *args, **options)
        self._count(name)

    return hook


# Stops in any hook, by the hook's whole name.
Everywhere = type("Everywhere", (Recorder,), {name: _stopping(name) for name in HOOKS})

ARGUMENTS = {"target_modules": ["0"], "modules_to_save": ["3"], "rank": 3, "dropout": 0.2, "lr_schedule": "cosine"}


def make(cls=Normed, lr=1e-2, weight_decay=1e-2, **arguments):
    return toy(cls, **ARGUMENTS | arguments, optimizer=lambda p: AdamW(p, lr=lr, weight_decay=weight_decay))


def fit(folder, stop=None, ckpt_path=None, module=None, data=None, callbacks=(), chain=None, kind=Recorder, **options):
    """A fit of three epochs with a knot in the middle of the second; gives its module, recorder and trainer."""
    module, recorder = module or make(), kind(stop)
    options = {"max_epochs": 3, "accumulate_grad_batches": 3, "val_check_interval": 0.5, "num_sanity_val_steps": 0} | options
    callbacks, chain = [recorder, LastCheckpoint(), *callbacks], chain or {"at_steps": [4], "ranks": [3, 2]}
    run = trainer(folder, *callbacks, chain=chain, enable_checkpointing=True, **options)
    try:
        run.fit(module, datamodule=data or Data(batch_size=4), ckpt_path=ckpt_path)
    except Stopped:
        assert stop
    else:
        assert not stop or recorder.counts.get(stop[0], -1) < stop[1]  # a run that was resumed may not get there again
    return module, recorder, run


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def first_difference(mine, theirs, name):
    """Where two trees of plain values and tensors first differ, in words; None where they are the same to the bit."""
    if type(mine) is not type(theirs):
        return f"{name}: {type(mine).__name__} instead of {type(theirs).__name__}"
    if isinstance(mine, torch.Tensor):
        is_same = mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(bits(mine), bits(theirs))
        return None if is_same else f"{name}: another tensor"
    if isinstance(mine, list | tuple):
        mine, theirs = dict(enumerate(mine)), dict(enumerate(theirs))
    if not isinstance(mine, dict):
        return None if mine == theirs else f"{name}: {mine!r} instead of {theirs!r}"
    found = (first_difference(mine[key], theirs[key], f"{name}.{key}") for key in mine.keys() & theirs.keys())
    alone = sorted(mine.keys() ^ theirs.keys(), key=str)
    return next((text for text in found if text), f"{name}: {alone[0]!r} in one of the two alone" if alone else None)


def bits(tensor):
    """A tensor's bytes: -0.0 is not 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
