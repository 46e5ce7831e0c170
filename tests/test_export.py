"""An export gives the module's logits under plain transformers and under peft, and is there whole or not at all."""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel, inject_adapter_in_model
from safetensors.torch import load, load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from benchmarks.digits_model import COLADigits
from cola_lightning import (
    AdaptedModel,
    Chain,
    COLACausalLM,
    COLAModule,
    COLASequenceClassifier,
    UserError,
    lora_layers,
)
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli import main
from cola_lightning.errors import ExportError
from cola_lightning.export import adapter, verify
from cola_lightning.export import module as export
from cola_lightning.export.verify import ReferenceLogits, reference_logits
from cola_lightning.hub import quiet
from cola_lightning.weights import deep_copy
from tests import tiny
from tests.toy import Toy, assert_bit_equal, batches, toy, trainer, weights

# peft 0.21 asks each transformers model for it; transformers 5.24 deprecates it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

CAUSAL = ["opt", "llama", "gpt2", "qwen3", "gpt_neox", "phi3"]
CLASSIFIERS = ["roberta", "bert"]
RANKS = [4, 2, 3]


def module_of(folder, architecture, **arguments):
    """A module on a tiny model that lies in the folder; a classifier's has no head yet."""
    arguments = {"target_modules": tiny.targets(architecture), "rank": 4, "alpha": 6, "seed": 0} | arguments
    if architecture in CLASSIFIERS:
        return COLASequenceClassifier(tiny.folder(folder, architecture, "AutoModel"), num_labels=3, **arguments)
    return COLACausalLM(tiny.folder(folder, architecture), **arguments)


def difference(mine, theirs):
    return (mine - theirs).abs().max().item()


def contents(folder):
    """All that is in a folder, hidden files too, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Exported:
    """A module with three links, its exports, and how others load them."""

    architecture: str
    folder: Path
    module: Any
    merged_says: str
    adapter_says: list[str]

    @property
    def is_classifier(self):
        return self.architecture in CLASSIFIERS

    def load(self, name, **arguments):
        kind = "SequenceClassification" if self.is_classifier else "CausalLM"
        arguments |= {"num_labels": 3} if self.is_classifier and name == "base" else {}
        return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(self.folder / name, **arguments)


@pytest.fixture(scope="module", params=CAUSAL + CLASSIFIERS)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    module = tiny.three_links(module_of(folder / "base", request.param))
    (says,) = module.export(folder / "merged")
    return Exported(request.param, folder, module, says, module.export(folder / "peft", "peft"))


# ---------------------------------------------------------------------- merged


def test_plain_transformers_gives_the_modules_logits(exported):
    model, info = exported.load("merged", output_loading_info=True)
    assert {name: len(keys) for name, keys in info.items()} == dict.fromkeys(info, 0)
    assert {"missing_keys", "unexpected_keys"} <= info.keys()
    assert difference(tiny.logits(model), tiny.logits(exported.module.model)) <= 1e-5
    assert difference(tiny.logits(model), tiny.logits(exported.load("base"))) > 1e-2
    assert exported.merged_says.startswith("loaded again, its logits differ from the module's by at most ")


def test_weights_are_tied_where_the_bases_are(exported):
    def tied(model):
        names = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return sorted(group for group in names.values() if len(group) > 1)

    groups = tied(exported.load("merged"))
    assert groups == tied(exported.load("base"))
    assert len(groups) == (exported.architecture in ("opt", "gpt2"))


def test_tokenizer_and_generation_config_come_along(exported):
    base, merged = exported.folder / "base", exported.folder / "merged"
    ours, theirs = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(base)
    assert [ours(text)["input_ids"] for text in tiny.TEXT] == [theirs(text)["input_ids"] for text in tiny.TEXT]
    if exported.is_classifier:
        assert not (merged / "generation_config.json").exists()
        return
    assert GenerationConfig.from_pretrained(merged).to_diff_dict() == GenerationConfig.from_pretrained(base).to_diff_dict()
    inputs = ours("The cat sat", return_tensors="pt")
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    expected = exported.module.merged_model().eval().generate(inputs["input_ids"], **how)
    assert torch.equal(exported.load("merged").generate(inputs["input_ids"], **how), expected)
    assert ours.decode(expected[0], skip_special_tokens=True).startswith("The cat sat")


def test_half_precision_is_rounded_and_the_configuration_says_so(tmp_path):
    module = tiny.three_links(module_of(tmp_path / "base", "llama"))
    (says,) = module.export(tmp_path / "half", dtype="bfloat16")
    assert says.startswith("loaded again, its logits differ")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = {name: value.bfloat16() for name, value in module.merged_model().state_dict().items()}
    assert_bit_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict(), rounded)
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_what_was_trained_in_half_precision_may_leave_in_float32(tmp_path):
    module = module_of(tmp_path / "base", "llama", target_modules=None, dtype="bfloat16")
    module.export(tmp_path / "merged", dtype="float32")
    expected = {name: value.float() for name, value in module.merged_model().state_dict().items()}
    assert_bit_equal(load_file(tmp_path / "merged" / "model.safetensors"), expected)


def test_weights_that_overflow_in_half_precision_are_not_kept(tmp_path):
    module = tiny.three_links(module_of(tmp_path / "base", "llama"))
    with torch.no_grad():
        module.model.model.layers[0].mlp.up_proj.weight.mul_(1e7)
    with pytest.raises(ExportError, match="its logits differ from the module's by at most nan"):
        module.export(tmp_path / "half", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# ---------------------------------------------------------------------- one PEFT adapter


def test_peft_gives_the_modules_logits_and_so_does_its_merge(exported):
    expected = tiny.logits(exported.module.model)
    without_links = exported.module.merged_model(0)
    without_links.load_state_dict(exported.module.live_link().extras, strict=False)
    assert difference(tiny.logits(without_links), expected) > 1e-2
    model = PeftModel.from_pretrained(exported.load("base"), exported.folder / "peft")
    assert difference(tiny.logits(model), expected) <= 1e-5
    merged = model.merge_and_unload()
    assert type(merged) is type(without_links)
    assert difference(tiny.logits(merged), expected) <= 1e-5


def test_the_adapter_is_of_the_ranks_sum_and_scaled_by_one(exported):
    config = json.loads((exported.folder / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == sum(RANKS)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert sorted(config["target_modules"]) == sorted(tiny.targets(exported.architecture))
    assert config["modules_to_save"] == (["classifier"] if exported.is_classifier else None)
    assert config["fan_in_fan_out"] == (exported.architecture == "gpt2")
    assert config["task_type"] == ("SEQ_CLS" if exported.is_classifier else "CAUSAL_LM")
    assert (config["base_model_name_or_path"], config["revision"]) == (str(exported.folder / "base"), None)
    rank, base, last = exported.adapter_says
    assert rank == "one adapter of rank 9"
    assert base.startswith(
        f"its base: transformers.{exported.module.auto_class}.from_pretrained('{exported.folder / 'base'}', "
    )
    assert last.startswith("loaded again with peft, its logits differ from the module's by at most ")


@pytest.mark.parametrize(
    ("layers", "others", "expected"),
    [
        (["0.q", "1.q", "0.v"], [], {"q", "v"}),
        (["0.q"], ["1.q"], r"0\.q"),
        (["fc", "b.fc"], [], {"fc"}),
        (["fc"], ["b.fc"], "fc"),
        (["fc", "a.fc"], ["b.a.fc"], r"fc|a\.fc"),
    ],
)
def test_targets_are_named_as_shortly_as_peft_allows(layers, others, expected):
    base = nn.Module()
    for name in layers + others:
        *parents, child = name.split(".")
        place = base
        for parent in parents:
            if not hasattr(place, parent):
                place.register_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.register_module(child, nn.Linear(4, 4))
    config = adapter.peft_config(adapter.AdapterBase(base, "base", (), ""), layers, 2)
    assert config.target_modules == expected
    adapted = inject_adapter_in_model(config, base)
    assert sorted(name for name, part in adapted.named_modules() if hasattr(part, "lora_A")) == sorted(layers)


@pytest.mark.parametrize(
    ("architecture", "target_modules"),
    [("roberta", "all-linear"), ("llama", r"model\.layers\.1\..*_proj"), ("gpt2", "all-linear")],
)
def test_targets_whose_short_names_others_have_too_are_adapted_alone(tmp_path, architecture, target_modules):
    module = tiny.three_links(module_of(tmp_path / "base", architecture, target_modules=target_modules))
    module.export(tmp_path / "peft", "peft")
    loaded = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")
    layers = [name for name, part in loaded.base_model.model.named_modules() if hasattr(part, "lora_A")]
    assert sorted(layers) == sorted(module.chain.layers)
    assert difference(tiny.logits(loaded), tiny.logits(module.model)) <= 1e-5


# ---------------------------------------------------------------------- recompression


@pytest.mark.parametrize("rank", [1, 3, 5, 7])
@pytest.mark.parametrize(("n_in", "n_out"), [(20, 12), (12, 20), (4, 20), (20, 3)])
def test_compression_is_the_truncated_svd_of_the_full_update(n_in, n_out, rank):
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = (torch.randn(shape, generator=generator) for shape in ((7, n_in), (n_out, 7)))
    u, values, v = torch.linalg.svd(lora_B.double() @ lora_A.double(), full_matrices=False)
    closest = u[:, :rank] * values[:rank] @ v[:rank]
    small_A, small_B, error = adapter.compress(lora_A, lora_B, rank)
    assert (small_A.shape, small_B.shape) == ((rank, n_in), (n_out, rank))
    torch.testing.assert_close(small_B.double() @ small_A.double(), closest, rtol=1e-5, atol=1e-5)
    assert error == pytest.approx((values[rank:].norm() / values.norm()).item(), abs=1e-12)


def test_a_zero_update_is_compressed_without_an_error():
    small_A, small_B, error = adapter.compress(torch.randn(4, 6), torch.zeros(5, 4), 2)
    assert (small_A.shape, small_B.shape, error) == ((2, 6), (5, 2), 0.0)
    assert not (small_B @ small_A).any()


@pytest.mark.parametrize("max_rank", [1, 5])
def test_a_recompressed_adapter_holds_the_closest_update_and_says_how_far_it_is(tmp_path, max_rank):
    module = tiny.three_links(module_of(tmp_path / "base", "gpt2"))
    says = module.export(tmp_path / "peft", "peft", max_rank=max_rank)
    chain, closest = module.full_chain(), module.merged_model(0)
    for name, line in zip(chain.layers, says[:-3], strict=True):
        update = chain.delta(name).double()
        u, values, v = torch.linalg.svd(update, full_matrices=False)
        nearest = u[:, :max_rank] * values[:max_rank] @ v[:max_rank]
        label, _, error = line.partition(": relative error ")
        assert (label, float(error)) == (name, pytest.approx(((update - nearest).norm() / update.norm()).item(), rel=1e-2))
        with torch.no_grad():
            closest.get_submodule(name).weight.add_(nearest.T)
    assert says[-3] == f"one adapter of rank {max_rank}"
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max_rank
    loaded = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")
    assert difference(tiny.logits(loaded), tiny.logits(closest)) <= 1e-5
    assert len(read_chain(tmp_path / "peft")) == 1  # it is the chain no longer


@pytest.mark.parametrize("max_rank", [9, 100])
def test_a_rank_that_is_large_enough_changes_nothing(tmp_path, max_rank):
    module = tiny.three_links(module_of(tmp_path / "base", "llama"))
    assert module.export(tmp_path / "plain", "peft") == module.export(tmp_path / "peft", "peft", max_rank=max_rank)
    plain, peft = contents(tmp_path / "plain"), contents(tmp_path / "peft")
    assert plain["adapter_config.json"] == peft["adapter_config.json"]
    assert_bit_equal(load(plain["adapter_model.safetensors"]), load(peft["adapter_model.safetensors"]))


def test_a_layer_may_be_smaller_than_the_rank(tmp_path):
    module = module_of(tmp_path / "base", "llama", rank=16)
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # v_proj has 16 outputs, and the chain is of rank 32
        for layer in lora_layers(module.model).values():
            with torch.no_grad():
                layer.lora_B.normal_(generator=generator)
        module.tie_knot()
    says = module.export(tmp_path / "peft", "peft", max_rank=24)
    errors = {line.partition(":")[0].rpartition(".")[2]: float(line.rpartition(" ")[2]) for line in says[:-3]}
    assert errors["v_proj"] < 1e-6
    assert errors["q_proj"] > 1e-2
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    ].shape == (24, 32)


# ---------------------------------------------------------------------- modules that are not Hugging Face's


class TiedToy(Toy):
    """One weight under two names, neither of which is adapted, and a batch norm."""

    def build_model(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8), nn.Linear(8, 6))
        model.append(nn.Linear(6, 8)).append(nn.Linear(8, 6))
        model[6].weight = model[4].weight
        return model


class ExampleToy(Toy):
    """A toy that shows what it takes."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.example_input_array = torch.ones(3, 8)


class LossToy(Toy):
    """A toy with an argument that is not plain."""

    def __init__(self, loss=None, **arguments):
        super().__init__(**arguments)


def trained_toy(path, module, **arguments):
    """The module and its checkpoint after three links of two steps."""
    dtype = torch.float64 if arguments.get("precision") == "64-true" else torch.float32
    run = trainer(path, chain={"every_n_train_steps": 2}, max_steps=6, **arguments)
    run.fit(module, batches(dtype=dtype))
    run.save_checkpoint(path / "end.ckpt", weights_only=False)
    return path / "end.ckpt"


def command(*words):
    return main(["export", *map(str, words)])


@pytest.mark.parametrize("cls", [Toy, TiedToy])
def test_a_plain_modules_export_is_a_state_dict(tmp_path, capsys, cls):
    module = toy(cls, target_modules=["0"])
    path = trained_toy(tmp_path, module)
    assert command("--checkpoint", path, "--format", "merged", "--output", tmp_path / "merged") == 0
    assert capsys.readouterr().out.splitlines() == [
        "loaded again, the weights are the same to the bit; no logits were compared, for no input is known",
        f"written: {tmp_path / 'merged'}",
    ]
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model.safetensors"]
    plain = cls().build_model()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert_bit_equal(plain.state_dict(), module.merged_model().state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(plain.eval()(x), module.model.eval()(x), rtol=0, atol=1e-6)
    assert difference(plain(x), module.merged_model(0).eval()(x)) > 1e-3


class Turned(nn.Module):
    """A buffer of complex numbers, as of rotary embeddings."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(8, 12), nn.Linear(12, 6)
        self.register_buffer("rotation", torch.polar(torch.ones(6), torch.arange(6.0)))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        pairs = torch.view_as_complex(self.down(x).unflatten(-1, (6, 2))) * self.rotation * self.scale
        return self.up(torch.view_as_real(pairs).flatten(-2))


class TurnedToy(Toy):
    def build_model(self):
        return Turned()


@pytest.mark.parametrize("links", [None, 1])
def test_complex_buffers_stay_complex(tmp_path, links):
    module = toy(TurnedToy)
    trained_toy(tmp_path, module)
    assert torch.equal(module.merged_model(links).rotation, module.model.rotation)
    module.export(tmp_path / "merged", dtype="bfloat16")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(tensors["rotation"], module.model.rotation)
    assert tensors["up.weight"].dtype == torch.bfloat16


def test_a_cast_from_one_precision_to_another_leaves_complex_buffers_complex():
    adapted = AdaptedModel.of(Turned, target_modules=["up"], rank=2, finished_links="stack")
    rotation = adapted.model.rotation.clone()
    adapted.cast(torch.bfloat16)
    adapted.cast(torch.float32)
    assert torch.equal(adapted.model.rotation, rotation)


def test_a_tied_weight_is_written_under_both_its_names(tmp_path):
    module = toy(TiedToy, target_modules=["0"])
    module.export(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(tensors["4.weight"], tensors["6.weight"])
    assert tensors.keys() == module.merged_model().state_dict().keys()


def test_the_digits_are_exported_without_the_package(tmp_path):
    module = COLADigits(rank=4, save_base=True, seed=0)  # a base in the checkpoint is not trained again
    module.configure_model()
    data = DataLoader([(torch.randn(8, 64), torch.arange(8))] * 2, batch_size=None)
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(module, data, data)
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert command("--checkpoint", tmp_path / "end.ckpt", "--format", "merged", "--output", tmp_path / "merged") == 0
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), module.model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format_", ["merged", "peft"])
def test_an_example_input_is_what_a_plain_modules_logits_are_compared_for(tmp_path, capsys, format_):
    path = trained_toy(tmp_path, toy(ExampleToy))
    assert command("--checkpoint", path, "--format", format_, "--output", tmp_path / "out") == 0
    how = "loaded again with peft" if format_ == "peft" else "loaded again"
    assert capsys.readouterr().out.splitlines()[-2].startswith(f"{how}, its logits differ from the module's by at most ")


class Embedded(nn.Module):
    """A model of tokens with a configuration of its own."""

    def __init__(self):
        super().__init__()
        self.config = argparse.Namespace(width=8)
        self.tokens, self.fc = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, input_ids):
        return self.fc(self.tokens(input_ids))


T5 = transformers.T5Config(
    vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0
)
TAKE_MORE = {"encoder-decoder": lambda: transformers.T5ForConditionalGeneration(T5), "own configuration": Embedded}


@pytest.mark.parametrize("kind", TAKE_MORE)
@pytest.mark.parametrize("format_", ["merged", "peft"])
def test_a_model_that_takes_more_than_tokens_is_exported_too(tmp_path, kind, format_):
    class Own(COLAModule):
        def build_model(self):
            return TAKE_MORE[kind]()

    module = tiny.with_live_link(Own(target_modules=["fc"] if kind == "own configuration" else ["q", "v"], rank=2))
    assert "for no input is known" in module.export(tmp_path / "out", format_)[-1]
    if kind == "encoder-decoder":
        ids = torch.arange(6)[None]
        module.example_input_array = {"input_ids": ids, "decoder_input_ids": ids}
        assert "its logits differ from the module's by at most" in module.export(tmp_path / "compared", format_)[-1]


class Several(nn.Module):
    """A model that takes any number of inputs, and masks the last two of its logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, *inputs):
        return self.fc(sum(inputs)).masked_fill(torch.arange(6) > 3, -torch.inf)


class SeveralToy(Toy):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.example_input_array = torch.ones(3, 8), torch.ones(3, 8)

    def build_model(self):
        return Several()


@pytest.mark.parametrize("format_", ["merged", "peft"])
def test_an_example_may_be_of_any_number_of_inputs_and_logits_may_be_infinite(tmp_path, format_):
    module = tiny.with_live_link(toy(SeveralToy, target_modules=["fc"]))
    says = module.export(tmp_path / "out", format_)
    assert re.search(r"its logits differ from the module's by at most [\d.e-]+, where the largest is \d", " ".join(says))


def test_an_example_that_the_model_does_not_take_leaves_no_export(tmp_path):
    module = toy()
    module.example_input_array = torch.ones(3, 2, 4)  # which a forward of the module would flatten
    with pytest.raises(RuntimeError):
        module.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert module.export(tmp_path / "out", verify=False) == ["not compared"]


class Mixed(nn.Sequential, PyTorchModelHubMixin):
    """A model with a save_pretrained that is not transformers'."""


class MixedToy(Toy):
    def build_model(self):
        return Mixed(nn.Linear(8, 6))


def test_a_model_with_the_hubs_mixin_is_a_state_dict_too(tmp_path):
    module = toy(MixedToy)
    module.export(tmp_path / "out")
    assert_bit_equal(load_file(tmp_path / "out" / "model.safetensors"), dict(module.merged_model().state_dict()))


class HalfToy(Toy):
    """A body in bfloat16 and a head in float32."""

    def build_model(self):
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
        model[0].bfloat16()
        return model

    def forward(self, x):
        return self.model[1](self.model[0](x.bfloat16()).float())


def test_what_is_in_float32_beside_a_base_in_half_precision_stays_so(tmp_path):
    module = toy(HalfToy, target_modules=["0"])
    module.export(tmp_path / "out")
    head = module.model[1].weight
    assert not torch.equal(head.bfloat16().float(), head)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["1.weight"], head)


@pytest.mark.parametrize(("cls", "words"), [(ExampleToy, []), (ExampleToy, ["--no_verify"]), (Toy, [])])
def test_an_adapter_of_a_plain_module_says_where_its_base_is(tmp_path, capsys, cls, words):
    path = trained_toy(tmp_path, toy(cls))
    assert command("--checkpoint", path, "--format", "peft", "--output", tmp_path / "out", *words) == 0
    out = capsys.readouterr().out.splitlines()
    assert "its base: module.merged_model(0)" in out
    is_compared = cls is ExampleToy and not words
    compared = "loaded again with peft, its logits differ"
    assert out[-2].startswith(compared if is_compared else "not compared" if words else "not compared, for no input is known")
    module = COLAModule.load_from_checkpoint(path)
    x = torch.randn(3, 8)
    model = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "out")
    torch.testing.assert_close(model(x), module.model.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("example", [torch.ones(2, 3), (torch.ones(2, 3),), {"x": torch.ones(2, 3)}, (torch.ones(2, 3), 2.0)])
@pytest.mark.parametrize("kind", [lambda y: y, lambda y: (y, None), lambda y: {"y": y}])
def test_examples_and_outputs_may_be_of_any_kind(example, kind):
    class Scale(nn.Module):
        def forward(self, x, by=3.0):
            return kind(x * by)

    factor = 2.0 if isinstance(example, tuple) and len(example) == 2 else 3.0
    assert torch.equal(reference_logits(Scale(), example).logits, torch.full((2, 3), factor))
    assert reference_logits(Scale()) is None


def test_a_plain_module_leaves_in_float32(tmp_path):
    module = toy(ExampleToy)
    path = trained_toy(tmp_path, module, precision="64-true")
    assert command("--checkpoint", path, "--format", "merged", "--output", tmp_path / "merged") == 0
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    merged = module.merged_model().state_dict()
    assert {value.dtype for value in merged.values()} == {torch.float64}
    assert_bit_equal(tensors, {name: value.float() for name, value in merged.items()})


# ---------------------------------------------------------------------- what is refused, and what is left behind


def test_a_buffer_that_training_moved_fits_no_adapter(tmp_path, capsys):
    path = trained_toy(tmp_path, toy(TiedToy, target_modules=["0"]))
    before = contents(tmp_path)
    assert command("--checkpoint", path, "--format", "peft", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: format: expected merged, for training has changed '2.running_mean', which an adapter cannot hold; received peft"
    )
    assert contents(tmp_path) == before
    assert command("--checkpoint", path, "--format", "merged", "--output", tmp_path / "out") == 0


@pytest.fixture(params=["merged", "peft"])
def write(request, tmp_path):
    """Writes a small chain in one of two formats."""
    module = toy(ExampleToy)
    module.configure_model()
    with torch.no_grad():
        for layer in lora_layers(module.model).values():
            layer.lora_B.normal_()

    def write(folder, **how):
        return module.export(folder, request.param, **how)

    write.format = request.param
    return write


def test_an_output_that_is_not_empty_is_replaced_only_when_asked(tmp_path, write):
    output = tmp_path / "out"
    output.mkdir()
    (output / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^output: expected a folder that does not exist or is empty .*, received '.*out'"):
        write(output)
    assert contents(tmp_path) == {"out/kept.txt": b"mine"}
    write(output, overwrite=True)
    assert "kept.txt" not in [path.name for path in output.iterdir()]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_holds_folders_is_never_replaced(tmp_path, write):
    (tmp_path / "out" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^output: expected a folder that does not exist or is empty .*, received '.*out'"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "inner").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_an_output_that_is_a_link_stays_one(tmp_path, write, is_there):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    if is_there:
        (tmp_path / "disk" / "out").mkdir()
    for _ in range(2):
        write(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink()
        assert list((tmp_path / "disk" / "out").iterdir())
        assert sorted(path.name for path in tmp_path.rglob("*out*")) == ["out", "out"]


def test_what_a_killed_export_has_left_is_no_obstacle(tmp_path, write):
    (tmp_path / ".out.0123.partial").mkdir()
    (tmp_path / ".out.0123.partial" / "left.txt").write_text("left")
    write(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*left*"))


@pytest.mark.parametrize("format_", ["merged", "peft", "chain"])
def test_an_output_that_holds_the_base_is_not_overwritten(tmp_path, capsys, format_):
    module = module_of(tmp_path / "base", "opt")
    before = contents(tmp_path)
    message = r"output: expected a folder that does not hold the base or the checkpoint, received '.*base'"
    with pytest.raises(UserError, match=message):
        module.export(tmp_path / "base", format_, overwrite=True)
    assert contents(tmp_path) == before
    words = ["--checkpoint", saved(module, tmp_path), "--format", format_, "--output", tmp_path / "base", "--overwrite"]
    assert command(*words) == 2
    assert "expected a folder that does not hold the base" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_gives_other_logits_is_not_kept(tmp_path, write, overwrite, monkeypatch):
    output = tmp_path / "out"
    if overwrite:
        output.mkdir()
        (output / "former.txt").write_text("former")
    before = contents(tmp_path)
    wrong = ReferenceLogits({"input": torch.ones(3, 8)}, torch.zeros(3, 6))
    monkeypatch.setattr(verify, "reference_logits", lambda *_: wrong)
    with pytest.raises(ExportError, match=r"its logits differ from the module's by at most .*: it is not kept"):
        write(output, overwrite=overwrite)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    assert write(output, verify=False, overwrite=True)[-1] == "not compared"
    assert output.is_dir()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # all that peft says of names that it does not know
def test_an_adapter_that_peft_loads_in_part_is_not_kept(tmp_path, monkeypatch):
    module = tiny.three_links(module_of(tmp_path / "base", "opt"))
    monkeypatch.setattr(adapter, "PREFIX", "base_model.")
    with pytest.raises(ExportError, match="loaded again with peft, its logits differ"):
        module.export(tmp_path / "peft", "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weights_that_are_loaded_again_with_other_bits_are_not_kept(tmp_path, monkeypatch):
    module = module_of(tmp_path / "base", "opt")

    def one_bit_off(model, folder, **arguments):
        save(model, folder, **arguments)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.decoder.embed_positions.weight"][-1, -1] += 1e-3  # which the probe does not reach
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    kind = type(module.model)
    save = kind.save_pretrained
    monkeypatch.setattr(kind, "save_pretrained", one_bit_off)
    with pytest.raises(ExportError, match=r"'model\.decoder\.embed_positions\.weight' was loaded again with another"):
        module.export(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_so_are_those_of_a_plain_module(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "save_file", lambda tensors, path: save_file({k: v + 1 for k, v in tensors.items()}, path))
    with pytest.raises(ExportError, match=r"'0\.weight' was loaded again with another value"):
        toy().export(tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_so_is_a_chain_and_the_old_folder_stays(tmp_path, monkeypatch):
    module = toy()
    module.export(tmp_path / "chain", "chain")
    old = {path.name: path.read_bytes() for path in (tmp_path / "chain").iterdir()}
    module.tie_knot()
    monkeypatch.setattr(Chain, "load", lambda folder: Chain(base=module.chain.base))
    for name, overwrite in (("new", False), ("chain", True)):
        with pytest.raises(ExportError, match="other factors than were written: it is not kept"):
            module.export(tmp_path / name, "chain", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["chain"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "chain").iterdir()} == old


def test_an_export_leaves_the_bars_of_the_hub_as_the_user_set_them():
    with quiet():
        assert not are_progress_bars_disabled()  # a download takes long
        assert not logging.is_progress_bar_enabled()
    disable_progress_bars()
    try:
        with quiet():
            pass
        assert are_progress_bars_disabled()
        assert logging.is_progress_bar_enabled()
    finally:
        enable_progress_bars()


@pytest.mark.filterwarnings("error")
def test_an_export_is_silent_and_leaves_transformers_as_it_was(tmp_path, capsys):
    module = tiny.three_links(module_of(tmp_path / "base", "gpt2"))
    capsys.readouterr()
    module.export(tmp_path / "merged")
    module.export(tmp_path / "peft", "peft")
    assert capsys.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_a_classifier_that_reads_where_a_text_ends_is_compared_too(tmp_path):
    name = tiny.folder(tmp_path / "base", "bart", "AutoModel")
    module = tiny.three_links(COLASequenceClassifier(name, target_modules=["q_proj", "v_proj"], rank=4, num_labels=3, seed=0))
    assert reference_logits(module.model).logits.shape == (2, 3)
    module.export(tmp_path / "merged")
    module.export(tmp_path / "peft", "peft")


def test_a_module_in_training_is_copied_to_the_cpu_tensor_by_tensor(tmp_path, monkeypatch):
    """And not first on its device, whose memory may not hold it twice."""
    module = tiny.three_links(module_of(tmp_path / "base", "opt"))  # with tied weights

    def fail(self, memo):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "__deepcopy__", fail)
        copied = deep_copy(module, is_on_cpu=True)
    assert_bit_equal(weights(copied), weights(module))
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in module.parameters()]
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in module.parameters()}


@pytest.mark.parametrize(("end", "length"), [(1, 13), (None, 12), ([1, 2], 12), (50_256, 12)])
def test_a_probe_needs_no_end_of_text(tmp_path, end, length):
    model = module_of(tmp_path / "base", "llama").merged_model()
    model.config.eos_token_id = end
    assert reference_logits(model).logits.shape == (2, length, 400)


# ---------------------------------------------------------------------- the command


@dataclass
class Trained:
    """A module whose third link was trained for two steps, and its checkpoint."""

    module: Any
    path: Path


@pytest.fixture(scope="module", params=["llama", "bert"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"trained-{request.param}")
    module = tiny.three_links(module_of(folder / "base", request.param))
    ids = torch.randint(2, 400, (2, 6))
    labels = torch.tensor([0, 2]) if request.param == "bert" else ids
    data = DataLoader([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}] * 2, batch_size=None)
    run = trainer(folder, max_steps=2, limit_val_batches=0)
    run.fit(module, data, data)
    run.save_checkpoint(folder / "end.ckpt")
    return Trained(module, folder / "end.ckpt")


def auto_class(trained):
    return getattr(transformers, trained.module.auto_class)


@pytest.mark.parametrize("links", [None, 0, 1, 2, 3])
def test_merged_by_the_command(trained, links, tmp_path, capsys):
    words = [] if links is None else ["--links", links]
    assert command("--checkpoint", trained.path, "--format", "merged", "--output", tmp_path / "out", *words) == 0
    compared, written = capsys.readouterr().out.splitlines()
    assert compared.startswith("loaded again, its logits differ from the module's by at most ")
    assert written == f"written: {tmp_path / 'out'}"
    model = auto_class(trained).from_pretrained(tmp_path / "out")
    assert model.config.dtype == torch.float32
    assert difference(tiny.logits(model), tiny.logits(trained.module.merged_model(links))) <= 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(trained.module.tokenizer)


@pytest.mark.parametrize("links", [None, 1, 2, 3])
def test_an_adapter_by_the_command(trained, links, tmp_path, capsys):
    words = [] if links is None else ["--links", links]
    assert command("--checkpoint", trained.path, "--format", "peft", "--output", tmp_path / "out", *words) == 0
    rank, *_, compared, written = capsys.readouterr().out.splitlines()
    total = sum(RANKS[:links])
    assert rank == f"one adapter of rank {total}"
    assert compared.startswith("loaded again with peft, its logits differ from the module's by at most ")
    assert written == f"written: {tmp_path / 'out'}"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == total
    model = PeftModel.from_pretrained(trained.module.merged_model(0), tmp_path / "out")
    assert difference(tiny.logits(model), tiny.logits(trained.module.merged_model(links))) <= 1e-5


@pytest.mark.parametrize("links", [None, 0, 2])
def test_a_chain_by_the_command(trained, links, tmp_path, capsys):
    words = [] if links is None else ["--links", links]
    assert command("--checkpoint", trained.path, "--format", "chain", "--output", tmp_path / "out", *words) == 0
    n = 3 if links is None else links
    assert f"{n} links; loaded again, their factors are the same to the bit" in capsys.readouterr().out
    chain, whole = Chain.load(tmp_path / "out"), trained.module.full_chain()
    assert len(chain) == n
    assert chain.is_beginning_of(whole)
    assert chain.base == whole.base


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_by_the_command(trained, dtype, tmp_path):
    words = ["--checkpoint", trained.path, "--format", "merged", "--dtype", dtype, "--output", tmp_path / "out"]
    assert command(*words) == 0
    model = auto_class(trained).from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    expected = {name: value.to(getattr(torch, dtype)) for name, value in trained.module.merged_model().state_dict().items()}
    assert_bit_equal(model.state_dict(), expected)


@pytest.mark.parametrize("format_", ["merged", "peft"])
def test_without_a_comparison_by_the_command(trained, format_, tmp_path, capsys):
    words = ["--checkpoint", trained.path, "--format", format_, "--output", tmp_path / "out", "--no_verify"]
    assert command(*words) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["not compared", f"written: {tmp_path / 'out'}"]


def test_recompressed_and_replaced_by_the_command(trained, tmp_path, capsys):
    words = ["--checkpoint", trained.path, "--format", "peft", "--output", tmp_path / "out", "--max_rank", 2]
    assert command(*words) == 0
    assert capsys.readouterr().out.count(": relative error 0.") == 4
    assert command(*words) == 2
    assert command(*words[:-2], "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == sum(RANKS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with checkpoints of toys that can be exported, and that cannot."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {"plain": toy(), "loss": toy(LossToy, loss=nn.MSELoss()), "full": toy(target_modules=None)}
    for name, module in made.items():
        chain = None if name == "full" else {"every_n_train_steps": 1}
        run = trainer(folder, chain=chain, max_steps=2)
        run.fit(module, batches())
        run.save_checkpoint(folder / f"{name}.ckpt")
    checkpoint = torch.load(folder / "plain.ckpt", weights_only=True)
    checkpoint["state_dict"]["cola"]["module"]["class_path"] = "a_script.Toy"
    torch.save(checkpoint, folder / "unknown.ckpt")
    read_chain(folder / "plain.ckpt").save(folder / "chain")
    (folder / "file").write_text("")
    (folder / "used").mkdir()
    (folder / "used" / "mine.txt").write_text("mine")
    return folder


WITHOUT_LINKS = "format: expected merged without links .*, received"
MISTAKES = {
    "none.ckpt merged out": "checkpoint: expected a checkpoint file, received '.*none.ckpt', which cannot be read",
    "chain merged out": "checkpoint: expected a checkpoint file, received '.*chain', which cannot be read",
    "file merged out": "checkpoint: expected a checkpoint file, received '.*file', which cannot be read",
    "loss.ckpt merged out": "checkpoint: expected a .*LossToy made with plain arguments, received .* 'loss' is not plain",
    "unknown.ckpt merged out": "checkpoint: expected its module's class to be importable from here, received 'a_script.Toy'",
    "full.ckpt peft out": f"{WITHOUT_LINKS} peft",
    "full.ckpt chain out": f"{WITHOUT_LINKS} chain",
    "plain.ckpt gguf out": "argument --format: invalid choice: 'gguf'",
    "plain.ckpt merged file --overwrite": "output: expected a folder that does not exist or is empty .*, received '.*file'",
    "plain.ckpt peft out --max_rank 0": "max_rank: expected at least 1, received 0",
    "plain.ckpt merged out --links 9": "links: expected 0 to 2, .*received 9",
    "plain.ckpt peft out --links 9": "links: expected 0 to 2, .*received 9",
    "plain.ckpt chain out --links 9": "links: expected 0 to 2, .*received 9",
    "plain.ckpt merged out --links -1": "links: expected 0 to 2, .*received -1",
    "plain.ckpt peft out --links 0": "format: expected merged without links .*links: 0.*, received peft",
    "plain.ckpt merged out --link 1": "unrecognized arguments: --link 1",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(checkpoints, capsys, words):
    before = contents(checkpoints)
    checkpoint, format_, output, *more = words.split()
    options = ["--checkpoint", checkpoints / checkpoint, "--format", format_, "--output", checkpoints / output, *more]
    assert command(*options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(f"error: {MISTAKES[words]}", err.splitlines()[-1])
    assert "Traceback" not in err
    assert contents(checkpoints) == before
    assert not (checkpoints / "out").exists()


def test_the_required_options_are_named(capsys):
    assert command() == 2
    expected = "error: the following arguments are required: checkpoint, format, output"
    assert capsys.readouterr().err.splitlines() == [expected]


def test_without_peft_an_adapter_is_refused(checkpoints, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    words = ["--checkpoint", checkpoints / "plain.ckpt", "--format", "peft", "--output", checkpoints / "out"]
    assert command(*words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: format: expected the package peft, received none: pip install peft"
    )
    assert not (checkpoints / "out").exists()


def test_full_fine_tuning_is_exported_merged(checkpoints, tmp_path):
    assert command("--checkpoint", checkpoints / "full.ckpt", "--format", "merged", "--output", tmp_path / "out") == 0
    module = COLAModule.load_from_checkpoint(checkpoints / "full.ckpt")
    assert_bit_equal(load_file(tmp_path / "out" / "model.safetensors"), module.model.state_dict())


@pytest.mark.parametrize("mode", ["merge", "stack"])
def test_what_a_precision_has_rounded_is_exported_as_it_was_trained_and_the_base_as_it_was(tmp_path, capsys, mode):
    folder = tiny.folder(tmp_path, "llama")
    module = COLACausalLM(folder, rank=2, alpha=4, seed=0, finished_links=mode, lr_schedule="constant")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 300, (4, 2, 8)).unbind()]
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2, precision="bf16-true")
    run.fit(module, *(DataLoader(rows, batch_size=None) for _ in range(2)))
    run.save_checkpoint(tmp_path / "end.ckpt")
    words = ["export", "--checkpoint", str(tmp_path / "end.ckpt")]
    assert main([*words, "--format", "peft", "--output", str(tmp_path / "adapter")]) == 0
    told = capsys.readouterr().out
    assert f", dtype='{'bfloat16' if mode == 'stack' else 'float32'}'" in told
    assert float(re.search(r"differ from the module's by at most ([^,]*),", told)[1]) <= 1e-4
    assert main([*words, "--format", "merged", "--output", str(tmp_path / "merged")]) == 0
    assert main([*words, "--format", "merged", "--output", str(tmp_path / "base"), "--links", "0"]) == 0
    base, again = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "base"))
    assert_bit_equal(again.state_dict(), base.state_dict())


# ---------------------------------------------------------------------- an adapter on the base that it names


class Noisy(COLACausalLM):
    """A module whose base is not what its name stands for."""

    def build_model(self):
        model = super().build_model()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        return model


class Scaled(COLACausalLM):
    """The same weights, and another function of them."""

    def build_model(self):
        model = super().build_model()
        for layer in model.model.layers:
            layer.self_attn.scaling *= 2
        return model


class Hooked(COLACausalLM):
    """The same weights, and a hook that has the head give something else."""

    def build_model(self):
        model = super().build_model()
        model.lm_head.register_forward_hook(lambda module, inputs, output: 1.5 * output)
        return model


class Activated(COLACausalLM):
    """The same weights, and another activation."""

    def build_model(self):
        model = super().build_model()
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.GELU()
        return model


class Rotated(COLACausalLM):
    """The same weights, and other frequencies, which no state dict holds."""

    def build_model(self):
        model = super().build_model()
        model.model.rotary_emb.inv_freq *= 0.5
        return model


class Fielded(COLACausalLM):
    """A configuration of its own: a field that is another, or as it is in the files."""

    def __init__(self, model_name, *, fields=None, **more):
        super().__init__(model_name, **more)
        self.fields = fields or {}

    def model_fields(self):
        return self.fields


class Wider(COLACausalLM):
    """A base with more tokens than its name stands for."""

    def build_model(self):
        model = super().build_model()
        model.resize_token_embeddings(410)
        return model


def saved(module, path):
    """The checkpoint of a module with three links."""
    tiny.three_links(module)
    run = trainer(path)
    run.strategy.connect(module)
    run.save_checkpoint(path / "end.ckpt")
    return path / "end.ckpt"


ON_ITS_BASE = {
    "a head and a new pooler": (COLASequenceClassifier, "bert", "AutoModelForMaskedLM", {"num_labels": 3}),
    "a new pooler that stays frozen": (
        COLASequenceClassifier,
        "bert",
        "AutoModelForMaskedLM",
        {"num_labels": 3, "modules_to_save": ["classifier"]},
    ),
    "a new language model's head, frozen": (COLACausalLM, "llama", "AutoModel", {}),
    "a new language model's head beside a saved base": (COLACausalLM, "llama", "AutoModel", {"save_base": True}),
    "a classifier by its last token": (COLASequenceClassifier, "llama", "AutoModel", {"num_labels": 3}),
    "a base in half precision": (COLACausalLM, "llama", "AutoModelForCausalLM", {"dtype": "bfloat16"}),
    "one norm of several": (COLACausalLM, "llama", "AutoModelForCausalLM", {"modules_to_save": ["norm"]}),
    "norms in each layer": (COLACausalLM, "llama", "AutoModelForCausalLM", {"modules_to_save": ["input_layernorm", "norm"]}),
}


@pytest.mark.parametrize("case", ON_ITS_BASE)
def test_an_adapter_gives_the_modules_logits_on_the_base_that_it_names(tmp_path, capsys, case):
    cls, architecture, kind, arguments = ON_ITS_BASE[case]
    name = tiny.folder(tmp_path / "base", architecture, kind)
    module = cls(name, target_modules=tiny.targets(architecture), rank=4, alpha=6, seed=0, **arguments)
    path = saved(module, tmp_path)
    assert command("--checkpoint", path, "--format", "peft", "--output", tmp_path / "out") == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "loaded again with peft, its logits differ" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    fields = {"num_labels": 3} if cls is COLASequenceClassifier else {}
    torch.manual_seed(99)  # what is new there is drawn anew
    dtype = arguments.get("dtype", "float32")
    assert f"from_pretrained({name!r}, dtype='{dtype}'" in out
    auto_class = getattr(transformers, cls.auto_class)
    base = auto_class.from_pretrained(config["base_model_name_or_path"], dtype=dtype, **fields).float()
    if base.config.pad_token_id is None:
        assert ("pad_token_id=1" in out) == (cls is COLASequenceClassifier)
        base.config.pad_token_id = module.tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    module.upcast()
    assert difference(tiny.logits(model), tiny.logits(module.model)) <= 1e-5 * tiny.logits(module.model).abs().max()


@pytest.mark.parametrize(
    ("cls", "what"),
    [(Noisy, "'model.embed_tokens.weight' differs"), (Wider, r"'.*weight' differs")],
)
def test_a_base_that_is_not_what_its_name_stands_for_gets_no_adapter(tmp_path, capsys, cls, what):
    path = saved(cls(tiny.folder(tmp_path / "base"), target_modules=["q_proj"], rank=4, seed=0), tmp_path)
    words = ["--checkpoint", path, "--output", tmp_path / "out"]
    assert command(*words, "--format", "peft") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"error: format: expected merged, for the base of {cls.__name__} is not '.*base': {what}.* peft$", error)
    assert not (tmp_path / "out").exists()
    assert command(*words, "--format", "merged") == 0


@pytest.mark.parametrize("cls", [Scaled, Hooked, Activated, Rotated])
@pytest.mark.parametrize("words", [[], ["--max_rank", 2], ["--max_rank", 9]], ids=str)
def test_a_function_that_is_not_what_its_name_stands_for_gets_no_adapter(tmp_path, capsys, cls, words):
    path = saved(cls(tiny.folder(tmp_path / "base"), target_modules=["q_proj"], rank=4, seed=0), tmp_path)
    assert command("--checkpoint", path, "--output", tmp_path / "out", "--format", "peft", *words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "its logits differ from the module's by at most" in error
    assert re.match(
        rf"error: expected --format merged: with '.*base' in place of the base of {cls.__name__}, .*: it is not kept$", error
    )
    assert "--format merged" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["hidden_act", "num_hidden_layers", "rope_parameters"])
def test_a_field_that_its_name_does_not_stand_for_gets_no_adapter(tmp_path, capsys, field):
    value = {
        "hidden_act": "gelu",
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    }[field]
    name = tiny.folder(tmp_path / "base")
    module = Fielded(name, fields={"use_cache": True, field: value}, target_modules=["q_proj"], rank=4, seed=0)
    words = ["--checkpoint", saved(module, tmp_path), "--output", tmp_path / "out"]
    for more in ([], ["--max_rank", 2]):
        assert command(*words, "--format", "peft", *more) in (1, 2)
        assert "expected --format merged" in (error := capsys.readouterr().err.splitlines()[-1]) or "expected merged" in error
        assert not (tmp_path / "out").exists()
    assert command(*words, "--format", "merged") == 0


@pytest.mark.parametrize("fields", [{"hidden_act": "silu", "use_cache": True}, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}])
def test_fields_that_are_the_named_ones_change_nothing(tmp_path, capsys, fields):
    name = tiny.folder(tmp_path / "base")
    path = saved(Fielded(name, fields=fields, target_modules=["q_proj"], rank=4, seed=0), tmp_path)
    assert command("--checkpoint", path, "--format", "peft", "--output", tmp_path / "out") == 0, capsys.readouterr().err
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = tiny.logits(COLAModule.load_from_checkpoint(path).model)
    assert difference(tiny.logits(model), expected) <= 1e-5 * expected.abs().max()


def loaded_as_in_card(folder):
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names["model"]


@pytest.mark.parametrize("labels", [["bad", "good"], ['"mixed"', "bad", "good"]], ids=len)
def test_an_adapters_card_loads_it_with_its_labels(tmp_path, labels):
    name = tiny.folder(tmp_path / "base", "bert", "AutoModel")
    module = COLASequenceClassifier(name, label_names=labels, target_modules=["query"], rank=4, seed=0)
    module.export(tmp_path / "out", "peft")
    assert loaded_as_in_card(tmp_path / "out").config.id2label == dict(enumerate(labels))


@pytest.mark.parametrize("num_labels", [2, 3])
def test_labels_that_the_named_base_must_be_given_are_told(tmp_path, capsys, num_labels):
    name = tiny.folder(tmp_path / "base", "bert", "AutoModel")
    module = COLASequenceClassifier(name, num_labels=num_labels, target_modules=["query"], rank=4, seed=0)
    words = ["--checkpoint", saved(module, tmp_path), "--format", "peft", "--output", tmp_path / "out"]
    assert command(*words) == 0, capsys.readouterr().err
    needed = {} if num_labels == 2 else {"num_labels": 3}
    assert f", dtype='float32', num_labels={num_labels}, " in capsys.readouterr().out
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", **needed)
    assert difference(tiny.logits(model), tiny.logits(module.model)) <= 1e-5
    assert difference(tiny.logits(loaded_as_in_card(tmp_path / "out")), tiny.logits(module.model)) <= 1e-5


def test_a_resume_with_another_modules_to_save_says_so(tmp_path):
    name = tiny.folder(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    arguments = {"target_modules": ["query"], "rank": 2, "num_labels": 3, "seed": 0}
    ids = torch.randint(2, 400, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}
    data = DataLoader([batch] * 2, batch_size=None)

    def fit(max_epochs, path=None, **more):
        module = COLASequenceClassifier(name, **arguments, **more)
        run = trainer(tmp_path, max_epochs=max_epochs, limit_val_batches=0, chain={"every_n_train_steps": 5})
        run.fit(module, data, data, ckpt_path=path)
        return run

    path = tmp_path / "end.ckpt"
    fit(1, modules_to_save=["classifier"]).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]["cola"]
    del state["modules_to_save"], state["module"]["init_args"]["modules_to_save"]
    torch.save(checkpoint, path)  # as an earlier release wrote it, without a word of them
    with pytest.raises(UserError, match=r"Missing key\(s\) in state_dict: .*model\.bert\.pooler\.dense"):
        fit(2, path)
    assert fit(2, path, modules_to_save=["classifier"]).global_step == 4


def test_a_link_that_is_missing_is_no_module_to_save():
    module = toy()
    module.configure_model()
    state = module.state_dict()
    del state["model.0.lora_A"]
    with pytest.raises(UserError, match=r'Missing key\(s\) in state_dict: .*"model\.0\.lora_A"'):
        module.load_state_dict(state)


# ---------------------------------------------------------------------- convolutions


class ConvToy(COLAModule):
    """A small network for images, or for rows of numbers, that shows what it takes."""

    def __init__(self, dilation=1, kind="2d", **arguments):
        super().__init__(**arguments)
        self.dilation, self.kind = dilation, kind
        self.example_input_array = torch.randn(2, 3, 6, 6) if kind == "2d" else torch.randn(2, 3, 6)

    def build_model(self):
        if self.kind == "1d":
            return nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.GELU(), nn.Flatten(1), nn.Linear(48, 5))
        first = nn.Conv2d(3, 8, (3, 1), padding="same", dilation=self.dilation)
        return nn.Sequential(first, nn.GELU(), nn.Conv2d(8, 4, 1, bias=False), nn.Flatten(1), nn.Linear(144, 5))

    def training_step(self, batch, batch_idx):
        return self.model(self.example_input_array).square().mean()


def conv_checkpoint(path, **arguments):
    targets = ["0", "3"] if arguments.get("kind") == "1d" else ["0", "2", "4"]
    module = ConvToy(**{"target_modules": targets, "rank": 4, "alpha": 6, "seed": 0} | arguments)
    run = trainer(path, chain={"every_n_train_steps": 2, "ranks": [4, 2, 3]}, max_steps=6)
    run.fit(module, DataLoader(range(6), batch_size=1))
    run.save_checkpoint(path / "end.ckpt")
    return module, path / "end.ckpt"


@pytest.mark.parametrize("arguments", [{}, {"kind": "1d"}, {"finished_links": "stack"}, {"links": 2}], ids=str)
def test_peft_gives_the_logits_of_a_module_with_convolutions(tmp_path, capsys, arguments):
    links = arguments.pop("links", 3)
    module, path = conv_checkpoint(tmp_path, **arguments)
    words = ["--checkpoint", path, "--format", "peft", "--output", tmp_path / "peft", "--links", links]
    assert command(*words) == 0, capsys.readouterr().err
    assert "loaded again with peft, its logits differ from the module's by at most " in capsys.readouterr().out
    rank = sum([4, 2, 3][:links])
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    kernel = (3, 1) if module.kind == "2d" else (3,)
    assert weights["base_model.model.0.lora_A.weight"].shape == (rank, 3, *kernel)
    assert weights["base_model.model.0.lora_B.weight"].shape == (8, rank, *[1] * len(kernel))
    x = torch.randn(4, *module.example_input_array.shape[1:])
    model = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft").eval()
    expected = module.merged_model(links).eval()(x)
    assert difference(model(x), expected) <= 1e-5
    assert difference(model.merge_and_unload()(x), expected) <= 1e-5
    assert difference(module.merged_model(0)(x), expected) > 1e-3
    again = read_chain(str(tmp_path / "peft"), None, "adapter")
    assert [link.rank for link in again.links] == [4, 2, 3][:links]
    torch.testing.assert_close(again.delta("0"), module.full_chain().truncate(links).delta("0"))


def test_a_recompressed_adapter_of_convolutions_is_of_the_rank_asked_for(tmp_path, capsys):
    _, path = conv_checkpoint(tmp_path)
    assert command("--checkpoint", path, "--format", "peft", "--output", tmp_path / "peft", "--max_rank", 6) == 0
    assert "0: relative error" in capsys.readouterr().out
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert weights["base_model.model.0.lora_A.weight"].shape == (6, 3, 3, 1)


def test_a_chain_begins_with_convolutions_that_peft_has_trained(tmp_path):
    module, path = conv_checkpoint(tmp_path)
    assert command("--checkpoint", path, "--format", "peft", "--output", tmp_path / "peft") == 0
    begun = ConvToy(target_modules=["0", "2", "4"], rank=4, alpha=6, seed=0, init_chain=str(tmp_path / "peft"))
    begun.configure_model()
    x = module.example_input_array
    assert difference(begun.model.eval()(x), module.model.eval()(x)) <= 1e-5


def test_a_merged_export_of_convolutions_is_a_state_dict(tmp_path):
    module, path = conv_checkpoint(tmp_path)
    assert command("--checkpoint", path, "--format", "merged", "--output", tmp_path / "merged") == 0
    plain = ConvToy().build_model()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert difference(plain.eval()(module.example_input_array), module.model.eval()(module.example_input_array)) <= 1e-5


def test_convolutions_of_which_pefts_lora_would_be_another_are_refused(tmp_path, capsys):
    _, path = conv_checkpoint(tmp_path, dilation=2)
    words = ["--checkpoint", path, "--output", tmp_path / "out", "--format"]
    assert command(*words, "peft") == 2
    assert "format: expected merged, for PEFT has no LoRA, or another, for '0', a Conv2d(" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command(*words, "merged") == 0


# ---------------------------------------------------------------------- modules that PEFT matches by the end of their names


class Named(Toy):
    """Modules whose names end in one another's."""

    def __init__(self, inner=nn.LayerNorm, **arguments):
        super().__init__(**arguments)
        self.inner = inner
        self.example_input_array = torch.ones(2, 8)

    def build_model(self):
        model = nn.Sequential()
        model.add_module("fc", nn.Linear(8, 12))
        model.add_module("final_norm", self.inner(12))
        model.add_module("norm", nn.LayerNorm(12))
        model.add_module("out", nn.Linear(12, 6))
        return model


def norm_as_adapter(folder, **arguments):
    module = toy(Named, modules_to_save=["norm"], **arguments)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * parameter.requires_grad)
    module.export(folder, "peft")
    return module


def test_a_name_that_ends_others_is_written_with_all_that_peft_takes_for_it(tmp_path):
    module = norm_as_adapter(tmp_path / "out")
    x = torch.randn(3, 8)
    model = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "out")
    torch.testing.assert_close(model(x), module.model.eval()(x), rtol=0, atol=1e-5)


def test_an_adapter_that_peft_cannot_load_is_not_kept(tmp_path, monkeypatch, write):
    def fail(*_, **__):
        raise KeyError("base_model.model.model.layers.0.input_layernorm.weight")

    if write.format == "peft":
        monkeypatch.setattr(PeftModel, "from_pretrained", fail)
        with pytest.raises(KeyError, match="input_layernorm"):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()
