"""Which layer types can be adapted: the table, to which users may add, and convolutions, against peft's LoRA."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cola_lightning import LoRAConfig, LoRALinear, UserError, inject_lora, register_lora_layer
from cola_lightning.lora import inject
from tests.helpers.toy import Grid, LoRAGrid, network


@pytest.fixture(autouse=True)
def _table_of_before(monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))


def model():
    return nn.Sequential(nn.Linear(4, 6), Grid(), nn.Linear(5, 2))


def test_all_linear_means_what_is_registered_as_linear():
    with pytest.raises(UserError, match=r"^model\.target_modules: .*'1', which is a Grid"):
        inject_lora(model(), LoRAConfig(["1"], rank=1, alpha=1))
    register_lora_layer(f"{Grid.__module__}.Grid")(LoRAGrid)
    assert inject_lora(model(), LoRAConfig("all-linear", rank=1, alpha=1)) == ["0", "2"]
    assert inject_lora(network(), LoRAConfig("all-linear", rank=1, alpha=1)) == ["4"]  # no convolution
    register_lora_layer(Grid, is_linear=True)(LoRAGrid)
    adapted = model()
    assert inject_lora(adapted, LoRAConfig("all-linear", rank=1, alpha=1)) == ["0", "1", "2"]
    assert type(adapted[1]) is LoRAGrid
    with pytest.raises(UserError, match=r"^model\.target_modules: .*'0', which is a Tanh.* or Grid"):
        inject_lora(nn.Sequential(nn.Tanh()), LoRAConfig(["0"], rank=1, alpha=1))


def test_a_type_may_be_given_by_name():
    register_lora_layer(f"{Grid.__module__}.Grid")(LoRAGrid)
    assert inject_lora(model(), LoRAConfig(["1"], rank=1, alpha=1)) == ["1"]


def test_a_class_of_ones_own_takes_the_place_of_the_one_that_there_was():
    @register_lora_layer(nn.Linear, is_linear=True)
    class Loud(LoRALinear):
        def project_down(self, x, lora_A):
            return 3 * F.linear(x, lora_A)

    adapted, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4)
    expected = adapted(x)
    inject_lora(adapted, LoRAConfig("all-linear", rank=1, alpha=1))
    nn.init.ones_(adapted[0].lora_B)
    torch.testing.assert_close(adapted(x), expected + 3 * x @ adapted[0].delta_weight().T)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), "padding_mode"),
        (nn.ConvTranspose2d(2, 4, 3), "ConvTranspose2d"),
    ],
    ids=str,
)
def test_a_convolution_of_which_a_link_would_be_another_is_refused_and_nothing_changed(layer, named):
    model, kind = nn.Sequential(layer), type(layer)
    with pytest.raises(UserError, match=rf"^model\.target_modules: .*'0'.*{named}"):
        inject_lora(model, LoRAConfig("0", rank=2, alpha=1))
    assert type(model[0]) is kind
