"""What is drawn while training follows from seeds, and the global generators go on as if nothing had been drawn."""

import random
import traceback

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, Dataset, TensorDataset

from cola_lightning import EpochDataModule, LastCheckpoint, UserError
from cola_lightning.seeding import seeded
from tests.toy import Toy, assert_bit_equal, batches, toy, trainer, weights


class Watched(Toy):
    """Writes down the inputs of each batch."""

    def on_train_batch_start(self, batch, batch_idx):
        self.__dict__.setdefault("rows", []).append(batch[0].numpy().tobytes())


def shuffled(**options):
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, x[:, :6]), batch_size=4, shuffle=True, **options)


def test_seed_everything_decides_the_shuffle_of_every_epoch(tmp_path):
    orders = []
    for seed in (1, 2, 1):
        seed_everything(seed, verbose=False)
        module = toy(Watched)
        trainer(tmp_path, chain={}, max_epochs=3).fit(module, shuffled())
        orders.append([module.rows[6 * epoch : 6 * epoch + 6] for epoch in range(3)])
    first, other, again = orders
    assert first == again
    assert [mine != theirs for mine, theirs in zip(first, other, strict=True)] == [True] * 3


def quiet_batches(n=10):
    """Loaders that themselves draw nothing from the global generators."""
    return DataLoader(batches(n).dataset, batch_size=4, generator=torch.Generator())


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_fit_leaves_the_global_generators_as_they_were(tmp_path):
    def after(fits):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        for _ in range(fits):
            trainer(tmp_path, chain={}, max_epochs=1).fit(toy(Noisy), quiet_batches(), quiet_batches(2))
        return draws()

    assert after(0) == after(1) == after(2)


class Noisy(Toy):
    """Draws from all three generators in training, and once more in validation."""

    def training_step(self, batch, batch_idx):
        noise = sum(draws())
        self.__dict__.setdefault("noise", []).append(noise)
        return super().training_step(batch, batch_idx) * (1 + noise)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", sum(draws()))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is seeded, too")
def test_seeding_formats_no_call_stack_where_there_is_no_accelerator(monkeypatch):
    def stack():
        raise AssertionError("torch.manual_seed queues a call for a device that is not in use")

    torch.manual_seed(7)
    expected = torch.rand(3)
    with monkeypatch.context() as patch:
        patch.setattr(traceback, "format_stack", stack)
        with seeded(7):
            assert torch.equal(torch.rand(3), expected)


def test_draws_of_python_and_numpy_are_those_of_the_batch(tmp_path):
    noise = []
    for seed in (1, 2):  # of what was drawn before, not of the run
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        module = toy(Noisy)
        trainer(tmp_path, chain={}, max_epochs=2).fit(module, batches(), batches(2))
        noise.append(module.noise)
    assert noise[0] == noise[1]
    assert len(set(noise[0])) == 20


class Unlucky(Toy):
    def training_step(self, batch, batch_idx):
        draws()
        raise RuntimeError("in the middle of a batch")


@pytest.mark.parametrize("cls", [Noisy, Unlucky])
def test_an_exception_or_a_hook_that_ends_the_epoch_gives_the_generators_back(tmp_path, cls):
    class Cut(cls):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    run = trainer(tmp_path, chain={}, max_epochs=1)
    if cls is Unlucky:
        with pytest.raises(RuntimeError, match="in the middle"):
            run.fit(toy(Cut), quiet_batches())
    else:
        run.fit(toy(Cut), quiet_batches(), quiet_batches(2))
    assert draws() == expected


class Augmented(Dataset):
    """Rows with noise from all three generators, as augmentation draws it."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, place):
        return self.x[place] + sum(draws()), self.y[place]


class AugmentedData(EpochDataModule):
    """24 rows in 6 batches; collating them draws, too."""

    def setup(self, stage):
        x, y = (torch.randn(24, size, generator=torch.Generator().manual_seed(3)) for size in (8, 6))
        self.train = self.val = Augmented(x, y)

    def collate(self, rows):
        x, y = super().collate(rows)
        return x + draws()[2], y


def fit(folder, workers=0, ckpt_path=None, **options):
    module = toy(WatchedNoisy)
    data = AugmentedData(batch_size=4, num_workers=workers)
    run = trainer(folder, LastCheckpoint(), chain={"at_steps": [8]}, enable_checkpointing=True, max_epochs=3, **options)
    run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


class WatchedNoisy(Watched, Noisy):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.__dict__.setdefault("validated", []).append(batch[0].sum().item() + draws()[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentation_is_the_same_in_a_resumed_run(tmp_path, workers):
    whole = fit(tmp_path / "whole")
    assert len(set(whole.rows)) == 18
    fit(tmp_path, workers, max_steps=9)
    resumed = fit(tmp_path / "resumed", workers, tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.rows == whole.rows[9:]
    assert resumed.validated[-6:] == whole.validated[-6:]
    assert_bit_equal(weights(resumed), weights(whole))


def test_a_base_may_draw_from_any_generator(tmp_path):
    class Drawn(Toy):
        def build_model(self):
            model = super().build_model()
            with torch.no_grad():
                model[0].weight.add_(random.random()).mul_(float(np.random.rand()))
            return model

    made = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        module = toy(Drawn)
        module.configure_model()
        made.append(module.merged_model(0).state_dict())
    assert_bit_equal(*made)


def test_a_base_that_cannot_be_made_again_is_refused_when_it_is_needed_again(tmp_path):
    class Unseeded(Toy):
        made = 0

        def build_model(self):
            model = super().build_model()
            self.made += 1
            with torch.no_grad():
                model[2].bias.add_(self.made)  # as from a file that has changed since
            return model

    module = toy(Unseeded, target_modules=["0"])
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(module, batches())
    with pytest.raises(UserError, match=r"base: .*'2\.bias'.*save_base"):
        module.merged_model(1)
