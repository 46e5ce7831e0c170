from inspect import signature

import pytest
import torch
from torch import nn

from cola_lightning import LoRALayer, LoRALinear, register_lora_layer
from cola_lightning.lora import inject
from tests.toy import adapt_layer, plain_layer


class Named(nn.Linear):
    """Its input has another name."""

    def forward(self, hidden_states):
        return nn.functional.linear(hidden_states, self.weight, self.bias)


@pytest.fixture(params=["linear", "subclass", "conv1d"])
def base(request, monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))
    register_lora_layer(Named, is_linear=True)(type("LoRANamed", (LoRALayer, Named), {}))
    torch.manual_seed(0)
    if request.param != "conv1d":
        return {"linear": nn.Linear, "subclass": Named}[request.param](6, 5)
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


def trained(layer):
    """The layer with a link that does something."""
    with torch.no_grad():
        layer.lora_B[:, : layer.rank].normal_()
    return layer


def test_a_new_link_leaves_the_function_and_the_parameters_alone(base):
    x = torch.randn(3, 6)
    expected = base(x)
    layer = adapt_layer(base, rank=2, alpha=4)
    assert torch.equal(layer(x), expected)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert isinstance(layer, type(base))


def test_the_forward_is_the_formula(base):
    layer = trained(adapt_layer(base, rank=2, alpha=3)).double()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    expected = base(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_the_input_has_the_name_that_the_base_gives_it(base):
    layer, x = trained(adapt_layer(base, rank=2, alpha=4)), torch.randn(3, 6)
    name = next(name for name in signature(type(base).forward).parameters if name != "self")
    assert torch.equal(layer(**{name: x}), layer(x))


def test_merge_keeps_the_function_and_adds_the_delta(base):
    before = base.weight.detach().clone()
    layer = trained(adapt_layer(base, rank=2, alpha=4))
    x = torch.randn(3, 6)
    expected, delta = layer(x), layer.delta_weight()
    assert delta.shape == before.shape
    layer.finish()
    assert torch.equal(layer.weight, before + delta)
    assert not layer.lora_B.any()
    torch.testing.assert_close(layer(x), expected)


def test_a_link_of_lower_rank_uses_slices_of_the_same_parameters():
    layer = LoRALinear.adapt_(nn.Linear(6, 5), rank=4, alpha=8)
    parameters = layer.lora_A, layer.lora_B
    layer.reset(torch.Generator().manual_seed(1), rank=2, alpha=3)
    assert (layer.lora_A is parameters[0], layer.lora_B is parameters[1]) == (True, True)
    assert layer.scaling == 1.5
    assert layer.lora_A[:2].all()
    assert not layer.lora_A[2:].any()
    trained(layer)
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    assert layer.lora_B.grad[:, :2].any()
    assert not layer.lora_A.grad[2:].any()
    assert not layer.lora_B.grad[:, 2:].any()
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 2


def test_the_same_generator_gives_the_same_A_in_every_dtype_and_leaves_the_global_one_alone():
    layers = [LoRALinear.adapt_(nn.Linear(6, 5).to(dtype), rank=3, alpha=1) for dtype in (torch.float32, torch.float64)]
    state = torch.random.get_rng_state()
    for layer in layers:
        layer.reset(torch.Generator().manual_seed(7))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(layers[0].lora_A.double(), layers[1].lora_A)


@pytest.mark.parametrize(("init", "std"), [("kaiming", (3 * 400) ** -0.5), ("gaussian", 1 / 50)])
def test_A_is_drawn_as_peft_draws_it(init, std):
    layer = LoRALinear.adapt_(nn.Linear(400, 100), rank=100, alpha=1, init=init)
    layer.reset(torch.Generator().manual_seed(0), rank=50)
    assert layer.lora_A[:50].std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("narrow", ["half", "bfloat16"])
def test_the_layer_is_never_narrowed_below_fp32(narrow):
    layer = trained(LoRALinear.adapt_(nn.Linear(6, 5), rank=2, alpha=1))
    before = layer.weight.detach().clone()
    model = nn.Sequential(nn.Linear(6, 6), layer)
    getattr(model, narrow)()
    dtype = model[0].weight.dtype
    assert dtype.itemsize == 2
    assert torch.equal(layer.weight, before)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert model(torch.randn(3, 6, dtype=dtype)).dtype == dtype
    assert model.double()[1].lora_A.dtype == torch.float64
    assert model.float()[1].lora_A.dtype == torch.float32


def test_under_autocast_the_layer_computes_in_autocasts_dtype():
    layer = trained(LoRALinear.adapt_(nn.Linear(6, 5), rank=2, alpha=1))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        delta = layer.delta_weight()
    assert y.dtype == torch.bfloat16
    assert torch.equal(delta, layer.delta_weight())


def test_dropout_acts_on_the_link_alone_and_only_in_training():
    layer = trained(LoRALinear.adapt_(nn.Linear(60, 5), rank=2, alpha=1, dropout=0.5))
    x = torch.randn(3, 60)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), base + x @ layer.delta_weight().T)


def test_the_plain_layer_is_the_base_again(base):
    layer = adapt_layer(base, rank=2, alpha=4).eval()
    plain = plain_layer(layer)
    assert type(plain) is type(base)
    assert (plain.weight is base.weight, plain.bias is base.bias, plain.training) == (True, True, False)


def test_a_layer_without_bias_stays_without():
    layer = LoRALinear.adapt_(nn.Linear(4, 4, bias=False), rank=1, alpha=1)
    assert layer.bias is None
    assert plain_layer(layer).bias is None
    assert "rank=1, alpha=1" in repr(layer)
