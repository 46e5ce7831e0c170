"""An ordinary LoRA of peft's as a link, against peft itself; and what is no ordinary LoRA."""

import json
import sys

import pytest
import torch
from peft import IA3Config, LoKrConfig, LoraConfig, PeftModel, get_peft_model
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
SOME = {
    "mlp": ("2", "^0"),
    "llama": ("v_proj", r"^model\.layers\.[1-9]\..*q_proj"),
    "gpt2": ("attn.c_proj", r"h\.1\.attn\.c_(attn|proj)"),
}
KINDS = {
    "plain": lambda name, expression: {},
    "ranks": lambda name, expression: {"rank_pattern": {name: 5, expression: 2}},
    "alphas": lambda name, expression: {"alpha_pattern": {name: 5, expression: 11}},
    "root of the rank": lambda name, expression: {"use_rslora": True},
    "all of it": lambda name, expression: {
        "use_rslora": True, "rank_pattern": {name: 5}, "alpha_pattern": {expression: 5, name: 6}, "lora_dropout": 0.3,
        "init_lora_weights": "gaussian",
    },
}  # fmt: skip


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


def lora(folder, architecture, kind="plain", **fields):
    fields = {"r": 3, "lora_alpha": 7, "target_modules": BASES[architecture]} | KINDS[kind](*SOME[architecture]) | fields
    with_adapter(base_of(folder, architecture), folder / "peft", fan_in_fan_out=architecture == "gpt2", **fields)
    return PeftModel.from_pretrained(base_of(folder, architecture), folder / "peft")


def deltas(model):
    """peft's update of each layer, out x in."""
    layers = {name: part for name, part in model.base_model.model.named_modules() if hasattr(part, "get_delta_weight")}
    return {
        name: part.get_delta_weight("default").T if part.fan_in_fan_out else part.get_delta_weight("default")
        for name, part in layers.items()
    }


def difference(mine, theirs):
    return (mine - theirs).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", BASES)
def test_a_links_updates_are_pefts(tmp_path, architecture, kind):
    model = lora(tmp_path, architecture, kind)
    (link,) = read_adapter(tmp_path / "peft").links
    expected = deltas(model)
    assert link.factors.keys() == expected.keys()
    for name, delta in expected.items():
        assert difference(link.delta(name), delta) <= 1e-6
        assert delta.abs().max() > 1e-2
    largest = 5 if kind in ("ranks", "all of it") else 3
    assert {A.shape[0] for A, _ in link.factors.values()} == {B.shape[1] for _, B in link.factors.values()} == {largest}
    assert (link.rank, link.scaling, link.index, link.extras) == (largest, 1.0, 0, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_half_precision_are_scaled_in_float32_as_peft_does(tmp_path, dtype):
    lora(tmp_path, "llama", lora_alpha=10)
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    model = PeftModel.from_pretrained(base_of(tmp_path, "llama"), tmp_path / "peft")
    (link,) = read_adapter(tmp_path / "peft").links
    for name, delta in deltas(model).items():
        assert link.delta(name).dtype == torch.float32
        assert difference(link.delta(name), delta) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_module_that_begins_with_an_adapter_gives_pefts_logits_and_goes_on(tmp_path, architecture, kind):
    expected = tiny.logits(lora(tmp_path, architecture, kind))
    module = COLACausalLM(
        str(tmp_path / "base"), target_modules=BASES[architecture], rank=2, seed=0, init_chain=str(tmp_path / "peft")
    )
    assert difference(tiny.logits(module.merged_model(0)), expected) > 1e-2
    assert difference(tiny.logits(module.model), expected) <= 1e-5
    assert difference(tiny.logits(module.merged_model(1)), expected) <= 1e-5
    assert len(module.chain) == 1
    module.tie_knot()
    ids = torch.randint(2, 400, (2, 6))
    run = trainer(tmp_path, chain={"every_n_train_steps": 1}, max_steps=2, limit_val_batches=0)
    data = DataLoader([{"input_ids": ids, "labels": ids}] * 2, batch_size=None)
    run.fit(module, data, data)
    assert [link.rank for link in module.chain.links][1:] == [2, 2]
    assert module.live_link().norm() > 0
    assert difference(tiny.logits(module.model), tiny.logits(module.merged_model())) <= 1e-5


def test_a_plain_module_begins_with_an_adapter_too_and_leaves_with_it(tmp_path):
    model = lora(tmp_path, "mlp", "all of it")
    module = toy(init_chain=str(tmp_path / "peft"))
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
@pytest.mark.parametrize("is_same", [True, False])
def test_an_adapted_heads_own_weight_must_be_the_bases(tmp_path, is_same):
    expected = tiny.logits(lora(tmp_path, "llama", target_modules=["q_proj", "lm_head"]))
    path = tmp_path / "peft" / "adapter_model.safetensors"
    values, name = load_file(path), "base_model.model.lm_head.base_layer.weight"
    if not is_same:
        save_file(values | {name: values[name] + 1e-3}, path)
    adapter = {"init_chain": str(tmp_path / "peft")}
    module = COLACausalLM(str(tmp_path / "base"), target_modules=["q_proj", "lm_head"], rank=2, seed=0, **adapter)
    if is_same:
        module.configure_model()
        assert difference(tiny.logits(module.model), expected) <= 1e-5
        assert module.chain.links[0].extras == {}
    else:
        with pytest.raises(UserError, match=r"fully trained here \(model.modules_to_save\), received 'lm_head.weight'"):
            module.configure_model()


def test_a_layer_may_have_the_name_of_pefts_wrapped_one(tmp_path):
    lora(tmp_path, "llama", target_modules=["q_proj"])
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({name.replace("self_attn", "base_layer"): value for name, value in load_file(path).items()}, path)
    layers = read_adapter(tmp_path / "peft").layers
    assert layers
    assert all(name.endswith(".base_layer.q_proj") for name in layers)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft's, of this very difference
@pytest.mark.parametrize("are_equal", [True, False])
def test_tied_modules_that_peft_has_trained_apart_are_refused(tmp_path, are_equal):
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    base = AutoModelForCausalLM.from_pretrained(tiny.folder(tmp_path / "base", "opt"))
    model = with_adapter(base, tmp_path / "peft", r=3, target_modules=["q_proj"], **saved)
    if are_equal:
        path = tmp_path / "peft" / "adapter_model.safetensors"
        values = load_file(path)
        head = values["base_model.model.lm_head.weight"]
        save_file(values | {"base_model.model.model.decoder.embed_tokens.weight": head.clone()}, path)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    module = COLACausalLM(str(tmp_path / "base"), target_modules=["q_proj"], init_chain=str(tmp_path / "peft"), **saved)
    if are_equal:
        module.configure_model()
        assert difference(tiny.logits(module.model), tiny.logits(model)) <= 1e-5
    else:
        message = "expected one value for 'lm_head.weight' and '.*embed_tokens.weight', which are tied here, received two"
        with pytest.raises(UserError, match=message):
            module.configure_model()


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


def test_a_newer_releases_chain_is_refused(exported):
    _, _, folder = exported
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"cola_chain": json.dumps({"format_version": 5})})
    with pytest.raises(UserError, match=r"chain: expected format version 2 to 4, .* received 5 in .*adapter_model.safetensors"):
        read_chain(folder)


# ---------------------------------------------------------------------- what is refused

OTHERS = {
    "use_dora True": {"use_dora": True},
    "bias 'all'": {"bias": "all"},
    "bias 'lora_only'": {"bias": "lora_only"},
    "init_lora_weights 'pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights 'olora'": {"init_lora_weights": "olora"},
    "lora_bias True": {"lora_bias": True},
    r"trainable_token_indices \[3, 4\]": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")  # peft of its own lora_bias
@pytest.mark.parametrize("reason", OTHERS)
def test_what_is_more_than_a_lora_is_named(tmp_path, reason):
    base = base_of(tmp_path, "gpt2")  # with biases
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    with_adapter(base, tmp_path / "peft", **targets | OTHERS[reason])
    with pytest.raises(UserError, match=rf"^adapter: expected an ordinary LoRA in '.*peft', received one with {reason}$"):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize(("config", "kind"), [(LoKrConfig, "LOKR"), (IA3Config, "IA3")])
def test_another_method_of_pefts_is_named(tmp_path, config, kind):
    fields = {"feedforward_modules": []} if config is IA3Config else {}
    with_adapter(base_of(tmp_path, "llama"), tmp_path / "peft", config, target_modules=["q_proj"], **fields)
    with pytest.raises(UserError, match=rf"received one with peft_type '{kind}'$"):
        read_adapter(tmp_path / "peft")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_embeddings_factors_are_named(tmp_path):
    with_adapter(base_of(tmp_path, "llama"), tmp_path / "peft", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match=r"expected the factors of linear layers .*received 'model\.embed_tokens\.lora_emb"):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, (3, 2), padding=1), nn.Conv1d(3, 4, 5)], ids=["2d", "1d"])
def test_a_convolutions_factors_are_matrices_that_give_pefts_update(tmp_path, layer):
    base = nn.Sequential(layer)
    tuned = with_adapter(base, tmp_path / "peft", target_modules=["0"], r=2, lora_alpha=3)
    chain = read_adapter(tmp_path / "peft")
    expected = tuned.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(chain.delta("0").view_as(expected), expected)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_factors_of_grouped_convolutions_are_named(tmp_path):
    with_adapter(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), tmp_path / "peft", target_modules=["0"], r=2)
    with pytest.raises(UserError, match=r"expected the factors of linear layers and convolutions in .*received '0'"):
        read_adapter(tmp_path / "peft")


def test_weights_in_a_pickle_are_not_read(tmp_path):
    model = lora(tmp_path, "llama")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "adapter_model.bin").is_file()
    with pytest.raises(UserError, match=r"expected a whole LoRA of PEFT .*No such file"):
        read_adapter(tmp_path / "pickled")


def drop(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def keep(chosen):
    def keep_some(folder):
        path = folder / "adapter_model.safetensors"
        save_file({name: value for name, value in load_file(path).items() if chosen(name)}, path)

    return keep_some


DAMAGES = {
    "no configuration": (drop("adapter_config.json"), "received a file that cannot be read .*No such file"),
    "no tensors": (drop("adapter_model.safetensors"), "received a damaged one .*No such file"),
    "no json": (write("adapter_config.json", "{"), "received a file that cannot be read .*Expecting property name"),
    "a list": (write("adapter_config.json", "[]"), "received a file that cannot be read .*not a mapping"),
    "no adapter": (write("adapter_config.json", "{}"), "received one with peft_type None"),
    "truncated": (truncate, "received a damaged one"),
    "a factor alone": (
        keep(lambda name: "layers.0.self_attn.q_proj.lora_B" not in name),
        "received a damaged one .*q_proj.lora_B",
    ),
    "the other alone": (keep(lambda name: "layers.0.self_attn.q_proj.lora_A" not in name), "received '.*q_proj.lora_B"),
    "empty": (keep(lambda name: False), "the factors of linear layers .*received 'none'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_one_line(tmp_path, damage):
    lora(tmp_path, "llama")
    spoil, message = DAMAGES[damage]
    read_adapter(tmp_path / "peft")
    spoil(tmp_path / "peft")
    with pytest.raises(UserError, match=rf"^adapter: expected .*{message}") as error:
        read_adapter(tmp_path / "peft")
    assert "\n" not in str(error.value)


MISFITS = {
    "fewer layers": (
        {"target_modules": ["q_proj"]},
        {},
        "expected the chain's layers, received others, without 'model.*v_proj'",
    ),
    "more layers": (
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
        {},
        "expected the chain's layers, received others, with 'model.*k_proj'",
    ),
    "no links": ({"target_modules": None}, {}, "expected the chain's layers, received others, without"),
    "a head": ({}, {"modules_to_save": ["lm_head"]}, r"model\.init_chain: .*\(model\.modules_to_save\), received 'lm_head"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_a_module_is_one_line(tmp_path, misfit):
    arguments, fields, message = MISFITS[misfit]
    lora(tmp_path, "llama", **fields)
    arguments = {"target_modules": BASES["llama"], "init_chain": str(tmp_path / "peft")} | arguments
    with pytest.raises(UserError, match=message) as error:
        COLACausalLM(str(tmp_path / "base"), **arguments).configure_model()
    assert "\n" not in str(error.value)


def test_a_field_of_a_later_peft_that_is_set_is_named_and_one_that_is_not_is_no_matter(tmp_path):
    lora(tmp_path, "llama")
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text())
    whole = read_adapter(tmp_path / "peft")
    for value in (None, False, {}, [], 0):
        path.write_text(json.dumps(config | {"use_something": value}))
        assert read_adapter(tmp_path / "peft").links[0].is_same_update(whole.links[0])
    for value in (True, 1, "x", {"a": 1}):
        path.write_text(json.dumps(config | {"use_something": value}))
        with pytest.raises(UserError, match=r"received one with use_something "):
            read_adapter(tmp_path / "peft")


def test_without_peft_an_adapter_is_read_too(tmp_path, monkeypatch):
    lora(tmp_path, "llama")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert len(read_adapter(tmp_path / "peft")) == 1
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"velora_config": {"rank": 1}}))
    with pytest.raises(UserError, match=r"received one with velora_config "):
        read_adapter(tmp_path / "peft")


def test_a_rank_that_is_not_the_tensors_is_refused(tmp_path):
    lora(tmp_path, "llama")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 6}))
    with pytest.raises(UserError, match=r"received a damaged one .*rank of '.*layers.0.self_attn.q_proj' is 3, and not 6"):
        read_adapter(tmp_path / "peft")


def test_an_adapter_of_any_format_is_the_chain_that_it_was():
    """The folder was written by the release that began this format, of the links in ``chain-2``; it is never written again."""
    chain, adapter = (read_chain(FIXTURES / f"{kind}-2") for kind in ("chain", "adapter"))
    assert [vars(link).keys() for link in adapter.links] == [vars(link).keys() for link in chain.links]
    assert adapter.is_beginning_of(chain)
    assert len(adapter) == len(chain)
    assert_bit_equal(adapter.links[-1].extras, chain.links[-1].extras)
