"""Links on nn.MultiheadAttention: against torch's module with merged weights, against peft, in a run, and in other models."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from cola_lightning import LoRAConfig, UserError, inject_lora, lora_layers
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.peft import as_peft_weights, read_adapter
from tests.helpers.toy import Toy, assert_bit_equal, assert_near, difference, strip_lora, toy, trainer, with_trained_links


class Attention(nn.Module):
    """An attention module in another, as all are."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, **options)
        for parameter in self.parameters():  # its biases would begin at zero
            nn.init.normal_(parameter, std=0.4)

    def forward(self, *inputs, **options):
        return self.attention(*inputs, **options)


def adapted(model, target_modules="all-linear", links=1, **options):
    """The model with a link that is trained, and with finished ones before it."""
    inject_lora(model, LoRAConfig(target_modules, **{"rank": 2, "alpha": 4} | options))
    for _ in range(links - 1):
        for layer in lora_layers(with_trained_links(model)).values():
            layer.finish()
    return with_trained_links(model)


def plain(model):
    """A copy whose links are merged: torch's own module."""
    model = copy.deepcopy(model)
    strip_lora(model)
    assert not lora_layers(model)
    return model


# ---------------------------------------------------------------------- what it computes

MODULES = {
    "": ({}, "merge"),
    "batch_first, no bias": ({"batch_first": True, "bias": False}, "stack"),
    "kdim, vdim": ({"kdim": 6, "vdim": 5}, "merge"),
    "kdim, no bias": ({"kdim": 6, "bias": False, "batch_first": True}, "stack"),
}
causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CALLS = {
    "weights": {},
    "weights of each head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "mask": {"attn_mask": causal},
    "added mask": {"attn_mask": torch.linspace(-2, 1, 25).view(5, 5), "need_weights": False},
    "mask of each head": {"attn_mask": torch.linspace(-2, 1, 150).view(6, 5, 5)},
    "padding": {"key_padding_mask": padding, "need_weights": False},
    "both": {"key_padding_mask": padding, "attn_mask": causal},
    "both, causal": {"key_padding_mask": padding, "attn_mask": causal, "is_causal": True, "need_weights": False},
    "causal": {"attn_mask": causal, "is_causal": True, "need_weights": False},
    "causal, weights": {"attn_mask": causal, "is_causal": True},
}


def inputs(options, kind="self"):
    """Query, key and value: the same, a query and a memory, or three."""
    generator = torch.Generator().manual_seed(1)
    sizes = 8, options.get("kdim", 8), options.get("vdim", 8)
    query, key, value = (torch.randn(3, 5, size, generator=generator) for size in sizes)
    if "kdim" not in options and kind != "three":
        key, value = (query, query) if kind == "self" else (key, key)
    return (query, key, value) if options.get("batch_first") else transposed(query, key, value)


def transposed(*tensors):
    one = {id(tensor): tensor.transpose(0, 1) for tensor in tensors}  # the same tensor stays one
    return tuple(one[id(tensor)] for tensor in tensors)


def assert_same_outputs(mine, theirs):
    """Up to rounding: to 2e-6 of the largest value."""
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            assert difference(one, other) <= 2e-6 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("call", CALLS)
def test_it_computes_what_torchs_module_does_with_the_links_merged(module, call):
    options, finished_links = MODULES[module]
    ours = adapted(Attention(**options), links=2, finished_links=finished_links)
    merged, base = plain(ours), Attention(**options)
    for kind in ("self", "memory", "three"):
        x = inputs(options, kind)
        expected = merged(*x, **CALLS[call])
        assert difference(expected[0], base(*x, **CALLS[call])[0]) > 0.1
        assert_same_outputs(ours(*x, **CALLS[call]), expected)
        for model in (ours.eval(), merged.eval()):  # torch's may use its fused kernel
            with torch.no_grad():
                assert_same_outputs(model(*x, **CALLS[call]), expected)
        ours.train()
        merged.train()


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_new_link_changes_nothing_with_dropout_and_one_sequence_without_a_batch(need_weights):
    ours, x = Attention(dropout=0.3), torch.randn(5, 8)
    base = copy.deepcopy(ours)
    inject_lora(ours, LoRAConfig(rank=2, alpha=4))
    for inputs, masks in ((x, {}), (x[:, None], {}), (x, {"attn_mask": causal, "key_padding_mask": padding[1]})):
        torch.manual_seed(3)
        expected = base(inputs, inputs, inputs, need_weights=need_weights, **masks)
        torch.manual_seed(3)
        assert_same_outputs(ours(inputs, inputs, inputs, need_weights=need_weights, **masks), expected)
    with pytest.raises(ValueError, match="attn_mask"):  # as torch does
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("target_modules", ["all-linear", ["out_proj"]], ids=str)
def test_dropout_of_links_drops_their_inputs_in_training(target_modules):
    """Exact, and not ignored: peft merges its weights for each forward pass, and so drops nothing."""
    model, x = adapted(Attention(), target_modules, dropout=0.5), inputs({})
    assert difference(model(*x)[0], model(*x)[0]) > 0.01
    assert_same_outputs(model.eval()(*x), plain(model)(*x))


def test_links_are_computed_in_half_precision_and_under_autocast():
    model, x, options = Attention(batch_first=True).bfloat16(), torch.randn(3, 5, 8), {"key_padding_mask": padding & False}
    y, weights = adapted(model, links=3)(*[x.bfloat16()] * 3, **options)
    assert y.dtype == weights.dtype == torch.bfloat16
    exact = plain(copy.deepcopy(model).float())(x, x, x)[0]
    assert_near(y, exact, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(model.float()(x, x, x, **options)[0], exact, 0.05)


# ---------------------------------------------------------------------- what is adapted, and plain again

SEPARATE = ["attention.q_proj", "attention.k_proj", "attention.v_proj"]


@pytest.mark.parametrize(
    ("options", "target_modules", "expected"),
    [
        ({}, "all-linear", ["attention.in_proj", "attention.out_proj"]),
        ({}, ["in_proj", "out_proj"], ["attention.in_proj", "attention.out_proj"]),
        ({}, ["out_proj"], ["attention.out_proj"]),
        ({}, r".*in_proj", ["attention.in_proj"]),
        ({"kdim": 6}, "all-linear", [*SEPARATE, "attention.out_proj"]),
        ({"kdim": 6}, ["q_proj", "v_proj"], ["attention.q_proj", "attention.v_proj"]),
    ],
    ids=str,
)
def test_a_module_is_adapted_by_the_names_of_its_projections(options, target_modules, expected):
    model, x = Attention(**options), inputs(options)
    names, parameters, before = list(model.state_dict()), dict(model.named_parameters()), model(*x)
    assert sorted(inject_lora(model, LoRAConfig(target_modules, rank=2, alpha=4))) == sorted(expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{factor}" for name in expected for factor in "AB"}
    assert_same_outputs(model(*x), before)
    assert difference(with_trained_links(model)(*x)[0], before[0]) > 0.1
    strip_lora(model)
    assert type(model.attention) is nn.MultiheadAttention
    assert list(model.state_dict()) == names
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert vars(model.attention).keys() == vars(Attention(**options).attention).keys()


def test_what_is_not_a_target_stays_what_it_is_and_what_computes_otherwise_is_refused():
    class Other(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "other": Other(8, 2), "head": nn.Linear(8, 8)})
    model["more"] = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert inject_lora(model, LoRAConfig(["head"], rank=2, alpha=4)) == ["head"]
    assert "forward" not in vars(model["attention"])
    strip_lora(model)
    assert_bit_equal(model.state_dict(), state)
    for name, kind in (
        ("other", "Other"),
        ("more", "Multi"),
        ("attention", "Multi"),
        ("other.out_proj", "NonDynamicallyQuantizableLinear"),
    ):
        with pytest.raises(UserError, match=rf"'{name}', which is a {kind}"):
            inject_lora(model, LoRAConfig([name], rank=2, alpha=4))
        assert isinstance(model["attention"].in_proj_weight, nn.Parameter)
    with pytest.raises(UserError, match="no layer is left"):
        inject_lora(model, LoRAConfig(exclude_modules=["attention"], modules_to_save=["head"]))
    assert inject_lora(model, LoRAConfig(rank=2, alpha=4)) == ["attention.out_proj", "attention.in_proj", "head"]


def test_a_compiled_module_computes_the_same_in_one_graph():
    model, x = adapted(Attention(batch_first=True)), inputs({"batch_first": True})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for options in ({}, {"need_weights": False, "key_padding_mask": padding}):
        assert_same_outputs(compiled(*x, **options), model(*x, **options))


def encoder(nested=True, norm=None):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(
    ("target_modules", "finished_links"),
    [("all-linear", "stack"), (["in_proj", "out_proj"], "merge"), (["linear1", "linear2"], "stack")],
)
@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_evaluates_as_its_merged_model_also_where_rows_are_padded(target_modules, finished_links, nested):
    """torch's fused encoder layers, and nested tensors, would read the weights without the links."""
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.bias)
    model = adapted(encoder(nested, norm), target_modules, links=2, finished_links=finished_links)
    model, x = copy.deepcopy(model), torch.randn(3, 5, 8)
    merged = plain(model).requires_grad_(True)  # as merged_model has it
    left, none = padding.flip(1), torch.zeros_like(padding)
    masks = {"padded": padding, "added": torch.zeros(3, 5).masked_fill_(padding, -torch.inf), "left": left, "none": none}
    for name, mask in {**masks, "whole": None}.items():
        for is_training, has_gradients in ((True, True), (False, True), (False, False)):
            if target_modules == ["linear1", "linear2"] and nested and has_gradients:
                continue  # torch's own attention takes no nested tensors then, and says so
            with torch.set_grad_enabled(has_gradients):
                mine, theirs = (one.train(is_training)(x, src_key_padding_mask=mask) for one in (model, merged))
            if name in ("padded", "added"):  # torch's nested tensors have zeros in the padded positions
                mine, theirs = (y[~padding] for y in (mine, theirs))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=f"{name} {is_training} {has_gradients}")
    assert merged.use_nested_tensor is nested
    assert merged.layers[0].activation_relu_or_gelu == 1
    assert not any("forward" in vars(part) for part in merged.modules())


# ---------------------------------------------------------------------- in a run


class Module(Toy):
    """The toy's regression with a small encoder."""

    example_input_array = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(5))

    def build_model(self):
        return encoder()


def module(**options):
    return toy(Module, optimizer=lambda parameters: AdamW(parameters, lr=0.03), **options)


def fitted(folder, **options):
    """A module after a run of three links."""
    ours, x = module(**options), torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(3))
    loader = DataLoader(TensorDataset(x, x.roll(1, 1)), batch_size=4)
    trainer(folder, chain={"every_n_epochs": 1}, max_epochs=3).fit(ours, loader)
    return ours


FEWER = {"target_modules": ["in_proj", "linear1"]}


@pytest.mark.parametrize("options", [{"finished_links": "stack"}, FEWER], ids=["all", "without out_proj"])
def test_a_chain_on_an_encoder_is_trained_and_exported_and_read(tmp_path, caplog, options):
    with caplog.at_level(logging.WARNING, "cola_lightning"):
        ours = fitted(tmp_path, **options)
    assert "no gradient" not in caplog.text
    x = ours.example_input_array
    with torch.no_grad():
        expected, before = ours.eval()(x), encoder().eval()(x)
    assert difference(expected, before) > 0.05
    with pytest.raises(UserError, match=r"^format: PEFT's LoRA has no effect in 'layers\.0\.self_attn\."):
        ours.export(tmp_path / "peft", "peft")
    assert "proven" in ours.export(tmp_path / "merged")[-1]
    ours.export(tmp_path / "chain", "chain")
    assert len(read_chain(tmp_path / "chain")) == 3
    again = module(**options, init_chain=str(tmp_path / "chain")).eval()
    torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-5)


def swin(block="SwinTransformerBlock"):
    swin = pytest.importorskip("torchvision", reason="models for images").models.swin_transformer
    merging = swin.PatchMergingV2 if block.endswith("V2") else swin.PatchMerging
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4], "num_classes": 5}
    return swin.SwinTransformer([2, 2], **sizes, block=getattr(swin, block), downsample_layer=merging)


@pytest.mark.parametrize(
    ("block", "target_modules"), [("SwinTransformerBlock", "all-linear"), ("SwinTransformerBlockV2", ["qkv", "proj"])]
)
def test_torchvisions_swin_transformer_which_reads_the_weights_of_its_linear_layers(block, target_modules):
    torch.manual_seed(0)
    model, x = swin(block).eval(), torch.randn(2, 3, 32, 32)
    before = model(x)
    names = inject_lora(model, LoRAConfig(target_modules, rank=2, alpha=4))
    assert {"features.1.0.attn.qkv", "features.1.0.attn.proj"} <= set(names)
    assert difference(model(x), before) <= 1e-5 * before.abs().max()
    expected = with_trained_links(model)(x)
    expected.square().sum().backward()
    assert all(layer.lora_A.grad.any() for layer in lora_layers(model).values())
    assert difference(expected, before) > 1e-3 * before.abs().max()
    strip_lora(model)
    with torch.no_grad():
        assert difference(model(x), expected) <= 1e-4 * expected.abs().max()
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("make", "name"), [(swin, "features.1.0.attn.qkv"), (Attention, "attention.in_proj"), (encoder, "layers.0.linear1")]
)
def test_pefts_lora_on_what_reads_weights_is_refused_written_and_read(tmp_path, make, name):
    with pytest.raises(UserError, match=rf"^format: PEFT's LoRA has no effect in '{name}'"):
        as_peft_weights(make(), {name: (torch.ones(1, 8), torch.ones(24, 1))})
    if make is Attention:
        get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"])).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"may contain only factors of linear layers .* 'attention\.base_layer\.out_proj'"):
            read_adapter(tmp_path)
