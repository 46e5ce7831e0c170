"""Before its first step a fit says what it will do: what is trained, when knots fall, and whether a resume is exact."""

import dataclasses
import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from cola_lightning import UserError
from cola_lightning.module.optimization import LinkConfig
from tests.helpers.resuming import Data
from tests.helpers.toy import Toy, batches, toy, trainer


class Normed(Toy):
    """The toy with a layer that stays frozen, and a parameter outside of any layer."""

    def build_model(self):
        model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 6))
        model.position = nn.Parameter(torch.zeros(3))
        return model


class OneCycle(Toy):
    """Has a schedule of its own, over the steps of the run or those of a link."""

    is_over_run = False

    def configure_optimizers(self):
        optimizer = AdamW([p for _, p in self.named_trained_parameters()], lr=1e-2)
        steps = self.trainer.estimated_stepping_batches if self.is_over_run else self.link_steps
        scheduler = OneCycleLR(optimizer, 1e-2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def block(caplog):
    """The lines of each block that was logged."""
    blocks = [message for message in caplog.messages if message.startswith("before the first step")]
    return [[line.strip() for line in message.splitlines()[1:]] for message in blocks]


def lines_of_fit(tmp_path, caplog, module, data=None, **arguments):
    caplog.set_level(logging.INFO)
    trainer(tmp_path, **{"max_epochs": 3} | arguments).fit(module, batches() if data is None else data)
    (lines,) = block(caplog)
    assert len(lines) <= 15
    return lines


def test_the_block_says_what_is_trained_and_when_knots_fall_and_comes_once(tmp_path, caplog):
    module = toy(Normed)
    lines = lines_of_fit(tmp_path, caplog, module, chain={"every_n_epochs": 1})
    module.merged_model()
    assert len(block(caplog)) == 1
    assert lines == [
        "model: link 0 of rank 2 and alpha 4 on 2 of 2 layers: 76 parameters",
        "data: 10 batches in an epoch",
        "knots (cola): 2, before steps 10, 20, of 30 steps",
        "resume: exact only from the end of an epoch. EpochDataModule makes it exact everywhere",
    ]


@pytest.mark.parametrize("is_over_run", [True, False])
def test_a_schedule_over_the_run_is_named_where_each_link_has_its_own(tmp_path, caplog, is_over_run):
    module = toy(OneCycle)
    module.is_over_run = is_over_run
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3).fit(module, batches())
    assert ("OneCycleLR takes 30 steps, but each link has 10" in caplog.text) == is_over_run


class OwnSchedule(Toy):
    """This package's optimizer, and a schedule of its own."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()["optimizer"]
        return [optimizer], [OneCycleLR(optimizer, 1e-2, total_steps=100)]


@pytest.mark.parametrize("is_by_command", [False, True])
@pytest.mark.parametrize(
    ("cls", "options", "unused"),
    [
        (OneCycle, {}, None),
        (OneCycle, {"kept_optimizer_state": 0.5}, None),
        (OneCycle, {"optimizer": lambda parameters: AdamW(parameters, lr=0.1)}, "model.optimizer"),
        (OneCycle, {"lr_ratio_B": 4.0, "warmup_steps": 3.0}, "model.lr_ratio_B, model.warmup_steps"),
        (OwnSchedule, {"optimizer": lambda parameters: AdamW(parameters, lr=0.1), "lr_ratio_B": 4.0}, None),
        (OwnSchedule, {"lr_schedule": "cosine"}, "model.lr_schedule"),
        (Toy, {"lr_schedule": "constant", "lr_ratio_B": 4.0}, None),
    ],
)
def test_an_option_that_a_modules_own_optimizer_does_not_use_is_refused(tmp_path, cls, options, unused, is_by_command):
    if is_by_command:  # it passes each option, also those that are not given
        options = {field.name: field.default for field in dataclasses.fields(LinkConfig)} | {"rank": 2, "alpha": 4} | options
        options.setdefault("optimizer", lambda parameters: AdamW(parameters, lr=1e-3, fused=True))
    with pytest.raises(UserError, match=rf"^{unused}: ") if unused else nullcontext():
        trainer(tmp_path, max_steps=1).fit(toy(cls, **options), batches())


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
@pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader. but have no .validation_step")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Data(batch_size=4), "exact, from every checkpoint"),
        (
            lambda: StatefulDataLoader(batches().dataset, batch_size=4),
            "exact after the first step of an epoch (StatefulDataLoader)",
        ),
        (
            lambda: DataLoader(batches().dataset, batch_size=4, shuffle=True),
            "not exact",
        ),
    ],
    ids=["epoch", "stateful", "shuffled"],
)
def test_the_block_says_whether_a_resume_is_exact(tmp_path, caplog, make, expected):
    limits = {"max_steps": 3, "max_epochs": 1, "limit_val_batches": 0}
    lines = lines_of_fit(tmp_path, caplog, toy(lr_schedule="constant"), make(), **limits)
    assert f"resume: {expected}" in lines
    assert ("no resume is exact" in caplog.text) == (expected == "not exact")
