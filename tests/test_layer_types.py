"""Which layer types can be adapted: the table, to which users may add, and convolutions, against peft's LoRA."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from cola_lightning import LoRAConfig, LoRALinear, UserError, inject_lora, lora_layers, register_lora_layer
from cola_lightning.lora import inject
from tests.test_layers import Grid, LoRAGrid


@pytest.fixture(autouse=True)
def _table_of_before(monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))


def model():
    return nn.Sequential(nn.Linear(4, 6), Grid(), nn.Linear(5, 2))


def test_all_linear_means_what_is_registered_as_linear():
    with pytest.raises(UserError, match=r"^model\.target_modules: .*'1', which is a Grid"):
        inject_lora(model(), LoRAConfig(["1"], rank=1, alpha=1))
    register_lora_layer(Grid)(LoRAGrid)
    assert inject_lora(model(), LoRAConfig("all-linear", rank=1, alpha=1)) == ["0", "2"]
    register_lora_layer(Grid, is_linear=True)(LoRAGrid)
    assert inject_lora(model(), LoRAConfig("all-linear", rank=1, alpha=1)) == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"^model\.target_modules: .*'0', which is a Tanh.* or Grid"):
        inject_lora(nn.Sequential(nn.Tanh()), LoRAConfig(["0"], rank=1, alpha=1))


def test_a_type_of_another_package_is_named_and_its_class_made_once_a_model_has_one():
    made = []

    @register_lora_layer(f"{Grid.__module__}.Grid")
    def lora_grid():
        made.append(LoRAGrid)
        return LoRAGrid

    inject_lora(nn.Sequential(nn.Linear(4, 2)), LoRAConfig("all-linear", rank=1, alpha=1))
    assert not made
    adapted = model()
    inject_lora(adapted, LoRAConfig(["1"], rank=1, alpha=1))
    assert type(lora_layers(adapted)["1"]) is LoRAGrid


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


# ---------------------------------------------------------------------- convolutions


def network():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, (3, 2)), nn.Flatten(1), nn.Linear(24, 5)
    )


def row_network():
    return nn.Sequential(nn.Conv1d(3, 6, 3, padding="same"), nn.Flatten(1), nn.Linear(54, 5))


TARGETS = ["0", "2", "4"]


def images(n=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


@pytest.mark.parametrize(("target_modules", "expected"), [("all-linear", ["4"]), (r"[024]", TARGETS), (["2", "4"], ["2", "4"])])
def test_all_linear_leaves_convolutions_which_are_adapted_by_name(target_modules, expected):
    assert inject_lora(network(), LoRAConfig(target_modules, rank=2, alpha=4)) == expected


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


@pytest.mark.parametrize(("build", "shape"), [(network, (4, 2, 8, 8)), (row_network, (4, 3, 9))], ids=["2d", "1d"])
def test_one_link_equals_pefts_lora_for_50_steps(build, shape):
    torch.manual_seed(0)
    ours = build()
    targets = [name for name, module in ours.named_modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]
    theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0))
    inject_lora(ours, LoRAConfig(targets, rank=4, alpha=8))
    peft_modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            layer.lora_A.copy_(peft_modules[name].lora_A["default"].weight.flatten(1))
    optimizers = [AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (ours, theirs)]
    for _ in range(50):
        x, y = torch.randn(shape), torch.randint(5, shape[:1])
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    merged = theirs.merge_and_unload()
    for name, layer in lora_layers(ours).items():
        assert layer.lora_B.any()
        layer.finish()
        torch.testing.assert_close(layer.weight, merged.get_submodule(name).weight, rtol=1e-4, atol=1e-5)
