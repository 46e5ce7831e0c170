"""The table of layer types that can be adapted, which users may add to; ``test_layers.py`` has two that are added."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cola_lightning
from cola_lightning import UserError, inject_lora, lora_layers, register_lora_layer
from cola_lightning.lora import inject
from tests.test_layers import Grid, LoRAGrid


@pytest.fixture(autouse=True)
def _table_of_before(monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))


def model():
    return nn.Sequential(nn.Linear(4, 6), Grid(), nn.Linear(5, 2))


def test_all_linear_means_what_is_registered_as_linear():
    with pytest.raises(UserError, match=r"^model\.target_modules: .* '1', which is a Grid$"):
        inject_lora(model(), ["1"], rank=1, alpha=1)
    register_lora_layer(Grid)(LoRAGrid)
    assert inject_lora(model(), "all-linear", rank=1, alpha=1) == ["0", "2"]
    register_lora_layer(Grid, is_linear=True)(LoRAGrid)
    assert inject_lora(model(), "all-linear", rank=1, alpha=1) == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"^model\.target_modules: .* or Grid .* '0', which is a Tanh$"):
        inject_lora(nn.Sequential(nn.Tanh()), ["0"], rank=1, alpha=1)


def test_a_type_of_another_package_is_named_and_its_class_made_once_a_model_has_one():
    made = []

    @register_lora_layer(f"{Grid.__module__}.Grid")
    def lora_grid():
        made.append(LoRAGrid)
        return LoRAGrid

    inject_lora(nn.Sequential(nn.Linear(4, 2)), "all-linear", rank=1, alpha=1)
    assert not made
    adapted = model()
    inject_lora(adapted, ["1"], rank=1, alpha=1)
    assert type(lora_layers(adapted)["1"]) is LoRAGrid


def test_a_class_of_ones_own_takes_the_place_of_the_one_that_there_was():
    @register_lora_layer(nn.Linear, is_linear=True)
    class Loud(cola_lightning.LoRALinear):
        def project_down(self, x, lora_A):
            return 3 * F.linear(x, lora_A)

    adapted, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4)
    expected = adapted(x)
    inject_lora(adapted, "all-linear", rank=1, alpha=1)
    nn.init.ones_(adapted[0].lora_B)
    torch.testing.assert_close(adapted(x), expected + 3 * x @ adapted[0].delta_weight().T)
