"""An ordinary LoRA of peft's as a link, against peft itself; and what is no ordinary LoRA."""

import json
import sys

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cola_lightning import COLACausalLM, COLASequenceClassifier, UserError
from cola_lightning.chain import Chain
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.peft import read_adapter
from cola_lightning.cli import main
from cola_lightning.export.module import export_module
from cola_lightning.export.verify import ExportOptions
from tests import tiny
from tests.make_fixture import FIXTURES
from tests.toy import assert_bit_equal, batches, toy, trainer

# peft 0.21 asks each transformers model for it; transformers 5.24 deprecates it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

BASES = {"mlp": ["0", "2"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "attn.c_proj"]}
# A name and an expression in each, for layers that are to be of other ranks and alphas than the rest.


def base_of(folder, architecture):
    if architecture != "mlp":
        return AutoModelForCausalLM.from_pretrained(tiny.folder(folder / "base", architecture))
    return toy().merged_model(0)


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


def lora(folder, architecture, **fields):
    fields = {"r": 3, "lora_alpha": 7, "target_modules": BASES[architecture]} | fields
    with_adapter(base_of(folder, architecture), folder / "peft", fan_in_fan_out=architecture == "gpt2", **fields)
    return PeftModel.from_pretrained(base_of(folder, architecture), folder / "peft")


def edit(folder, **fields):
    """Changes an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tensors(folder, edited):
    """Changes an adapter's tensors."""
    path = folder / "adapter_model.safetensors"
    save_file(edited(load_file(path)), path)


def deltas(model):
    """peft's update of each layer, out x in."""
    layers = {name: part for name, part in model.base_model.model.named_modules() if hasattr(part, "get_delta_weight")}
    return {
        name: part.get_delta_weight("default").T if part.fan_in_fan_out else part.get_delta_weight("default")
        for name, part in layers.items()
    }


def difference(mine, theirs):
    return (mine - theirs).abs().max().item()


EXPRESSION = r"^model\.layers\.[1-9]\..*q_proj"
KINDS = {
    "plain": ("llama", {}),
    "ranks": ("llama", {"rank_pattern": {"v_proj": 5, EXPRESSION: 2}}),
    "alphas": ("llama", {"alpha_pattern": {"v_proj": 5, EXPRESSION: 11}}),
    "root of the rank": ("llama", {"use_rslora": True}),
    "transposed": ("gpt2", {"rank_pattern": {"attn.c_proj": 5}, "alpha_pattern": {r"h\.1\.attn\.c_(attn|proj)": 5}}),
    "all of it": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {EXPRESSION: 5, "v_proj": 6}, "lora_dropout": 0.3},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_begins_with_an_adapter_gives_pefts_logits_and_goes_on(tmp_path, kind):
    architecture, fields = KINDS[kind]
    model = lora(tmp_path, architecture, **fields)
    (link,) = read_adapter(tmp_path / "peft").links
    expected = deltas(model)
    assert link.factors.keys() == expected.keys()
    for name, delta in expected.items():
        assert difference(link.delta(name), delta) <= 1e-6
        assert delta.abs().max() > 1e-2
    largest = 5 if "rank_pattern" in fields else 3
    assert {A.shape[0] for A, _ in link.factors.values()} == {B.shape[1] for _, B in link.factors.values()} == {largest}
    assert (link.rank, link.scaling, link.index, link.extras) == (largest, 1.0, 0, {})

    expected, begin = tiny.logits(model), {"init_chain": str(tmp_path / "peft")}
    module = COLACausalLM(str(tmp_path / "base"), target_modules=BASES[architecture], rank=2, seed=0, **begin)
    assert difference(tiny.logits(module.merged_model(0)), expected) > 1e-2
    assert difference(tiny.logits(module.model), expected) <= 1e-5
    assert difference(tiny.logits(module.merged_model(1)), expected) <= 1e-5
    module.tie_knot()
    ids = torch.randint(2, 400, (2, 6))
    run = trainer(tmp_path, chain={"every_n_train_steps": 1}, max_steps=2, limit_val_batches=0)
    data = DataLoader([{"input_ids": ids, "labels": ids}] * 2, batch_size=None)
    run.fit(module, data, data)
    assert [link.rank for link in module.chain.links][1:] == [2, 2]
    assert module.live_link().norm() > 0
    assert difference(tiny.logits(module.model), tiny.logits(module.merged_model())) <= 1e-5


def test_factors_in_half_precision_are_scaled_in_float32_as_peft_does(tmp_path):
    lora(tmp_path, "llama", lora_alpha=10)
    tensors(tmp_path / "peft", lambda values: {name: value.bfloat16() for name, value in values.items()})
    model = PeftModel.from_pretrained(base_of(tmp_path, "llama"), tmp_path / "peft")
    (link,) = read_adapter(tmp_path / "peft").links
    for name, delta in deltas(model).items():
        assert link.delta(name).dtype == torch.float32
        assert difference(link.delta(name), delta) <= 1e-6


def test_a_plain_module_begins_with_an_adapter_too_and_leaves_with_it(tmp_path, monkeypatch):
    model = lora(tmp_path, "mlp", use_rslora=True, rank_pattern={"2": 5})
    module = toy(init_chain=str(tmp_path / "peft"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)  # which nothing needs to read one
        module.configure_model()
    x = torch.randn(4, 8)
    torch.testing.assert_close(module.model(x), model(x), rtol=0, atol=1e-5)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "end.ckpt")
    words = ["--checkpoint", str(tmp_path / "end.ckpt"), "--format", "peft", "--output", str(tmp_path / "again")]
    assert main(["export", *words]) == 0
    again = PeftModel.from_pretrained(toy().merged_model(0), tmp_path / "again")
    torch.testing.assert_close(again(x), module.model.eval()(x), rtol=0, atol=1e-5)
    assert [link.rank for link in read_chain(tmp_path / "again").links] == [5, 2]


def test_a_head_comes_along(tmp_path):
    name = tiny.folder(tmp_path / "base", "roberta", "AutoModel")
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=3)
    fields = {"task_type": "SEQ_CLS", "r": 3, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = with_adapter(base, tmp_path / "peft", **fields)
    module = COLASequenceClassifier(name, num_labels=3, target_modules=["query", "value"], init_chain=str(tmp_path / "peft"))
    module.configure_model()
    assert difference(tiny.logits(module.model), tiny.logits(model)) <= 1e-5
    assert sorted(read_adapter(tmp_path / "peft").links[0].extras) == [
        f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("bias", "weight")
    ]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_adapted_heads_own_weight_must_be_the_bases(tmp_path):
    expected = tiny.logits(lora(tmp_path, "llama", target_modules=["q_proj", "lm_head"]))
    how = {"target_modules": ["q_proj", "lm_head"], "rank": 2, "seed": 0, "init_chain": str(tmp_path / "peft")}
    module = COLACausalLM(str(tmp_path / "base"), **how)
    module.configure_model()
    assert difference(tiny.logits(module.model), expected) <= 1e-5
    assert module.chain.links[0].extras == {}
    name = "base_model.model.lm_head.base_layer.weight"
    tensors(tmp_path / "peft", lambda values: values | {name: values[name] + 1e-3})
    with pytest.raises(UserError, match=r"fully trained here \(model.modules_to_save\), received 'lm_head.weight'"):
        COLACausalLM(str(tmp_path / "base"), **how).configure_model()


def test_a_layer_may_have_the_name_of_pefts_wrapped_one(tmp_path):
    lora(tmp_path, "llama", target_modules=["q_proj"])
    tensors(tmp_path / "peft", lambda old: {name.replace("self_attn", "base_layer"): value for name, value in old.items()})
    layers = read_adapter(tmp_path / "peft").layers
    assert layers
    assert all(name.endswith(".base_layer.q_proj") for name in layers)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft's, of this very difference
def test_tied_modules_that_peft_has_trained_apart_are_refused(tmp_path):
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]}
    base = AutoModelForCausalLM.from_pretrained(tiny.folder(tmp_path / "base", "opt"))
    with_adapter(base, tmp_path / "peft", r=3, target_modules=["q_proj"], **whole)
    how = {"target_modules": ["q_proj"], "init_chain": str(tmp_path / "peft"), **whole}
    with pytest.raises(UserError, match=r"'lm_head.weight' and '.*embed_tokens.weight', which are tied here"):
        COLACausalLM(str(tmp_path / "base"), **how).configure_model()
    head, tokens = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.decoder.embed_tokens"))
    tensors(tmp_path / "peft", lambda values: values | {tokens: values[head].clone()})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    module = COLACausalLM(str(tmp_path / "base"), **how)
    module.configure_model()
    assert difference(tiny.logits(module.model), tiny.logits(model)) <= 1e-5


# ---------------------------------------------------------------------- a chain that was exported as one adapter


@pytest.fixture(params=["llama", "roberta"])
def exported(request, tmp_path):
    """A module with three links, two of which say when they were made and how well, and its adapter's folder."""
    how = {"target_modules": tiny.targets(request.param), "rank": 4, "alpha": 6, "seed": 0}
    if request.param == "roberta":
        module = COLASequenceClassifier(tiny.folder(tmp_path / "base", "roberta", "AutoModel"), num_labels=3, **how)
    else:
        module = COLACausalLM(tiny.folder(tmp_path / "base"), **how)
    tiny.three_links(module)
    facts = [{"start_step": 0, "end_step": 7, "metrics": {"val_loss": 0.5}}, {"start_step": 7, "end_step": 9}, {}]
    links = [type(link)(**vars(link) | fact) for link, fact in zip(module.full_chain().links, facts, strict=True)]
    chain = Chain(links, module.chain.base)
    export_module(module, chain, ExportOptions(tmp_path / "peft", "peft"), module.adapted)
    return module, chain, tmp_path / "peft"


def test_it_is_that_chain_again(exported):
    _, chain, folder = exported
    again = read_chain(folder)
    assert again.base == chain.base
    assert again.layers == chain.layers
    for mine, theirs in zip(again.links, chain.links, strict=True):
        facts = ("index", "rank", "alpha", "start_step", "end_step", "metrics")
        assert [getattr(mine, name) for name in facts] == [getattr(theirs, name) for name in facts]
        for name in chain.layers:
            assert difference(mine.delta(name), theirs.delta(name)) <= 1e-6
    assert again.links[-1].extras.keys() == chain.links[-1].extras.keys()
    for name, value in chain.links[-1].extras.items():
        assert torch.equal(again.links[-1].extras[name], value)


@pytest.mark.parametrize("links", [None, 1, 2])
def test_a_module_begins_with_its_first_links(exported, links, caplog):
    module, chain, folder = exported
    cls, how = type(module), module.constructor_arguments["init_args"]
    begun = cls(**how, init_chain=str(folder), init_links=links)
    begun.configure_model()
    assert len(begun.chain) == (3 if links is None else links)
    expected = module.merged_model(links)
    is_partial = links is not None and bool(chain.links[-1].extras)
    assert ("trained modules alone" in caplog.text) == is_partial
    if links is not None:  # an adapter holds the last head alone
        expected.load_state_dict({name: begun.model.state_dict()[name] for name in begun.adapted.extras()}, strict=False)
    assert difference(tiny.logits(begun.model), tiny.logits(expected)) <= 1e-5


def test_peft_may_train_it_on_and_then_it_is_one_link(exported):
    module, _, folder = exported
    model = PeftModel.from_pretrained(module.merged_model(0), folder, is_trainable=True)
    model.save_pretrained(folder.parent / "on")
    (link,) = read_chain(folder.parent / "on").links
    assert link.rank == 9
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"cola_chain": json.dumps({"format_version": 5})})
    with pytest.raises(UserError, match=r"chain: expected format version 2 to 4, .* received 5 in .*adapter_model.safetensors"):
        read_chain(folder)


# ---------------------------------------------------------------------- what is refused

OTHERS = {
    "use_dora True": (LoraConfig, {"use_dora": True}),
    "bias 'all'": (LoraConfig, {"bias": "all"}),
    "init_lora_weights 'olora'": (LoraConfig, {"init_lora_weights": "olora"}),
    r"trainable_token_indices \[3, 4\]": (LoraConfig, {"trainable_token_indices": [3, 4]}),
    "peft_type 'LOKR'": (LoKrConfig, {}),
    "'model.embed_tokens.lora_emb": (LoraConfig, {"target_modules": ["embed_tokens"]}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("reason", OTHERS)
def test_what_is_more_than_a_lora_is_named(tmp_path, reason):
    config, fields = OTHERS[reason]
    base = base_of(tmp_path, "llama")
    with_adapter(base, tmp_path / "peft", config, **{"target_modules": ["q_proj"]} | fields)
    with pytest.raises(UserError, match=rf"^adapter: .*received .*{reason}"):
        read_adapter(tmp_path / "peft")


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, (3, 2), padding=1), nn.Conv1d(4, 4, 5), nn.Conv2d(4, 4, 3, groups=2)])
def test_a_convolutions_factors_are_matrices_that_give_pefts_update(tmp_path, layer):
    tuned = with_adapter(nn.Sequential(layer), tmp_path / "peft", target_modules=["0"], r=2, lora_alpha=3)
    if layer.groups > 1:
        with pytest.raises(UserError, match=r"adapter: .*received '0'"):
            read_adapter(tmp_path / "peft")
        return
    expected = tuned.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(read_adapter(tmp_path / "peft").delta("0").view_as(expected), expected)


def test_weights_in_a_pickle_are_not_read(tmp_path):
    model = lora(tmp_path, "llama")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "adapter_model.bin").is_file()
    with pytest.raises(UserError, match=r"expected a whole LoRA of PEFT .*No such file"):
        read_adapter(tmp_path / "pickled")


def without(part):
    return lambda folder: tensors(folder, lambda values: {name: value for name, value in values.items() if part not in name})


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "No such file"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "damaged one .*No such file"),
    "no json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "cannot be read"),
    "no adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "peft_type None"),
    "truncated": (truncate, "damaged one"),
    "a factor alone": (without("layers.0.self_attn.q_proj.lora_B"), "damaged one .*q_proj.lora_B"),
    "the other alone": (without("layers.0.self_attn.q_proj.lora_A"), "'.*q_proj.lora_B"),
    "empty": (without(""), "'none'"),
    "another rank": (lambda folder: edit(folder, r=6), "damaged one .*'.*q_proj' is 3, and not 6"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_one_line(tmp_path, damage):
    lora(tmp_path, "llama")
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "peft")
    with pytest.raises(UserError, match=rf"^adapter: expected .*received .*{message}") as error:
        read_adapter(tmp_path / "peft")
    assert "\n" not in str(error.value)


MISFITS = {
    "fewer layers": ({"target_modules": ["q_proj"]}, {}, "the chain's layers, .*without 'model.*v_proj'"),
    "more layers": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, {}, "the chain's layers, .*with 'model.*k_proj'"),
    "no links": ({"target_modules": None}, {}, "the chain's layers"),
    "a head": ({}, {"modules_to_save": ["lm_head"]}, r"model\.init_chain: .*\(model\.modules_to_save\), received 'lm_head"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_a_module_is_refused(tmp_path, misfit):
    arguments, fields, message = MISFITS[misfit]
    lora(tmp_path, "llama", **fields)
    arguments = {"target_modules": BASES["llama"], "init_chain": str(tmp_path / "peft")} | arguments
    with pytest.raises(UserError, match=message):
        COLACausalLM(str(tmp_path / "base"), **arguments).configure_model()


def test_a_field_of_a_later_peft_that_is_set_is_named_and_one_that_is_not_is_no_matter(tmp_path):
    lora(tmp_path, "llama")
    whole = read_adapter(tmp_path / "peft")
    for value in (None, False, {}, [], 0):
        edit(tmp_path / "peft", use_something=value)
        assert read_adapter(tmp_path / "peft").links[0].is_same_update(whole.links[0])
    for value in (True, 1, "x", {"a": 1}):
        edit(tmp_path / "peft", use_something=value)
        with pytest.raises(UserError, match=r"received one with use_something "):
            read_adapter(tmp_path / "peft")


def test_an_adapter_of_any_format_is_the_chain_that_it_was():
    """The folder was written by the release that began this format, of the links in ``chain-2``; it is never written again."""
    chain, adapter = (read_chain(FIXTURES / f"{kind}-2") for kind in ("chain", "adapter"))
    assert [vars(link).keys() for link in adapter.links] == [vars(link).keys() for link in chain.links]
    assert adapter.is_beginning_of(chain)
    assert len(adapter) == len(chain)
    assert_bit_equal(adapter.links[-1].extras, chain.links[-1].extras)
