"""Which layers of a model are adapted, that a layer stays what it is, and what is refused because a link would be another."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear

from cola_lightning import LoRAConfig, LoRALinear, UserError, inject_lora, lora_layers, register_lora_layer
from cola_lightning.lora import inject
from tests.helpers.toy import Grid, LoRAGrid, assert_near, network, strip_lora, with_trained_link


@pytest.fixture(autouse=True)
def _table_of_before(monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj", "v_proj"], ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]),
        (["0.q_proj", "head"], ["layers.0.q_proj", "head"]),
        (r".*\.1\.[qk]_proj", ["layers.1.q_proj", "layers.1.k_proj"]),
        ("all-linear", [f"layers.{i}.{p}_proj" for i in (0, 1) for p in "qkv"]),
    ],
)
def test_targets_follow_pefts_rule(target_modules, expected):
    model = Model()
    assert inject_lora(model, LoRAConfig(target_modules, rank=2, alpha=4)) == expected == list(lora_layers(model))
    if target_modules != "all-linear":  # PEFT knows output embeddings of its own models only
        peft_model = get_peft_model(Model(), LoraConfig(target_modules=target_modules, r=2)).base_model.model
        assert [name for name, part in peft_model.named_modules() if hasattr(part, "lora_A")] == expected


def view_of(kind):
    """A layer ``query`` whose weight is also that of another, in whole or in part, and one of its own."""
    model = nn.ModuleDict({"query": nn.Linear(6, 6, bias=False), "own": nn.Linear(4, 4), "other": nn.Linear(6, 12)})
    weight = model["query"].weight.detach()
    if kind == "a part":
        model["query"].weight = nn.Parameter(model["other"].weight.detach()[:6])
    elif kind == "a buffer":
        model.register_buffer("start", weight)
    else:
        model["other"] = nn.Embedding(6, 6)
        model["other"].weight = model["query"].weight if kind == "tied" else nn.Parameter(weight.T)
    return model


@pytest.mark.parametrize("kind", ["tied", "a part", "transposed", "a buffer"])
def test_a_weight_that_is_another_is_refused(kind):
    model = view_of(kind)
    with pytest.raises(UserError, match=r"^model\.target_modules: .*'.*query' is shared"):
        inject_lora(model, LoRAConfig(["query"], rank=2, alpha=4))
    with pytest.raises(UserError, match=r"^model\.modules_to_save: .*'.*query' is shared"):
        inject_lora(model, LoRAConfig(["own"], rank=2, alpha=4, modules_to_save=["query"]))
    assert inject_lora(model, LoRAConfig(["own"], rank=2, alpha=4)) == ["own"]


# ---------------------------------------------------------------------- adapting changes nothing else of a layer


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def doubled(module, args, output):
    return output * 2


def shifted(module, args):
    return (args[0] + module.shift,)


def adorned():
    """A model whose first layer has all that can hang on one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    layer = model[0]
    layer.register_buffer("shift", torch.full((6,), 0.5))
    layer.register_buffer("calls", torch.zeros(()), persistent=False)
    layer.note = "of the user's"
    layer.register_forward_pre_hook(shifted)
    layer.register_forward_hook(doubled)
    return model


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
@pytest.mark.parametrize("twin", [lambda model: model, copy.deepcopy, pickled], ids=["itself", "copied", "pickled"])
def test_what_hangs_on_a_layer_stays_on_it(twin, finished_links):
    model, x = adorned(), torch.randn(3, 6)
    expected, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    inject_lora(model, LoRAConfig(["0"], rank=2, alpha=4, finished_links=finished_links))
    model = twin(model)
    for is_stripped in (False, True):
        layer = model[0]
        assert torch.equal(model(x), expected)
        assert (layer.note, layer.calls.item()) == ("of the user's", 0)
        kept = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
        assert kept.keys() == state.keys()  # a buffer that is not persistent stays so
        assert all(torch.equal(kept[name], state[name]) for name in state)
        if not is_stripped:
            strip_lora(model)
    assert type(model[0]) is nn.Linear
    assert vars(model[0]).keys() == vars(adorned()[0]).keys()


@pytest.mark.parametrize("target_modules", [["1"], "all-linear"], ids=str)
def test_a_layer_that_could_not_be_adapted_as_it_is_is_refused_before_anything_is_changed(target_modules):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    model[1].forward = lambda x: nn.functional.linear(x, model[1].weight)  # replaced, as by accelerate's hooks
    expected, types = model(x), [type(module) for module in model.modules()]
    with pytest.raises(UserError, match="'1', which"):
        inject_lora(model, LoRAConfig(target_modules, rank=2, alpha=4))
    assert [type(module) for module in model.modules()] == types
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(x), expected)


class Plain(nn.Linear):
    """Inherits all."""


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.softmax(-1)


def test_a_subclass_with_a_forward_of_its_own_is_refused_or_counted_as_frozen():
    model, x = nn.Sequential(Plain(4, 4), Router(4, 4), FalconLinear(4, 4)), torch.randn(3, 4)  # Falcon's computes as Linear's
    with pytest.raises(UserError, match=r"^model\.target_modules: .*'1', which is a Router"):
        inject_lora(model, LoRAConfig(["1"], rank=1, alpha=1))
    assert inject_lora(model, LoRAConfig("all-linear", rank=1, alpha=1)) == ["0", "2"]
    expected = with_trained_link(model[2])(x)
    strip_lora(model)
    assert [type(layer) for layer in model] == [Plain, Router, FalconLinear]
    assert_near(model[2](x), expected, 1e-6)


def test_a_model_that_is_adapted_already_is_refused_as_its_links_would_be_frozen():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    inject_lora(model, LoRAConfig(["0"]))
    with pytest.raises(UserError, match="already has LoRA layers"):
        inject_lora(model, LoRAConfig(["1"]))
    assert model[0].lora_A.requires_grad


# ---------------------------------------------------------------------- the table of layer types, to which users may add


def grid():
    return nn.Sequential(nn.Linear(4, 6), Grid(), nn.Linear(5, 2))


def test_all_linear_means_what_is_registered_as_linear():
    with pytest.raises(UserError, match=r"^model\.target_modules: .*'1', which is a Grid"):
        inject_lora(grid(), LoRAConfig(["1"], rank=1, alpha=1))
    register_lora_layer(f"{Grid.__module__}.Grid")(LoRAGrid)
    assert inject_lora(grid(), LoRAConfig("all-linear", rank=1, alpha=1)) == ["0", "2"]
    assert inject_lora(grid(), LoRAConfig(["1"], rank=1, alpha=1)) == ["1"]
    assert inject_lora(network(), LoRAConfig("all-linear", rank=1, alpha=1)) == ["4"]  # no convolution
    register_lora_layer(Grid, is_linear=True)(LoRAGrid)
    adapted = grid()
    assert inject_lora(adapted, LoRAConfig("all-linear", rank=1, alpha=1)) == ["0", "1", "2"]
    assert type(adapted[1]) is LoRAGrid
    with pytest.raises(UserError, match=r"^model\.target_modules: .*'0', which is a Tanh.* or Grid"):
        inject_lora(nn.Sequential(nn.Tanh()), LoRAConfig(["0"], rank=1, alpha=1))


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


def test_a_convolution_of_which_a_link_would_be_another_is_refused_and_nothing_changed():
    for layer, named in (
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), "padding_mode"),
        (nn.ConvTranspose2d(2, 4, 3), "ConvTranspose2d"),
    ):
        model, kind = nn.Sequential(layer), type(layer)
        with pytest.raises(UserError, match=rf"^model\.target_modules: .*'0'.*{named}"):
            inject_lora(model, LoRAConfig("0", rank=2, alpha=1))
        assert type(model[0]) is kind
