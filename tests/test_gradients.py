"""A link that gets no gradient is told of, once, before time is lost."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.toy import Toy, batches, toy, trainer

WARNING = "got no gradient"


class Net(nn.Module):
    """Calls one layer, reads the weights of the next, and takes one of two experts, by the batch."""

    def __init__(self, n_read=1):
        super().__init__()
        self.called = nn.Linear(8, 12)
        self.read = nn.ModuleList(nn.Linear(12, 12) for _ in range(n_read))
        self.experts = nn.ModuleList([nn.Linear(12, 6), nn.Linear(12, 6)])
        self.n_calls = 0

    def forward(self, x):
        h = self.called(x)
        for layer in self.read:
            h = F.linear(h, layer.weight, layer.bias)
        self.n_calls += 1
        return self.experts[self.n_calls % 2](torch.tanh(h))


class NetToy(Toy):
    n_read = 1

    def build_model(self):
        return Net(self.n_read)


class FourToy(NetToy):
    n_read = 4


def told(caplog):
    return [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]


def fit(folder, module, **options):
    trainer(folder, chain={}, **{"max_steps": 3} | options).fit(module, batches())


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.WARNING, "cola_lightning")


def test_a_layer_that_is_not_called_is_named_once_a_fit(tmp_path, caplog):
    module = toy(NetToy)
    fit(tmp_path, module, accumulate_grad_batches=2)  # both experts are taken in the first step
    (message,) = told(caplog)
    assert message.startswith(
        "model.target_modules: 1 of 4 adapted layers got no gradient in the first step's batches (read.0): "
    )
    assert "\n" not in message
    fit(tmp_path, module, accumulate_grad_batches=2, max_steps=6)
    assert told(caplog) == [message] * 2


def test_an_expert_without_tokens_is_told_of_as_one_of_this_step(tmp_path, caplog):
    fit(tmp_path, toy(NetToy))
    (message,) = told(caplog)
    assert "2 of 4 adapted layers got no gradient in the first step's batches (read.0, experts.0)" in message


class SkippingToy(NetToy):
    """Has no loss for its first batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_is_no_first_step(tmp_path, caplog):
    fit(tmp_path, toy(SkippingToy))
    (message,) = told(caplog)
    assert "2 of 4 adapted layers" in message


def test_three_are_named_and_all_are_counted(tmp_path, caplog):
    fit(tmp_path, toy(FourToy), accumulate_grad_batches=2)
    (message,) = told(caplog)
    assert "4 of 7 adapted layers" in message
    assert "(read.0, read.1, read.2, ...)" in message


def test_the_warning_comes_at_the_first_step(tmp_path, caplog):
    fit(tmp_path, toy(NetToy), max_steps=1)
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("how", [{}, {"activation_checkpointing": False, "dropout": 0.1}, {"target_modules": None}], ids=str)
def test_where_all_is_trained_nothing_is_told(tmp_path, caplog, how):
    fit(tmp_path, toy(**how))
    assert told(caplog) == []


def test_a_layer_whose_link_the_user_froze_is_not_named(tmp_path, caplog):
    module = toy(NetToy)
    module.configure_model()
    for parameter in module.model.read.parameters():
        parameter.requires_grad_(False)
    fit(tmp_path, module, accumulate_grad_batches=2)
    assert told(caplog) == []
