"""Exports are the model, under plain transformers and under peft, and are there whole or not at all."""

import gc
import json
import os
import re
import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from cola_lightning import Chain, COLACausalLM, COLAModule, COLASequenceClassifier, UserError
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli import main
from cola_lightning.errors import DiskError, ExportError
from cola_lightning.export.model import TrainedModel
from cola_lightning.export.verify import ReferenceLogits, prove_merged
from cola_lightning.writing import atomic_folder
from tests.helpers import tiny
from tests.helpers.toy import Toy, assert_bit_equal, assert_same_chain, batches, saved, toy, trainer

RANKS = [4, 2, 3]

# A base: its architecture, the class whose files lie in its folder, and the module's arguments.
MATRIX: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (name, "AutoModelForCausalLM", {}) for name in ("opt", "llama", "gpt2", "qwen3", "gpt_neox", "phi3")},
    "roberta": ("roberta", "AutoModel", {"label_names": ['"mixed"', "bad", "good"], "target_modules": "all-linear"}),
    "bert": ("bert", "AutoModel", {"num_labels": 3}),
    "half precision, stacked": ("llama", "AutoModelForCausalLM", {"dtype": "bfloat16"}),
    "four bits": ("llama", "AutoModelForCausalLM", {"quantization": "nf4", "finished_links": "stack"}),
    "layers of a block, norms in each": (
        "llama",
        "AutoModelForCausalLM",
        {"target_modules": r"model\.layers\.1\..*_proj", "modules_to_save": ["input_layernorm", "norm"]},
    ),
    "experts": ("qwen2_moe", "AutoModelForCausalLM", {"target_modules": "all-linear", "experts": True}),
    "a new head, frozen": ("llama", "AutoModel", {}),
    "a new pooler, frozen": ("bert", "AutoModelForMaskedLM", {"num_labels": 3, "modules_to_save": ["classifier"]}),
    "a classifier by its last token": ("llama", "AutoModel", {"num_labels": 3}),
}
# The package does nothing with these that it does not do with the others.
ALIKE = {"opt", "llama", "qwen3", "gpt_neox", "phi3", "bert", "half precision, stacked", "a new head, frozen"}


def module_of(folder, case):
    """A module on a tiny model that lies in the folder."""
    architecture, kind, arguments = MATRIX[case]
    name = tiny.folder(folder, architecture, kind)
    cls = COLASequenceClassifier if arguments.keys() & {"num_labels", "label_names"} else COLACausalLM
    return cls(name, **{"target_modules": tiny.targets(architecture), "rank": 4, "alpha": 6, "seed": 0} | arguments)


def command(path, format_, output, *more):
    words = [path, "--format", format_, "--output", output, *more]
    return main(["export", *map(str, words)])


def contents(folder):
    """All that is in a folder, hidden files too, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def loaded_as_in_card(folder):
    """The model that the code in an export's card makes."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names["model"]


# ---------------------------------------------------------------------- the matrix


@pytest.fixture(
    scope="module", params=[pytest.param(case, marks=[pytest.mark.slow] if case in ALIKE else []) for case in MATRIX]
)
def exported(request, tmp_path_factory):
    """A module with three links, and the folder of its exports."""
    folder = tmp_path_factory.mktemp("exported")
    path = saved(tiny.three_links(module_of(folder / "base", request.param)), folder)
    module, chain = COLAModule.load_from_checkpoint(path), read_chain(path)
    lines = {format_: module.export(folder / format_, format_) for format_ in ("merged", "peft", "chain")}
    module.adapted.upcast()
    logits = tiny.logits(module.model)
    return SimpleNamespace(case=request.param, folder=folder, module=module, chain=chain, lines=lines, logits=logits)


def test_plain_transformers_gives_the_modules_logits(exported):
    auto_class = getattr(transformers, exported.module.auto_class)
    model, info = auto_class.from_pretrained(exported.folder / "merged", output_loading_info=True)
    assert {name: len(keys) for name, keys in info.items()} == dict.fromkeys(info, 0)
    assert tiny.relative_difference(tiny.logits(model), exported.logits) <= (0.05 if model.dtype == torch.bfloat16 else 1e-5)
    assert tiny.relative_difference(exported.logits, tiny.logits(exported.module.merged_model(0))) > 1e-2
    assert "its logits differ from the module's by at most " in " ".join(exported.lines["merged"])
    assert torch.equal(tiny.logits(loaded_as_in_card(exported.folder / "merged")), tiny.logits(model))


def test_tokenizer_and_generation_config_come_along(exported):
    base, merged = exported.folder / "base", exported.folder / "merged"
    for folder in (merged, exported.folder / "peft"):
        ours, theirs = map(AutoTokenizer.from_pretrained, (folder, base))
        assert [ours(text)["input_ids"] for text in tiny.TEXT] == [theirs(text)["input_ids"] for text in tiny.TEXT]
    if isinstance(exported.module, COLACausalLM) and (base / "generation_config.json").exists():
        ours, theirs = map(GenerationConfig.from_pretrained, (merged, base))
        assert ours.to_diff_dict() == theirs.to_diff_dict()


def test_peft_gives_the_modules_logits_on_the_base_that_the_adapter_names(exported):
    folder = exported.folder / "peft"
    torch.manual_seed(99)  # what is new in the base is drawn anew
    if exported.case == "four bits":
        model = PeftModel.from_pretrained(exported.module.merged_model(0), folder)
    else:
        model = loaded_as_in_card(folder).float()
    assert tiny.relative_difference(tiny.logits(model), exported.logits) <= 1e-5
    if names := MATRIX[exported.case][2].get("label_names"):
        assert model.config.id2label == dict(enumerate(names))
    assert tiny.relative_difference(tiny.logits(model.merge_and_unload()), exported.logits) <= 1e-5
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == sum(RANKS)
    assert config["task_type"] == ("CAUSAL_LM" if isinstance(exported.module, COLACausalLM) else "SEQ_CLS")
    assert (config["base_model_name_or_path"], config["revision"]) == (str(exported.folder / "base"), None)


def test_the_chain_comes_back_from_its_folder_and_from_an_adapter_as_one_link(exported):
    assert_same_chain(read_chain(exported.folder / "chain"), exported.chain)
    (again,) = read_chain(exported.folder / "peft").links
    assert sorted(again.factors) == sorted(exported.chain.layers)
    assert all((again.delta(name) - exported.chain.delta(name)).abs().max() <= 1e-6 for name in again.factors)
    mine, theirs = again.extras, exported.chain.links[-1].extras
    assert_bit_equal({name: mine[name] for name in theirs}, theirs)  # beside which it holds what is new and frozen


def test_the_first_links_by_the_command(tmp_path, capsys):
    module = tiny.three_links(module_of(tmp_path / "base", "bert"))
    path, auto_class = saved(module, tmp_path), getattr(transformers, module.auto_class)
    for format_ in ("merged", "peft", "chain"):
        assert command(path, format_, tmp_path / format_, "--links", 2) == 0
    assert f"written: {tmp_path / 'peft'}" in capsys.readouterr().out
    assert_same_chain(Chain.load(tmp_path / "chain"), module.full_chain().truncate(2))
    adapted = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")
    for model in (auto_class.from_pretrained(tmp_path / "merged"), adapted):
        assert tiny.relative_difference(tiny.logits(model), tiny.logits(module.merged_model(2))) <= 1e-5
    before = contents(tmp_path)
    assert command(path, "peft", tmp_path / "none", "--links", 0) == 2
    assert command(path, "peft", tmp_path / "peft") == 2
    assert contents(tmp_path) == before
    assert command(path, "peft", tmp_path / "peft", "--overwrite", "--no_verify") == 0
    assert "not compared" in capsys.readouterr().out
    assert read_chain(tmp_path / "peft")[0].rank == sum(RANKS)


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("case", "dtype"), [("bert", "float16"), ("four bits", "bfloat16")])
def test_a_merged_model_leaves_in_the_dtype_asked_for(tmp_path, case, dtype):
    module = tiny.three_links(module_of(tmp_path / "base", case))
    module.export(tmp_path / "out", dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    expected = {name: value.to(getattr(torch, dtype)) for name, value in module.merged_model().state_dict().items()}
    model = getattr(transformers, module.auto_class).from_pretrained(tmp_path / "out", dtype="auto")
    assert_bit_equal(model.state_dict(), expected)


def test_weights_that_overflow_in_half_precision_are_not_kept(tmp_path):
    module = tiny.three_links(module_of(tmp_path / "base", "llama"))
    with torch.no_grad():
        module.model.model.layers[0].mlp.up_proj.weight.mul_(1e7)
    with pytest.raises(ExportError, match="at most nan"):
        module.export(tmp_path / "half", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("mode", ["merge", "stack"])
def test_what_a_precision_has_rounded_is_exported_as_it_was_trained_and_the_base_as_it_was(tmp_path, capsys, mode):
    folder = tiny.folder(tmp_path, "gemma2", hidden_size=24)  # scales its embeddings by 24 ** 0.5, which no file holds
    module = COLACausalLM(folder, rank=2, alpha=4, seed=0, finished_links=mode, lr_schedule="constant")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 300, (4, 2, 8)).unbind()]
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2, precision="bf16-true")
    run.fit(module, *(DataLoader(rows, batch_size=None) for _ in range(2)))
    path = saved(module, tmp_path)
    assert command(path, "peft", tmp_path / "adapter") == 0
    printed = capsys.readouterr().out
    assert f", dtype='{'bfloat16' if mode == 'stack' else 'float32'}'" in printed
    assert float(re.search(r"differ from the module's by at most ([^,]*),", printed)[1]) <= 1e-4
    assert command(path, "merged", tmp_path / "merged", "--dtype", "float32") == 0
    assert_bit_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict(), module.merged_model().state_dict())
    assert command(path, "merged", tmp_path / "base", "--links", "0") == 0
    base, again = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "base"))
    assert_bit_equal(again.state_dict(), base.state_dict())


# ---------------------------------------------------------------------- modules that are not Hugging Face's


class Odd(nn.Module, PyTorchModelHubMixin):
    """Has one weight under two names, a batch norm, a buffer of complex numbers, and a save_pretrained of its own."""

    def __init__(self):
        super().__init__()
        self.down, self.norm, self.up = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 6)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.register_buffer("rotation", torch.polar(torch.ones(6), torch.arange(6.0)))

    def forward(self, x):
        pairs = torch.view_as_complex(self.norm(self.down(x)).unflatten(-1, (6, 2))) * self.rotation
        return self.up(self.second(self.first(torch.view_as_real(pairs).flatten(-2))))


class OddToy(Toy):
    def build_model(self):
        return Odd()


def test_a_plain_modules_export_is_a_state_dict(tmp_path, capsys):
    module = toy(OddToy, target_modules=["down", "up"])
    trainer(tmp_path, chain={"every_n_train_steps": 2}, max_steps=6).fit(module, batches())
    assert command(saved(module, tmp_path), "merged", tmp_path / "merged") == 0
    assert "no input is known" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model.safetensors"]
    plain = Odd()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert_bit_equal(plain.state_dict(), dict(module.merged_model().state_dict()))
    x = torch.randn(5, 8)
    torch.testing.assert_close(plain.eval()(x), module.model.eval()(x), rtol=0, atol=1e-6)
    module.export(tmp_path / "half", dtype="bfloat16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(tensors["rotation"], module.model.rotation)
    assert tensors["up.weight"].dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"^format: .*'norm\.running_mean'"):  # which training moved, and fits no adapter
        module.export(tmp_path / "peft", "peft")


def test_links_that_were_trained_in_double_precision_are_merged_and_proven_in_it(tmp_path):
    module = toy(target_modules=["0", "2"])
    run = trainer(tmp_path, chain={"at_steps": [2]}, max_steps=4, precision="64-true")
    run.fit(module, batches(dtype=torch.float64))
    expected = module.merged_model().state_dict()
    assert any("proven" in line for line in module.export(tmp_path / "merged"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(value, expected[name].float()) for name, value in written.items())


def test_full_fine_tuning_in_double_precision_leaves_merged_in_float32(tmp_path):
    module = toy(target_modules=None)
    trainer(tmp_path, max_steps=2, precision="64-true").fit(module, batches(dtype=torch.float64))
    path = saved(module, tmp_path)
    assert [command(path, format_, tmp_path / "out") for format_ in ("peft", "chain", "merged")] == [2, 2, 0]
    expected = {name: value.float() for name, value in module.model.state_dict().items()}
    assert_bit_equal(load_file(tmp_path / "out" / "model.safetensors"), expected)


class Seq2Seq(nn.Sequential):
    def forward(self, input_ids, decoder_input_ids):
        return super().forward(input_ids) + decoder_input_ids


class Seq2SeqToy(Toy):
    def build_model(self):
        return Seq2Seq(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


INPUTS = {"input_ids": torch.ones(3, 8), "decoder_input_ids": torch.ones(3, 6)}


@pytest.mark.parametrize(("format_", "cls", "example"), [("merged", Seq2SeqToy, INPUTS), ("peft", Toy, torch.ones(3, 8))])
def test_an_example_input_is_what_logits_are_compared_for(tmp_path, format_, cls, example):
    module = tiny.with_live_link(toy(cls))
    assert "because no input is known" in " ".join(module.export(tmp_path / "unknown", format_))
    module.example_input_array = example
    lines = module.export(tmp_path / "out", format_)
    assert re.search(r"its logits differ from the module's by at most [\d.e-]+, where the largest is \d", " ".join(lines))


class ConvToy(Toy):
    def build_model(self):
        return nn.Sequential(nn.Conv2d(3, 8, (3, 1), padding="same"), nn.GELU(), nn.Flatten(1), nn.Linear(288, 5))


def test_exports_give_the_logits_of_a_module_with_convolutions_but_not_of_those_that_pefts_lora_computes_otherwise(tmp_path):
    options, x = {"target_modules": ["0", "3"], "rank": 4, "finished_links": "stack"}, torch.randn(4, 3, 6, 6)
    module = tiny.three_links(toy(ConvToy, **options))
    for format_ in ("merged", "peft"):
        module.export(tmp_path / format_, format_)
    expected = module.merged_model().eval()(x)
    assert tiny.relative_difference(module.merged_model(0).eval()(x), expected) > 1e-3
    plain = ConvToy.build_model(None)
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    adapted = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft").eval()
    again = toy(ConvToy, **options, init_chain=str(tmp_path / "peft")).model.eval()
    for model in (plain.eval(), adapted, again, adapted.merge_and_unload()):
        assert tiny.relative_difference(model(x), expected) <= 1e-5
    module.model[0].dilation = (2, 1)
    with pytest.raises(UserError, match=r"^format: .*'0', a Conv2d.* Use merged"):
        module.export(tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_recompressed_adapter_holds_the_closest_update_and_says_how_far_it_is(tmp_path, capsys):
    module = tiny.three_links(module_of(tmp_path / "base", "gpt2"))
    assert command(saved(module, tmp_path), "peft", tmp_path / "peft", "--max_rank", 5) == 0
    printed = dict(line.split(": relative error ") for line in capsys.readouterr().out.splitlines() if ": relative" in line)
    chain, closest = module.full_chain(), module.merged_model(0)
    assert list(printed) == chain.layers
    for name, error in printed.items():
        u, values, v = torch.linalg.svd(chain.delta(name).double(), full_matrices=False)
        assert float(error) == pytest.approx((values[5:].norm() / values.norm()).item(), rel=1e-2)
        with torch.no_grad():
            closest.get_submodule(name).weight.add_((u[:, :5] * values[:5] @ v[:5]).T)
    loaded = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")
    assert loaded.peft_config["default"].r == 5
    assert tiny.relative_difference(tiny.logits(loaded), tiny.logits(closest)) <= 1e-5
    assert module.export(tmp_path / "plain", "peft") == module.export(tmp_path / "large", "peft", max_rank=9)
    assert_bit_equal(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "large")))


def test_a_model_is_loaded_again_once_the_exported_one_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tiny.three_links(module_of(tmp_path / "base", "llama")), tmp_path)
    load, weights, in_use = PreTrainedModel.from_pretrained.__func__, [], []

    def counting(cls, *args, **arguments):
        gc.collect()
        in_use.append(sum(weight().untyped_storage().nbytes() for weight in weights if weight() is not None))
        loaded = load(cls, *args, **arguments)  # with what it says of the loading, where that is asked for
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        weights.extend(weakref.ref(parameter) for parameter in model.parameters())
        return loaded

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    assert command(path, "merged", tmp_path / "out") == 0
    assert len(in_use) >= 2
    assert max(in_use) == 0


class Changed(COLACausalLM):
    """A model that is changed once it is loaded, or as it is configured."""

    change, fields = staticmethod(lambda model: None), {}

    def model_fields(self):
        return self.fields

    def build_model(self):
        model = super().build_model()
        with torch.no_grad():
            self.change(model)
        return model


OTHERS = {
    "other weights": {"change": lambda model: model.get_input_embeddings().weight.mul_(1.5)},
    "other frequencies, which no state dict holds": {"change": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5)},
    "fewer layers": {"fields": {"num_hidden_layers": 1}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_does_not_name_a_base_that_is_not_what_its_name_stands_for(tmp_path, name):
    module = Changed(tiny.folder(tmp_path / "base"), target_modules=["q_proj"], rank=4, seed=0)
    for attribute, value in OTHERS[name].items():
        setattr(module, attribute, value)
    tiny.three_links(module)
    assert "'path/to/base'" in " ".join(module.export(tmp_path / "out", "peft"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


# ---------------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("format_", ["merged", "peft"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_gives_other_logits_is_not_kept(tmp_path, format_, overwrite, monkeypatch):
    module, output = tiny.with_live_link(toy()), tmp_path / "out"
    module.example_input_array = torch.ones(3, 8)
    if overwrite:
        output.mkdir()
        (output / "former.txt").write_text("former")
    before, wrong = contents(tmp_path), ReferenceLogits({"input": torch.ones(3, 8)}, torch.zeros(3, 6), {})
    exporter = "adapter" if format_ == "peft" else "module"
    monkeypatch.setattr(f"cola_lightning.export.{exporter}.reference_logits", lambda *_: wrong)
    with pytest.raises(ExportError, match="deleted"):
        module.export(output, format_, overwrite=overwrite)
    assert contents(tmp_path) == before
    assert output.exists() == overwrite
    monkeypatch.undo()
    module.export(output, format_, overwrite=True)
    assert "former.txt" not in contents(output)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_with_one_wrong_element_is_not_kept(tmp_path, monkeypatch, dtype):
    module = module_of(tmp_path / "base", "opt")
    kind = type(module.model)

    def one_bit_off(model, folder, **arguments):
        save(model, folder, **arguments)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.decoder.embed_positions.weight"][-1, -1] += 1e-3  # which the probe does not reach
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    save = kind.save_pretrained
    monkeypatch.setattr(kind, "save_pretrained", one_bit_off)
    with pytest.raises(ExportError, match=r"other values \(model\.decoder\.embed_positions\.weight\)"):
        module.export(tmp_path / "merged", dtype=dtype)
    monkeypatch.setattr(kind, "from_pretrained", mock.Mock(side_effect=OSError("no file named config.json")))  # no full disk
    with pytest.raises(ExportError, match=r"loaded again.*config\.json"):
        module.export(tmp_path / "merged")
    monkeypatch.setattr(Chain, "load", lambda folder: Chain(base=module.chain.base))
    with pytest.raises(ExportError, match="other factors"):
        module.export(tmp_path / "chain", "chain")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_written_weight_of_another_size_than_its_links_is_an_error(tmp_path):
    module = tiny.with_live_link(toy())
    adapted, chain = module.adapted.copy_on_cpu(), module.full_chain()
    save_file(dict(module.merged_model().state_dict()), tmp_path / "model.safetensors")
    (name, (lora_A, lora_B)), *_ = chain[0].factors.items()
    chain[0].factors[name] = lora_A[:, 1:], lora_B
    with pytest.raises(UserError, match=rf"^base: '{name}' is .* another base"):
        prove_merged(TrainedModel(adapted=adapted, chain=chain, base_name="toy"), tmp_path)


def test_an_export_whose_configuration_says_that_it_is_quantized_is_kept(tmp_path):
    module = tiny.three_links(module_of(tmp_path / "base", "llama"))
    module.merged_model().save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    model = TrainedModel(adapted=module.adapted.copy_on_cpu(), chain=module.full_chain(), base_name="base")
    assert prove_merged(model, tmp_path / "out").startswith("its tensors were not compared: ")


def write(path, text):
    with atomic_folder(path, overwrite=True) as partial:
        (partial / "file").write_text(text)


def test_a_link_to_a_folder_stays_one_and_a_folder_that_cannot_be_flushed_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    (tmp_path / "link").symlink_to("out")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "out") == {"file": b"new"}
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(DiskError, match="unchanged"):
        write(tmp_path / "out", "newer")
    assert contents(tmp_path / "out") == {"file": b"new"}
