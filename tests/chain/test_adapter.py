"""One link against peft's LoRA, the oracle that was not written here; and an ordinary adapter of peft's as a link."""

import copy
import json
import math

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cola_lightning import COLACausalLM, COLASequenceClassifier, LoRAConfig, UserError, inject_lora, lora_layers
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.peft import read_adapter
from tests.helpers import tiny
from tests.helpers.toy import difference, network, trainer

STEPPED = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
CONVOLUTIONS = {  # a network, its layers, and the shape of its images
    "2d": (network, ["0", "2", "4"], (4, 2, 8, 8)),
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3, padding="same"), nn.Flatten(1), nn.Linear(54, 5)), ["0", "2"], (4, 3, 9)),
}


@pytest.mark.parametrize("name", [*STEPPED, *CONVOLUTIONS])
def test_one_link_equals_pefts_lora_step_by_step(name, device):
    torch.manual_seed(0)
    build, targets, images = CONVOLUTIONS.get(name) or (tiny.config, STEPPED.get(name), None)
    ours = (build() if images else AutoModelForCausalLM.from_config(build(name))).to(device)
    options = {"target_modules": targets, "fan_in_fan_out": name == "gpt2", "lora_dropout": 0.0}
    theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=4, lora_alpha=8, **options))
    assert inject_lora(ours, LoRAConfig(targets, rank=4, alpha=8)) == targets or not images
    peft_modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for layer_name, layer in lora_layers(ours).items():
            layer.lora_A.copy_(peft_modules[layer_name].lora_A["default"].weight.flatten(1))
    for mine, other in tiny.losses_of_both(ours, theirs, 12, images):
        assert mine == pytest.approx(other, abs=1e-6 if device == "cpu" else 1e-4)
    assert any(layer.lora_B.any() for layer in lora_layers(ours).values())
    merged = theirs.merge_and_unload()
    for layer_name, layer in lora_layers(ours).items():
        layer.finish()
        tolerance = 1e-5 if device == "cpu" else 1e-3
        torch.testing.assert_close(layer.weight, merged.get_submodule(layer_name).weight, rtol=1e-4, atol=tolerance)


BASES = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "attn.c_proj"]}


def base_of(folder, architecture):
    return AutoModelForCausalLM.from_pretrained(tiny.folder(folder / "base", architecture))


def with_adapter(base, folder, config=LoraConfig, **fields):
    """Writes an adapter of peft's whose B are not zero, nor what else it holds."""
    model = get_peft_model(base, config(**fields))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_A." not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model


def lora(folder, architecture, config=LoraConfig, **fields):
    fields = {"r": 3, "lora_alpha": 7, "target_modules": BASES[architecture]} | fields
    fields |= {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    return with_adapter(base_of(folder, architecture), folder / "peft", config, **fields).eval()


def module_from(folder, architecture, **arguments):
    """A module that begins with the adapter."""
    options = {"target_modules": BASES[architecture], "rank": 2, "seed": 0, "init_chain": str(folder / "peft")}
    return COLACausalLM(str(folder / "base"), **options | arguments)


def edit(folder, **fields):
    """Changes an adapter's configuration."""
    path = folder / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, edited):
    path = folder / "peft" / "adapter_model.safetensors"
    save_file(edited(load_file(path)), path)


EXPRESSION = r"^model\.layers\.[1-9]\..*q_proj"  # for layers that are to be of other ranks and alphas than the rest
PATTERNS = {"rank_pattern": {"v_proj": 5, EXPRESSION: 2}, "alpha_pattern": {EXPRESSION: 5, "v_proj": 6}}
KINDS = {
    "all of it": ("llama", {"use_rslora": True, "lora_dropout": 0.3} | PATTERNS),
    "transposed": ("gpt2", {"rank_pattern": {"attn.c_proj": 5}, "alpha_pattern": {r"h\.1\.attn\.c_(attn|proj)": 5}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_begins_with_an_adapter_gives_pefts_logits_and_goes_on(tmp_path, kind):
    architecture, fields = KINDS[kind]
    model = lora(tmp_path, architecture, **fields)
    (link,) = read_adapter(tmp_path / "peft").links
    layers = {name: part for name, part in model.base_model.model.named_modules() if hasattr(part, "get_delta_weight")}
    assert sorted(link.factors) == sorted(layers)
    for name, part in layers.items():
        delta = part.get_delta_weight("default")
        assert difference(link.delta(name), delta.T if part.fan_in_fan_out else delta) <= 1e-6
    ranks = {name: (A.shape[0], B.shape[1]) for name, (A, B) in link.factors.items()}
    assert ranks == {name: (part.r["default"],) * 2 for name, part in layers.items()}
    assert (link.rank, link.index, link.extras) == (3, 0, {})

    expected, module = tiny.logits(model), module_from(tmp_path, architecture)
    assert difference(tiny.logits(module.merged_model(0)), expected) > 1e-2
    assert difference(tiny.logits(module.model), expected) <= 1e-5
    module.tie_knot()
    ids = torch.randint(2, 400, (2, 6))
    run = trainer(tmp_path, chain={"every_n_train_steps": 1}, max_steps=2, limit_val_batches=0)
    data = DataLoader([{"input_ids": ids, "labels": ids}] * 2, batch_size=None)
    run.fit(module, data, data)
    assert [link.rank for link in module.full_chain().links] == [3, 2, 2, 2]
    assert module.live_link().norm() > 0
    assert difference(tiny.logits(module.model), tiny.logits(module.merged_model())) <= 1e-5


def test_factors_in_half_precision_are_scaled_in_float32_as_peft_does(tmp_path):
    lora(tmp_path, "llama", lora_alpha=10)
    edit_tensors(tmp_path, lambda values: {name: value.bfloat16() for name, value in values.items()})
    model = PeftModel.from_pretrained(base_of(tmp_path, "llama"), tmp_path / "peft")
    assert difference(tiny.logits(module_from(tmp_path, "llama").model), tiny.logits(model)) <= 1e-5


def test_an_exported_chain_goes_on_here_and_in_peft_as_one_link(tmp_path):
    name = tiny.folder(tmp_path / "base", "bert", "AutoModel")
    options = {"target_modules": ["query"], "rank": 4, "num_labels": 3, "seed": 0}
    module = tiny.three_links(COLASequenceClassifier(name, **options))
    module.export(tmp_path / "peft", "peft")
    begun = COLASequenceClassifier(name, init_chain=str(tmp_path / "peft"), **options)
    assert difference(tiny.logits(begun.model), tiny.logits(module.model)) <= 1e-5
    model = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft", is_trainable=True)
    model.save_pretrained(tmp_path / "on")
    (link,) = read_chain(tmp_path / "on").links
    assert link.rank == 9


def test_a_head_comes_along(tmp_path):
    name = tiny.folder(tmp_path / "base", "roberta", "AutoModel")
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=3)
    fields = {"task_type": "SEQ_CLS", "r": 3, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = with_adapter(base, tmp_path / "peft", **fields)
    module = COLASequenceClassifier(name, num_labels=3, target_modules=["query", "value"], init_chain=str(tmp_path / "peft"))
    assert difference(tiny.logits(module.model), tiny.logits(model)) <= 1e-5


def times(factor, part):
    return lambda folder: edit_tensors(
        folder, lambda values: {name: value * factor if part in name else value for name, value in values.items()}
    )


def without(part):
    return lambda folder: edit_tensors(folder, lambda values: {name: values[name] for name in values if part not in name})


REFUSED = {
    "another type": (lambda folder: lora_of(folder, LoKrConfig), "peft_type 'LOKR'"),
    "more than a LoRA": (lambda folder: lora_of(folder, use_dora=True), "use_dora True"),
    "an embedding": (lambda folder: lora_of(folder, target_modules=["embed_tokens"]), r"'model\.embed_tokens\.lora_emb"),
    "a field of a later peft": (lambda folder: edit(folder, use_something={"a": 1}), "use_something "),
    "a factor alone": (without("layers.0.self_attn.q_proj.lora_B"), r"q_proj\.lora_B"),
}


def lora_of(folder, config=LoraConfig, target_modules=("q_proj",), **fields):
    with_adapter(base_of(folder, "llama"), folder / "peft", config, target_modules=list(target_modules), **fields)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_whole_ordinary_lora_is_named_in_one_line(tmp_path, reason):
    lora(tmp_path, "llama")
    edit(tmp_path, use_something=None)  # a field that is not set is no matter
    assert len(read_adapter(tmp_path / "peft")) == 1
    spoil, message = REFUSED[reason]
    spoil(tmp_path)
    with pytest.raises(UserError, match=rf"^adapter: .*{message}.*$"):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: edit(folder, lora_alpha=math.nan), "q_proj"),
        (times(math.inf, "v_proj"), "v_proj"),
        (times(math.nan, "lm_head"), "lm_head"),
    ],
    ids=["alpha", "a factor", "a head"],
)
def test_an_adapter_or_chain_with_values_that_are_not_finite_is_refused(tmp_path, spoil, named):
    lora(tmp_path, "llama", modules_to_save=["lm_head"])
    spoil(tmp_path)
    chain, folders = read_adapter(tmp_path / "peft"), ["peft"]
    if math.isfinite(chain[0].alpha):
        chain.save(tmp_path / "chain")
        folders.append("chain")
    for folder in folders:
        with pytest.raises(UserError, match=rf"^model\.init_chain: .*{folder}.* NaN or infinite.*{named}"):
            read_chain(tmp_path / folder, field="model.init_chain")


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]}, {}, "layers of the chain, .*'model.*v_proj'"),
        ({}, {"modules_to_save": ["lm_head"]}, r"model\.init_chain: .*'lm_head.*\(model\.modules_to_save\)"),
    ],
    ids=["a layer that is trained whole", "a head"],
)
def test_an_adapter_that_does_not_fit_a_module_is_refused(tmp_path, arguments, fields, message):
    lora(tmp_path, "llama", **fields)
    with pytest.raises(UserError, match=message):
        module_from(tmp_path, "llama", **arguments).configure_model()
