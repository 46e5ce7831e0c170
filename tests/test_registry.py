"""The table of layer types that can be adapted, which users may add to."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cola_lightning
from cola_lightning import AdaptedModel, LoRALayer, UserError, inject_lora, lora_layers, register_lora_layer
from cola_lightning.lora import inject


@pytest.fixture(autouse=True)
def _table_of_before(monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))


class Scaled(nn.Linear):
    """Gives twice what its parent would."""

    def forward(self, x):
        return 2 * super().forward(x)


class LoRAScaled(LoRALayer, Scaled):
    def project_up(self, hidden, lora_B):
        return 2 * super().project_up(hidden, lora_B)


class Grid(nn.Module):
    """A layer that is no kin of torch's: a weight of in x out, without a bias."""

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


def build(kind):
    return nn.Sequential(nn.Linear(4, 6), kind(6, 5) if kind is Scaled else kind(), nn.Linear(5, 2))


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
@pytest.mark.parametrize(("kind", "lora_class"), [(Scaled, LoRAScaled), (Grid, LoRAGrid)])
def test_a_users_layer_is_adapted_by_the_class_that_is_registered_for_it(kind, lora_class, finished_links):
    assert register_lora_layer(kind)(lora_class) is lora_class
    make = {"target_modules": ["1"], "rank": 2, "alpha": 3, "finished_links": finished_links, "seed": 1}
    adapted = AdaptedModel.of(lambda: build(kind), **make)
    assert type(adapted.layers["1"]) is lora_class
    x = torch.randn(3, 4)
    for _ in range(2):
        with torch.no_grad():
            adapted.layers["1"].lora_B.normal_()
        before = adapted.model(x)
        adapted.tie_knot()
        torch.testing.assert_close(adapted.model(x), before, rtol=1e-5, atol=1e-5)
    again = AdaptedModel.of(lambda: build(kind), **make)
    again.go_to(adapted.chain)
    assert torch.equal(again.model(x), adapted.model(x))
    assert torch.equal(pickle.loads(pickle.dumps(adapted.model))(x), adapted.model(x))
    merged = adapted.merged_model()
    assert type(merged[1]) is kind
    torch.testing.assert_close(merged(x), adapted.model(x), rtol=1e-5, atol=1e-5)


def test_all_linear_means_what_is_registered_as_linear():
    register_lora_layer(Grid)(LoRAGrid)
    assert inject_lora(build(Grid), "all-linear", rank=1, alpha=1) == ["0", "2"]
    register_lora_layer(Grid, is_linear=True)(LoRAGrid)
    assert inject_lora(build(Grid), "all-linear", rank=1, alpha=1) == ["0", "1", "2"]


def test_a_type_of_another_package_is_named_and_its_class_made_once_a_model_has_one():
    made = []

    @register_lora_layer(f"{__name__}.Grid")
    def lora_grid():
        made.append(LoRAGrid)
        return LoRAGrid

    inject_lora(nn.Sequential(nn.Linear(4, 2)), "all-linear", rank=1, alpha=1)
    assert not made
    model = build(Grid)
    inject_lora(model, ["1"], rank=1, alpha=1)
    assert type(lora_layers(model)["1"]) is LoRAGrid
    assert made


def test_the_messages_name_what_is_registered():
    with pytest.raises(UserError, match=r"expected layers of type Linear, .* received '1', which is a Grid$"):
        inject_lora(build(Grid), ["1"], rank=1, alpha=1)
    with pytest.raises(UserError, match=r"expected linear layers for all-linear, received Grid"):
        inject_lora(nn.Sequential(Grid()), "all-linear", rank=1, alpha=1)
    register_lora_layer(Grid, is_linear=True)(LoRAGrid)
    with pytest.raises(UserError, match=r"of type Linear, .* or Grid .*, received '0', which is a Tanh$"):
        inject_lora(nn.Sequential(nn.Tanh(), Grid()), ["0"], rank=1, alpha=1)


def test_a_class_of_ones_own_takes_the_place_of_the_one_that_there_was():
    @register_lora_layer(nn.Linear, is_linear=True)
    class Loud(cola_lightning.LoRALinear):
        def project_down(self, x, lora_A):
            return 3 * F.linear(x, lora_A)

    model = nn.Sequential(nn.Linear(4, 2))
    inject_lora(model, "all-linear", rank=1, alpha=1)
    assert type(model[0]) is Loud


def test_a_class_that_takes_a_subclass_for_its_own_is_asked_before_its_parents():
    class Kin(Grid):
        pass

    register_lora_layer(Grid)(LoRAGrid)
    assert inject.lora_class(Kin()) is None  # it may compute something else
    register_lora_layer(Kin)(LoRAGrid)
    assert inject.lora_class(Kin()) is LoRAGrid


def test_no_other_package_is_imported_for_the_table():
    code = "import sys, cola_lightning.lora.inject; assert not {'transformers', 'bitsandbytes'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
