import pytest
import torch
from torch import nn

from cola_lightning import UserError, inject_lora, lora_layers, strip_lora


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.v_proj(self.q_proj(x) + self.k_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(self.layers[0](x) + self.layers[1](x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj", "v_proj"], ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]),
        (["0.q_proj", "head"], ["layers.0.q_proj", "head"]),
        (r".*\.1\.[qk]_proj", ["layers.1.q_proj", "layers.1.k_proj"]),
        ("all-linear", [f"layers.{i}.{p}_proj" for i in (0, 1) for p in "qkv"]),
    ],
)
def test_targets_follow_pefts_rule(model, target_modules, expected):
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(Model(), LoraConfig(target_modules=target_modules, r=2))
    peft_names = [
        name.removesuffix(".lora_A") for name, _ in peft_model.base_model.model.named_modules() if name.endswith(".lora_A")
    ]
    assert inject_lora(model, target_modules, rank=2, alpha=4) == expected
    if target_modules != "all-linear":  # PEFT knows output embeddings of its own models only
        assert peft_names == expected
    assert list(lora_layers(model)) == expected


def test_only_links_and_saved_modules_train(model):
    inject_lora(model, ["q_proj"], rank=2, alpha=4, modules_to_save=["head"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"layers.{i}.q_proj.lora_{f}" for i in (0, 1) for f in "AB"}
    assert trainable == factors | {"head.weight", "head.bias"}


def test_gpt2s_conv1d_is_adapted_and_its_tied_head_is_not():
    from cola_lightning.layers import LoRAConv1D

    model = tiny_gpt2()
    assert inject_lora(model, "all-linear", rank=2, alpha=4) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert all(isinstance(layer, LoRAConv1D) for layer in lora_layers(model).values())


def test_strip_gives_the_same_model_back(model):
    x = torch.randn(2, 8)
    before, parameters, types = model(x), dict(model.named_parameters()), [type(m) for m in model.modules()]
    inject_lora(model, ["q_proj"], rank=2, alpha=4)
    strip_lora(model)
    assert torch.equal(model(x), before)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert [type(m) for m in model.modules()] == types


def test_strip_refuses_to_lose_a_live_link_and_merges_it_if_asked(model):
    x = torch.randn(2, 8)
    inject_lora(model, ["q_proj"], rank=2, alpha=4)
    with torch.no_grad():
        model.layers[1].q_proj.lora_B.fill_(0.1)
    expected = model(x)
    with pytest.raises(UserError, match=r"'layers\.1\.q_proj' has links that would be lost"):
        strip_lora(model)
    strip_lora(model, merge=True)
    torch.testing.assert_close(model(x), expected)
    assert not lora_layers(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"model\.target_modules: .* received 'q_porj'; the nearest that exist: q_proj"),
        ({"target_modules": ["q_proj", "value"]}, r"received 'value'; the nearest that exist: \w+"),
        ({"target_modules": r".*\.qproj"}, r"received '\.\*\\\\.qproj'; the nearest"),
        ({"target_modules": "(q_proj"}, "expected a regular expression"),
        ({"target_modules": []}, "at least one name, received none"),
        ({"target_modules": ["norm"]}, "received 'layers.0.norm', which is a LayerNorm"),
        ({"rank": 0}, r"model\.rank: .* received 0"),
        ({"rank": -2}, r"model\.rank: .* received -2"),
        ({"rank": 9}, r"model\.rank: expected at most 8, .*'layers\.0\.q_proj'.* received 9"),
        ({"alpha": 0}, r"model\.alpha: .* received 0"),
        ({"dropout": 1.0}, r"model\.dropout: .* received 1\.0"),
        ({"modules_to_save": ["haed"]}, r"model\.modules_to_save: .* received 'haed'; the nearest that exist: head"),
        ({"modules_to_save": ["layers"]}, r"received the target 'layers\.0\.q_proj'"),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_line(model, arguments, message):
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=message) as caught:
        inject_lora(model, **{"target_modules": ["q_proj"], "rank": 2, "alpha": 4} | arguments)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == before


def test_shared_weights_and_modules_are_refused(model):
    with pytest.raises(UserError, match="weight is shared"):
        inject_lora(tiny_gpt2(), ["lm_head"], rank=2, alpha=4)
    model.layers[1].q_proj = model.layers[0].q_proj
    with pytest.raises(UserError, match=r"received layers\.0\.q_proj = layers\.1\.q_proj"):
        inject_lora(model, ["q_proj"], rank=2, alpha=4)


def test_torchs_attention_output_is_not_taken_for_a_linear_layer():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(UserError, match="NonDynamicallyQuantizableLinear"):
        inject_lora(attention, ["out_proj"], rank=2, alpha=4)


def test_a_module_to_save_whose_weight_is_used_elsewhere_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(UserError, match=r"modules_to_save: expected modules with weights of their own.*'2.weight'.*'0.weight'"):
        inject_lora(model, ["1"], rank=1, alpha=1, modules_to_save=["2"])


def test_a_second_adaptation_is_refused(model):
    inject_lora(model, ["q_proj"], rank=2, alpha=4)
    with pytest.raises(UserError, match="adapted already"):
        inject_lora(model, ["k_proj"], rank=2, alpha=4)
