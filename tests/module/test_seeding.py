"""What is drawn while training follows from seeds, and the global generators go on as if nothing had been drawn."""

import contextlib
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from cola_lightning import UserError
from tests.helpers.resuming import Data
from tests.helpers.toy import Toy, batches, toy, trainer


def draws():
    """One draw from each of the global generators."""
    return random.random(), np.random.rand(), torch.rand(1).item()


class Noisy(Toy):
    """Writes down its inputs, and draws from all three generators in training, and once more in validation."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.rows, self.noise, self.validated = [], [], []

    def on_train_batch_start(self, batch, batch_idx):
        self.rows.append(batch[0].numpy().tobytes())

    def training_step(self, batch, batch_idx):
        self.noise.append(sum(draws()))
        return super().training_step(batch, batch_idx) * (1 + self.noise[-1])

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[0].sum().item() + sum(draws()))
        self.log("val_loss", self.validated[-1])


def test_seed_everything_decides_the_shuffle_of_every_epoch(tmp_path):
    orders = []
    for seed in (1, 2, 1):
        seed_everything(seed, verbose=False)
        module = toy(Noisy)
        loader = DataLoader(batches(6).dataset, batch_size=4, shuffle=True)
        trainer(tmp_path, chain={}, max_epochs=3, limit_val_batches=0).fit(module, loader, loader)
        orders.append([module.rows[6 * epoch : 6 * epoch + 6] for epoch in range(3)])
    first, other, again = orders
    assert first == again
    assert [mine != theirs for mine, theirs in zip(first, other, strict=True)] == [True] * 3
    assert first[0] != first[1]


def test_draws_of_a_batch_depend_on_the_process_and_not_on_what_was_drawn_before(tmp_path, monkeypatch):
    def noise(seed, rank):
        seed_everything(seed, verbose=False)
        monkeypatch.setattr(Trainer, "global_rank", rank)
        module = toy(Noisy)
        trainer(tmp_path, chain={}, max_epochs=2).fit(module, batches(), batches(2))
        return module.noise, module.validated[2:]  # those after the sanity check

    first = noise(1, 0)
    assert noise(2, 0) == first
    assert len({*first[0], *noise(1, 1)[0]}) == 40


class Drawn(Data):
    """Its batches are what is drawn as they are put together, as augmentation is."""

    def collate(self, rows):
        return draws()


def test_each_batch_of_rows_has_draws_of_its_own():
    (data := Drawn(batch_size=4)).setup("fit")
    first, again = ([tuple(batch) for batch in data.train_dataloader()] for _ in range(2))
    assert first == again  # of one epoch
    assert len({*first}) == len(first) > 1


class Square(Toy):
    def build_model(self):
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def test_A_is_a_function_of_the_seed_the_link_and_the_layers_name():
    def drawn(layer, *layers, seed=0, knots=0):
        module = toy(Square, target_modules=[layer, *layers], seed=seed)
        module.configure_model()
        for _ in range(knots):
            module.tie_knot()
        return tuple(module.model[int(layer)].lora_A.flatten().tolist())

    different = {drawn("2"), drawn("0"), drawn("2", seed=1), drawn("2", knots=1)}
    assert len(different) == 4
    assert drawn("2", "0") == drawn("2")


class Unlucky(Noisy):
    def training_step(self, batch, batch_idx):
        draws()
        raise RuntimeError("in the middle of a batch")


@pytest.mark.parametrize("cls", [Noisy, Unlucky])
def test_a_fit_leaves_the_global_generators_as_they_were(tmp_path, cls):
    seed_everything(5, verbose=False)
    expected = draws()
    seed_everything(5, verbose=False)
    loaders = [DataLoader(batches(n).dataset, batch_size=4, generator=torch.Generator()) for n in (10, 2)]  # which draw nothing
    with pytest.raises(RuntimeError, match="in the middle") if cls is Unlucky else contextlib.nullcontext():
        trainer(tmp_path, chain={}, max_epochs=1).fit(toy(cls), *loaders)
    assert draws() == expected


def test_a_base_that_cannot_be_made_again_is_refused_when_it_is_needed_again(tmp_path):
    class Unseeded(Toy):
        def build_model(self):
            self.made = vars(self).get("made", 0) + 1
            model = super().build_model()
            nn.init.constant_(model[2].bias, self.made)  # as from a file that has changed since
            return model

    module = toy(Unseeded, target_modules=["0"])
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(module, batches())
    with pytest.raises(UserError, match=r"^base: .*'2\.bias'"):
        module.merged_model(1)
