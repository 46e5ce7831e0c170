"""An export gives the module's logits under plain transformers and under peft, and is there whole or not at all."""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import AutoPeftModelForCausalLM, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from cola_lightning import AdaptedModel, Chain, COLACausalLM, COLAModule, COLASequenceClassifier, UserError
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

RANKS = [4, 2, 3]

# A base: its architecture, the class whose files lie in its folder, and the module's arguments.
MATRIX: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (name, "AutoModelForCausalLM", {}) for name in ("opt", "llama", "gpt2", "qwen3", "gpt_neox", "phi3")},
    **{name: (name, "AutoModel", {"num_labels": 3}) for name in ("roberta", "bert")},
    "stacked": ("llama", "AutoModelForCausalLM", {"finished_links": "stack"}),
    "half precision": ("llama", "AutoModelForCausalLM", {"dtype": "bfloat16"}),
    "half precision, stacked": ("llama", "AutoModelForCausalLM", {"dtype": "bfloat16", "finished_links": "stack"}),
    "four bits": ("llama", "AutoModelForCausalLM", {"quantization": "nf4", "finished_links": "stack"}),
    "one norm of several": ("llama", "AutoModelForCausalLM", {"modules_to_save": ["norm"]}),
    "norms in each layer": ("llama", "AutoModelForCausalLM", {"modules_to_save": ["input_layernorm", "norm"]}),
    "every linear layer": ("gpt2", "AutoModelForCausalLM", {"target_modules": "all-linear"}),
    "layers of a block": ("llama", "AutoModelForCausalLM", {"target_modules": r"model\.layers\.1\..*_proj"}),
    "linear layers of a classifier": ("roberta", "AutoModel", {"num_labels": 3, "target_modules": "all-linear"}),
    "a new head, frozen": ("llama", "AutoModel", {}),
    "a new head beside a saved base": ("llama", "AutoModel", {"save_base": True}),
    "a new pooler": ("bert", "AutoModelForMaskedLM", {"num_labels": 3}),
    "a new pooler, frozen": ("bert", "AutoModelForMaskedLM", {"num_labels": 3, "modules_to_save": ["classifier"]}),
    "a classifier by its last token": ("llama", "AutoModel", {"num_labels": 3}),
}


def module_of(folder, case):
    """A module on a tiny model that lies in the folder."""
    architecture, kind, arguments = MATRIX[case]
    name = tiny.folder(folder, architecture, kind)
    cls = COLASequenceClassifier if "num_labels" in arguments else COLACausalLM
    return cls(name, **{"target_modules": tiny.targets(architecture), "rank": 4, "alpha": 6, "seed": 0} | arguments)


def saved(module, path):
    """The checkpoint of a module with three links."""
    tiny.three_links(module)
    run = trainer(path)
    run.strategy.connect(module)
    run.save_checkpoint(path / "end.ckpt")
    return path / "end.ckpt"


def command(*words):
    return main(["export", *map(str, words)])


def difference(mine, theirs):
    """Between logits, as a share of the largest."""
    return ((mine - theirs).abs().max() / max(1, theirs.abs().max())).item()


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


@dataclass
class Exported:
    """A module with three links, and the folder of its exports."""

    case: str
    folder: Path
    module: Any
    lines: dict[str, list[str]]
    logits: torch.Tensor

    @property
    def is_classifier(self):
        return isinstance(self.module, COLASequenceClassifier)

    def load(self, name, **arguments):
        return getattr(transformers, self.module.auto_class).from_pretrained(self.folder / name, **arguments)

    def base(self):
        """The base as its files are; what is new there is drawn anew."""
        torch.manual_seed(99)
        fields = {"num_labels": 3} if self.is_classifier else {}
        base = self.load("base", dtype=MATRIX[self.case][2].get("dtype", "float32"), **fields).float()
        if base.config.pad_token_id is None:
            base.config.pad_token_id = self.module.tokenizer.pad_token_id
        return base


@pytest.fixture(scope="module", params=MATRIX)
def exported(request, tmp_path_factory):
    if request.param == "four bits":
        pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("exported")
    module = COLAModule.load_from_checkpoint(saved(module_of(folder / "base", request.param), folder))
    lines = {format_: module.export(folder / format_, format_) for format_ in ("merged", "peft")}
    module.upcast()
    return Exported(request.param, folder, module, lines, tiny.logits(module.model))


def test_plain_transformers_gives_the_modules_logits(exported):
    model, info = exported.load("merged", output_loading_info=True)
    assert {name: len(keys) for name, keys in info.items()} == dict.fromkeys(info, 0)
    assert {"missing_keys", "unexpected_keys"} <= info.keys()
    is_rounded = model.dtype == torch.bfloat16
    assert difference(tiny.logits(model), exported.logits) <= (0.05 if is_rounded else 1e-5)
    assert difference(tiny.logits(model), tiny.logits(exported.base())) > 1e-2
    assert "its logits differ from the module's by at most " in " ".join(exported.lines["merged"])
    assert torch.equal(tiny.logits(loaded_as_in_card(exported.folder / "merged")), tiny.logits(model))


def test_weights_are_tied_where_the_bases_are(exported):
    def tied(model):
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return sorted(group for group in names.values() if len(group) > 1)

    groups = tied(exported.load("merged"))
    assert groups == tied(exported.base())
    assert bool(groups) == (MATRIX[exported.case][0] in ("opt", "gpt2"))


def test_tokenizer_and_generation_config_come_along(exported):
    base, merged = exported.folder / "base", exported.folder / "merged"
    for format_ in ("merged", "peft"):
        ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (exported.folder / format_, base))
        assert [ours(text)["input_ids"] for text in tiny.TEXT] == [theirs(text)["input_ids"] for text in tiny.TEXT]
    if exported.is_classifier or not (base / "generation_config.json").exists():
        return
    assert GenerationConfig.from_pretrained(merged).to_diff_dict() == GenerationConfig.from_pretrained(base).to_diff_dict()
    ids = ours("The cat sat", return_tensors="pt")["input_ids"]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    expected = exported.module.merged_model().eval().generate(ids, **how)
    assert torch.equal(exported.load("merged", dtype="float32").generate(ids, **how), expected) or "half" in exported.case
    assert ours.decode(expected[0], skip_special_tokens=True).startswith("The cat sat")


def test_peft_gives_the_modules_logits_on_the_base_that_the_adapter_names(exported):
    without_links = exported.module.merged_model(0)
    without_links.load_state_dict(exported.module.live_link().extras, strict=False)
    assert difference(tiny.logits(without_links), exported.logits) > 1e-2
    base = without_links if exported.case == "four bits" else exported.base()
    model = PeftModel.from_pretrained(base, exported.folder / "peft")
    assert difference(tiny.logits(model), exported.logits) <= 1e-5
    layers = [name for name, part in model.base_model.model.named_modules() if hasattr(part, "lora_A")]
    assert sorted(layers) == sorted(exported.module.full_chain().layers)
    merged = model.merge_and_unload()
    assert type(merged) is type(without_links)
    assert difference(tiny.logits(merged), exported.logits) <= 1e-5


def test_the_adapter_is_of_the_ranks_sum_and_scaled_by_one(exported):
    config = json.loads((exported.folder / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == sum(RANKS)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["fan_in_fan_out"] == (MATRIX[exported.case][0] == "gpt2")
    assert config["task_type"] == ("SEQ_CLS" if exported.is_classifier else "CAUSAL_LM")
    assert (config["base_model_name_or_path"], config["revision"]) == (str(exported.folder / "base"), None)
    rank, base, last = exported.lines["peft"]
    assert rank == "one adapter of rank 9"
    assert f"transformers.{exported.module.auto_class}.from_pretrained('{exported.folder / 'base'}', " in base
    assert "loaded again with peft, its logits differ from the module's by at most " in last


@pytest.mark.parametrize(
    ("layers", "others"),
    [(["0.q", "1.q", "0.v"], []), (["0.q"], ["1.q"]), (["fc", "b.fc"], []), (["fc"], ["b.fc"]), (["fc", "a.fc"], ["b.a.fc"])],
)
def test_targets_whose_short_names_others_have_too_are_adapted_alone(layers, others):
    base = nn.Module()
    for name in layers + others:
        parent, _, child = name.rpartition(".")
        for end in range(len(parent.split(".")) if parent else 0):
            inner = ".".join(parent.split(".")[: end + 1])
            if inner not in dict(base.named_modules()):
                base.get_submodule(inner.rpartition(".")[0]).register_module(inner.rpartition(".")[2], nn.Module())
        base.get_submodule(parent).register_module(child, nn.Linear(4, 4))
    config = adapter.peft_config(adapter.AdapterBase(base, "base", (), ""), layers, 2)
    adapted = inject_adapter_in_model(config, base)
    assert sorted(name for name, part in adapted.named_modules() if hasattr(part, "lora_A")) == sorted(layers)


def test_what_was_trained_in_half_precision_may_leave_in_float32(tmp_path):
    module = COLACausalLM(tiny.folder(tmp_path / "base"), target_modules=None, dtype="bfloat16")
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


# ---------------------------------------------------------------------- recompression


@pytest.mark.parametrize("rank", [1, 5, 7])
@pytest.mark.parametrize(("n_in", "n_out"), [(20, 12), (4, 20)])
def test_compression_is_the_truncated_svd_of_the_full_update(n_in, n_out, rank):
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = (torch.randn(shape, generator=generator) for shape in ((7, n_in), (n_out, 7)))
    u, values, v = torch.linalg.svd(lora_B.double() @ lora_A.double(), full_matrices=False)
    small_A, small_B, error = adapter.compress(lora_A, lora_B, rank)
    assert (small_A.shape, small_B.shape) == ((rank, n_in), (n_out, rank))
    closest = u[:, :rank] * values[:rank] @ v[:rank]
    torch.testing.assert_close(small_B.double() @ small_A.double(), closest, rtol=1e-5, atol=1e-5)
    assert error == pytest.approx((values[rank:].norm() / values.norm()).item(), abs=1e-12)
    assert adapter.compress(lora_A, torch.zeros(n_out, 7), rank)[2] == 0


def test_a_recompressed_adapter_holds_the_closest_update_and_says_how_far_it_is(tmp_path):
    module = tiny.three_links(module_of(tmp_path / "base", "gpt2"))
    lines = module.export(tmp_path / "peft", "peft", max_rank=5)
    chain, closest = module.full_chain(), module.merged_model(0)
    for name, line in zip(chain.layers, lines[:-3], strict=True):
        update = chain.delta(name).double()
        u, values, v = torch.linalg.svd(update, full_matrices=False)
        nearest = u[:, :5] * values[:5] @ v[:5]
        label, _, error = line.partition(": relative error ")
        assert (label, float(error)) == (name, pytest.approx(((update - nearest).norm() / update.norm()).item(), rel=1e-2))
        with torch.no_grad():
            closest.get_submodule(name).weight.add_(nearest.T)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    loaded = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")
    assert difference(tiny.logits(loaded), tiny.logits(closest)) <= 1e-5
    assert len(read_chain(tmp_path / "peft")) == 1  # it is the chain no longer
    plain = module.export(tmp_path / "plain", "peft")
    assert module.export(tmp_path / "large", "peft", max_rank=9) == plain
    same, as_well = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "large"))
    assert_bit_equal(same, as_well)


# ---------------------------------------------------------------------- modules that are not Hugging Face's


class TiedToy(Toy):
    """One weight under two names, neither of which is adapted, and a batch norm."""

    def build_model(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8), nn.Linear(8, 6))
        model.append(nn.Linear(6, 8)).append(nn.Linear(8, 6))
        model[6].weight = model[4].weight
        return model


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


class HubModel(nn.Sequential, PyTorchModelHubMixin):
    """A model with a save_pretrained that is not transformers'."""


class HubToy(Toy):
    def build_model(self):
        return HubModel(nn.Linear(8, 6))


class HalfToy(Toy):
    """A body in bfloat16 and a head in float32."""

    def build_model(self):
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
        model[0].bfloat16()
        return model

    def training_step(self, batch, batch_idx):
        return self.model[1](self.model[0](batch[0].bfloat16()).float()).square().mean()


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
    """The module's checkpoint after three links of two steps."""
    dtype = torch.float64 if arguments.get("precision") == "64-true" else torch.float32
    chain = {"every_n_train_steps": 2} if module.hparams.get("target_modules", "") is not None else None
    run = trainer(path, chain=chain, max_steps=6, **arguments)
    run.fit(module, batches(dtype=dtype))
    run.save_checkpoint(path / "end.ckpt", weights_only=False)
    return path / "end.ckpt"


PLAIN = {
    Toy: {"target_modules": ["0"]},
    TiedToy: {"target_modules": ["0"]},
    TurnedToy: {},
    HubToy: {},
    HalfToy: {"target_modules": ["1"]},
}


@pytest.mark.parametrize("cls", PLAIN)
def test_a_plain_modules_export_is_a_state_dict(tmp_path, capsys, cls):
    module = toy(cls, **PLAIN[cls])
    path = trained_toy(tmp_path, module)
    assert command("--checkpoint", path, "--format", "merged", "--output", tmp_path / "merged") == 0
    assert "no logits were compared, for no input is known" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model.safetensors"]
    plain = cls().build_model()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert_bit_equal(plain.state_dict(), dict(module.merged_model().state_dict()))
    if cls is not HalfToy:
        x = torch.randn(5, 8)
        torch.testing.assert_close(plain.eval()(x), module.model.eval()(x), rtol=0, atol=1e-6)
        assert (plain(x) - module.merged_model(0).eval()(x)).abs().max() > 1e-4


def test_complex_buffers_stay_complex(tmp_path):
    module = toy(TurnedToy)
    trained_toy(tmp_path, module)
    module.export(tmp_path / "merged", dtype="bfloat16")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(tensors["rotation"], module.model.rotation)
    assert tensors["up.weight"].dtype == torch.bfloat16
    adapted = AdaptedModel.of(Turned, target_modules=["up"], rank=2, finished_links="stack")
    adapted.cast(torch.bfloat16)
    adapted.cast(torch.float32)
    assert torch.equal(adapted.model.rotation, module.model.rotation)


def test_a_plain_module_leaves_in_float32(tmp_path):
    module = toy(ExampleToy)
    path = trained_toy(tmp_path, module, precision="64-true")
    assert command("--checkpoint", path, "--format", "merged", "--output", tmp_path / "merged") == 0
    expected = {name: value.float() for name, value in module.merged_model().state_dict().items()}
    assert_bit_equal(load_file(tmp_path / "merged" / "model.safetensors"), expected)


def test_full_fine_tuning_is_exported_merged(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.fit(module := toy(target_modules=None), batches())
    run.save_checkpoint(tmp_path / "end.ckpt")
    for format_, status in {"peft": 2, "chain": 2, "merged": 0}.items():
        assert command("--checkpoint", tmp_path / "end.ckpt", "--format", format_, "--output", tmp_path / "out") == status
    assert_bit_equal(load_file(tmp_path / "out" / "model.safetensors"), dict(module.model.state_dict()))


class Several(nn.Module):
    """A model that takes any number of inputs, and masks the last two of its logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, *inputs):
        return self.fc(sum(inputs)).masked_fill(torch.arange(6) > 3, -torch.inf)


class Embedded(nn.Module):
    """A model of tokens with a configuration of its own."""

    def __init__(self):
        super().__init__()
        self.config = argparse.Namespace(width=8)
        self.tokens, self.fc = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, input_ids):
        return self.fc(self.tokens(input_ids))


SIZES = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
T5 = transformers.T5Config(**SIZES, decoder_start_token_id=0)
IDS = torch.arange(6)[None]
EXAMPLES = {
    "a tensor": (lambda: Toy.build_model(None), torch.ones(3, 8)),
    "any number of tensors, and infinite logits": (Several, (torch.ones(3, 8), torch.ones(3, 8))),
    "an encoder-decoder": (lambda: transformers.T5ForConditionalGeneration(T5), {"input_ids": IDS, "decoder_input_ids": IDS}),
    "a configuration of its own": (Embedded, {"input_ids": IDS}),
}


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("format_", ["merged", "peft"])
def test_an_example_input_is_what_logits_are_compared_for(tmp_path, kind, format_):
    build, example = EXAMPLES[kind]

    class Own(COLAModule):
        def build_model(self):
            return build()

    module = tiny.with_live_link(Own(target_modules="all-linear", rank=2, seed=0))
    lines = module.export(tmp_path / "unknown", format_)
    assert "for no input is known" in lines[-1]
    assert format_ == "merged" or "its base: module.merged_model(0)" in lines
    module.example_input_array = example
    line = module.export(tmp_path / "out", format_)[-1]
    assert re.search(r"its logits differ from the module's by at most [\d.e-]+, where the largest is \d", line)
    if format_ == "peft":
        model = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "out").eval()
        expected = ReferenceLogits.of(module.model.eval(), verify.reference_logits(model, example).inputs).logits
        torch.testing.assert_close(verify.reference_logits(model, example).logits, expected, rtol=0, atol=1e-5)


def test_an_example_that_the_model_does_not_take_leaves_no_export(tmp_path):
    module = toy()
    module.example_input_array = torch.ones(3, 2, 4)
    with pytest.raises(RuntimeError):
        module.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert module.export(tmp_path / "out", verify=False) == ["not compared"]


@pytest.mark.parametrize("example", [torch.ones(2, 3), (torch.ones(2, 3),), {"x": torch.ones(2, 3)}, (torch.ones(2, 3), 3.0)])
@pytest.mark.parametrize("kind", [lambda y: y, lambda y: (y, None), lambda y: {"y": y}])
def test_examples_and_outputs_may_be_of_any_kind(example, kind):
    class Scale(nn.Module):
        def forward(self, x, by=3.0):
            return kind(x * by)

    assert torch.equal(reference_logits(Scale(), example).logits, torch.full((2, 3), 3.0))
    assert reference_logits(Scale()) is None


def test_a_classifier_that_reads_where_a_text_ends_is_compared_too(tmp_path):
    name = tiny.folder(tmp_path / "base", "bart", "AutoModel")
    module = tiny.three_links(COLASequenceClassifier(name, target_modules=["q_proj", "v_proj"], rank=4, num_labels=3, seed=0))
    for format_ in ("merged", "peft"):
        assert "its logits differ from the module's by at most" in module.export(tmp_path / format_, format_)[-1]


@pytest.mark.parametrize(("end", "length"), [(1, 13), (None, 12), ([1, 2], 12), (50_256, 12)])
def test_a_probe_needs_no_end_of_text(tmp_path, end, length):
    model = module_of(tmp_path / "base", "llama").merged_model()
    model.config.eos_token_id = end
    assert reference_logits(model).logits.shape == (2, length, 400)


# ---------------------------------------------------------------------- what is refused, and what is left behind


def test_a_buffer_that_training_moved_fits_no_adapter(tmp_path, capsys):
    path = trained_toy(tmp_path, toy(TiedToy, target_modules=["0"]))
    before = contents(tmp_path)
    assert command("--checkpoint", path, "--format", "peft", "--output", tmp_path / "out") == 2
    assert re.match(r"error: format: .*'2\.running_mean'", capsys.readouterr().err.splitlines()[-1])
    assert contents(tmp_path) == before


@pytest.fixture(params=["merged", "peft"])
def write(request):
    """Writes a small chain in one of two formats."""
    module = tiny.with_live_link(toy(ExampleToy))

    def write(folder, **how):
        return module.export(folder, request.param, **how)

    write.format = request.param
    return write


def test_an_output_that_is_not_empty_is_replaced_only_when_asked(tmp_path, write):
    output = tmp_path / "out"
    output.mkdir()
    (output / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="output: expected a folder that does not exist"):
        write(output)
    assert contents(tmp_path) == {"out/kept.txt": b"mine"}
    (output / "inner").mkdir()
    with pytest.raises(UserError, match="output: expected a folder that does not exist"):  # a folder with folders never is
        write(output, overwrite=True)
    (output / "inner").rmdir()
    (tmp_path / ".out.0123.partial").mkdir()  # of an export that was killed
    write(output, overwrite=True)
    assert "kept.txt" not in [path.name for path in output.iterdir()]


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


@pytest.mark.parametrize("format_", ["merged", "peft", "chain"])
def test_an_output_that_holds_the_base_is_not_overwritten(tmp_path, format_):
    module = module_of(tmp_path / "base", "opt")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"output: expected a folder that does not hold the base"):
        module.export(tmp_path / "base", format_, overwrite=True)
    assert contents(tmp_path) == before


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


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # all that peft says of names that it does not know
def test_an_adapter_that_peft_loads_in_part_or_not_at_all_is_not_kept(tmp_path, monkeypatch):
    module = tiny.three_links(module_of(tmp_path / "base", "opt"))
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "PREFIX", "base_model.")
        with pytest.raises(ExportError, match="loaded again with peft, its logits differ"):
            module.export(tmp_path / "peft", "peft")

    def fail(*_, **__):
        raise KeyError("input_layernorm.weight")

    monkeypatch.setattr(PeftModel, "from_pretrained", fail)
    with pytest.raises(KeyError, match="input_layernorm"):
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
    monkeypatch.setattr(export, "save_file", lambda tensors, path: save_file({k: v + 1 for k, v in tensors.items()}, path))
    for of, name in ((module, r"model\.decoder\.embed_positions\.weight"), (toy(), r"0\.weight")):
        with pytest.raises(ExportError, match=f"'{name}' was loaded again with another value"):
            of.export(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_so_is_a_chain_and_the_old_folder_stays(tmp_path, monkeypatch):
    module = toy()
    module.export(tmp_path / "chain", "chain")
    before = contents(tmp_path)
    module.tie_knot()
    monkeypatch.setattr(Chain, "load", lambda folder: Chain(base=module.chain.base))
    for name, overwrite in (("new", False), ("chain", True)):
        with pytest.raises(ExportError, match="other factors than were written: it is not kept"):
            module.export(tmp_path / name, "chain", overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.filterwarnings("error")
def test_an_export_is_silent_and_leaves_progress_bars_as_the_user_set_them(tmp_path, capsys):
    module = tiny.three_links(module_of(tmp_path / "base", "gpt2"))
    capsys.readouterr()
    module.export(tmp_path / "merged")
    module.export(tmp_path / "peft", "peft")
    assert capsys.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    with quiet():
        assert not are_progress_bars_disabled()  # a download takes long
        assert not logging.is_progress_bar_enabled()
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with quiet():
            pass
        assert are_progress_bars_disabled()
        assert not logging.is_progress_bar_enabled()
    finally:
        enable_progress_bars()
        logging.enable_progress_bar()


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


# ---------------------------------------------------------------------- the command


@dataclass
class Trained:
    """A module whose third link was trained for two steps, and its checkpoint."""

    module: Any
    path: Path

    def export(self, format_, output, *words):
        return command("--checkpoint", self.path, "--format", format_, "--output", output, *words)


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


@pytest.mark.parametrize("links", [None, 0, 2])
@pytest.mark.parametrize("format_", ["merged", "peft", "chain"])
def test_the_first_links_by_the_command(trained, format_, links, tmp_path, capsys):
    words = [] if links is None else ["--links", links]
    if format_ == "peft" and links == 0:
        assert trained.export(format_, tmp_path / "out", *words) == 2
        assert "error: format: " in capsys.readouterr().err
        return
    assert trained.export(format_, tmp_path / "out", *words) == 0
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    if format_ == "chain":
        chain, whole = Chain.load(tmp_path / "out"), trained.module.full_chain()
        assert len(chain) == (3 if links is None else links)
        assert chain.is_beginning_of(whole)
        assert chain.base == whole.base
        return
    if format_ == "merged":
        model = getattr(transformers, trained.module.auto_class).from_pretrained(tmp_path / "out")
        assert model.config.dtype == torch.float32
    else:
        model = PeftModel.from_pretrained(trained.module.merged_model(0), tmp_path / "out")
        assert model.peft_config["default"].r == sum(RANKS[:links])
    assert difference(tiny.logits(model), tiny.logits(trained.module.merged_model(links))) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_by_the_command(trained, dtype, tmp_path):
    assert trained.export("merged", tmp_path / "out", "--dtype", dtype) == 0
    model = getattr(transformers, trained.module.auto_class).from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    expected = {name: value.to(getattr(torch, dtype)) for name, value in trained.module.merged_model().state_dict().items()}
    assert_bit_equal(model.state_dict(), expected)


def test_recompressed_replaced_and_not_compared_by_the_command(trained, tmp_path, capsys):
    assert trained.export("peft", tmp_path / "out", "--max_rank", 2) == 0
    assert capsys.readouterr().out.count(": relative error 0.") == 4
    assert trained.export("peft", tmp_path / "out") == 2
    assert trained.export("peft", tmp_path / "out", "--overwrite", "--no_verify") == 0
    assert "not compared" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == sum(RANKS)


MISTAKES = {
    "none.ckpt merged out": "checkpoint: .*none.ckpt",
    "chain merged out": "checkpoint: .*chain",
    "loss.ckpt merged out": "checkpoint: .*LossToy .* 'loss' is not plain",
    "unknown.ckpt merged out": "checkpoint: .*'a_script.Toy'",
    "plain.ckpt gguf out": "argument --format",
    "plain.ckpt merged file --overwrite": "output: .*file'",
    "plain.ckpt chain out --links 9": "links: expected 0 to 2, .*received 9",
    "plain.ckpt merged out --links -1": "links: expected 0 to 2, .*received -1",
}


def test_a_mistake_is_one_line_and_changes_nothing(tmp_path, capsys):
    for name, module in {"plain": toy(), "loss": toy(LossToy, loss=nn.MSELoss())}.items():
        run = trainer(tmp_path, chain={"every_n_train_steps": 1}, max_steps=2)
        run.fit(module, batches())
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    checkpoint = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    checkpoint["state_dict"]["cola"]["module"]["class_path"] = "a_script.Toy"
    torch.save(checkpoint, tmp_path / "unknown.ckpt")
    read_chain(tmp_path / "plain.ckpt").save(tmp_path / "chain")
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    for words, message in MISTAKES.items():
        path, format_, output, *more = words.split()
        status = command("--checkpoint", tmp_path / path, "--format", format_, "--output", tmp_path / output, *more)
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert re.match(f"error: {message}", err.splitlines()[-1]), err
        assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["merge", "stack"])
def test_what_a_precision_has_rounded_is_exported_as_it_was_trained_and_the_base_as_it_was(tmp_path, capsys, mode):
    folder = tiny.folder(tmp_path, "llama")
    module = COLACausalLM(folder, rank=2, alpha=4, seed=0, finished_links=mode, lr_schedule="constant")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 300, (4, 2, 8)).unbind()]
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2, precision="bf16-true")
    run.fit(module, *(DataLoader(rows, batch_size=None) for _ in range(2)))
    run.save_checkpoint(tmp_path / "end.ckpt")
    trained = Trained(module, tmp_path / "end.ckpt")
    assert trained.export("peft", tmp_path / "adapter") == 0
    printed = capsys.readouterr().out
    assert f", dtype='{'bfloat16' if mode == 'stack' else 'float32'}'" in printed
    assert float(re.search(r"differ from the module's by at most ([^,]*),", printed)[1]) <= 1e-4
    assert trained.export("merged", tmp_path / "merged") == 0
    assert trained.export("merged", tmp_path / "base", "--links", "0") == 0
    base, again = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "base"))
    assert_bit_equal(again.state_dict(), base.state_dict())


# ---------------------------------------------------------------------- a base that is not what its name stands for


class Noisy(COLACausalLM):
    """Other weights."""

    def build_model(self):
        model = super().build_model()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        return model


class Wider(COLACausalLM):
    """More tokens."""

    def build_model(self):
        model = super().build_model()
        model.resize_token_embeddings(410)
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


ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


OTHERS = [(Noisy, {}), (Wider, {}), (Activated, {}), (Rotated, {})]
FIELDS = ({"hidden_act": "gelu"}, {"num_hidden_layers": 1}, {"rope_parameters": ROPE})
OTHERS += [(Fielded, {"fields": fields}) for fields in FIELDS]


@pytest.mark.parametrize(("cls", "arguments"), OTHERS)
@pytest.mark.parametrize("words", [[], ["--max_rank", 2]], ids=str)
def test_a_base_that_is_not_what_its_name_stands_for_gets_no_adapter(tmp_path, capsys, cls, arguments, words):
    path = saved(cls(tiny.folder(tmp_path / "base"), target_modules=["q_proj"], rank=4, seed=0, **arguments), tmp_path)
    assert command("--checkpoint", path, "--output", tmp_path / "out", "--format", "peft", *words) in (1, 2)
    assert re.match(r"error: .*expected (--format )?merged", capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()
    if cls not in (Activated, Rotated):  # no files hold what these compute
        assert command("--checkpoint", path, "--output", tmp_path / "out", "--format", "merged") == 0


@pytest.mark.parametrize("fields", [{"hidden_act": "silu", "use_cache": True}, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}])
def test_fields_that_are_the_named_ones_change_nothing(tmp_path, capsys, fields):
    name = tiny.folder(tmp_path / "base")
    path = saved(Fielded(name, fields=fields, target_modules=["q_proj"], rank=4, seed=0), tmp_path)
    assert command("--checkpoint", path, "--format", "peft", "--output", tmp_path / "out") == 0, capsys.readouterr().err
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert difference(tiny.logits(model), tiny.logits(COLAModule.load_from_checkpoint(path).model)) <= 1e-5


@pytest.mark.parametrize(
    "labels", [{"label_names": ["bad", "good"]}, {"label_names": ['"mixed"', "bad", "good"]}, {"num_labels": 2}]
)
def test_an_adapters_card_loads_it_with_its_labels(tmp_path, labels):
    name = tiny.folder(tmp_path / "base", "bert", "AutoModel")
    module = tiny.three_links(COLASequenceClassifier(name, target_modules=["query"], rank=4, seed=0, **labels))
    line = module.export(tmp_path / "out", "peft")[1]
    assert f"num_labels={labels.get('num_labels', len(labels.get('label_names', 'ab')))}" in line
    model = loaded_as_in_card(tmp_path / "out")
    assert difference(tiny.logits(model), tiny.logits(module.model)) <= 1e-5
    assert model.config.id2label == dict(enumerate(labels.get("label_names", ["LABEL_0", "LABEL_1"])))


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
        return nn.Sequential(first, nn.GELU(), nn.Flatten(1), nn.Linear(288, 5))

    def training_step(self, batch, batch_idx):
        return self.model(self.example_input_array).square().mean()


def conv_checkpoint(path, **arguments):
    module = ConvToy(**{"target_modules": ["0", "3"], "rank": 4, "alpha": 6, "seed": 0} | arguments)
    run = trainer(path, chain={"every_n_train_steps": 2, "ranks": RANKS}, max_steps=6)
    run.fit(module, DataLoader(range(6), batch_size=1))
    run.save_checkpoint(path / "end.ckpt")
    return Trained(module, path / "end.ckpt")


@pytest.mark.parametrize("arguments", [{}, {"kind": "1d"}, {"finished_links": "stack"}, {"links": 2}], ids=str)
def test_exports_give_the_logits_of_a_module_with_convolutions(tmp_path, capsys, arguments):
    links = arguments.pop("links", 3)
    trained = conv_checkpoint(tmp_path, **arguments)
    module, folder = trained.module, tmp_path / "peft"
    assert trained.export("peft", folder, "--links", links) == 0, capsys.readouterr().err
    rank, kernel = sum(RANKS[:links]), (3, 1) if module.kind == "2d" else (3,)
    factors = load_file(folder / "adapter_model.safetensors")
    assert factors["base_model.model.0.lora_A.weight"].shape == (rank, 3, *kernel)
    assert factors["base_model.model.0.lora_B.weight"].shape == (8, rank, *[1] * len(kernel))
    x = torch.randn(4, *module.example_input_array.shape[1:])
    model = PeftModel.from_pretrained(module.merged_model(0), folder).eval()
    expected = module.merged_model(links).eval()(x)
    assert difference(model(x), expected) <= 1e-5
    assert difference(model.merge_and_unload()(x), expected) <= 1e-5
    assert difference(module.merged_model(0)(x), expected) > 1e-3
    again = read_chain(folder)
    assert [link.rank for link in again.links] == RANKS[:links]
    torch.testing.assert_close(again.delta("0"), module.full_chain().truncate(links).delta("0"))
    begun = ConvToy(kind=module.kind, target_modules=["0", "3"], rank=4, alpha=6, seed=0, init_chain=str(folder))
    assert difference(begun.model.eval()(x), expected) <= 1e-5
    assert trained.export("peft", tmp_path / "small", "--max_rank", 6) == 0
    assert load_file(tmp_path / "small" / "adapter_model.safetensors")["base_model.model.0.lora_A.weight"].shape[0] == 6
    assert trained.export("merged", tmp_path / "merged", "--links", links) == 0
    plain = ConvToy(kind=module.kind).build_model()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert difference(plain.eval()(x), expected) <= 1e-5


def test_convolutions_of_which_pefts_lora_would_be_another_are_refused(tmp_path, capsys):
    trained = conv_checkpoint(tmp_path, dilation=2)
    assert trained.export("peft", tmp_path / "out") == 2
    assert "format: expected merged, for PEFT has no LoRA, or another, for '0', a Conv2d(" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert trained.export("merged", tmp_path / "out") == 0


# ---------------------------------------------------------------------- modules that PEFT matches by the end of their names


class Named(Toy):
    """Modules whose names end in one another's."""

    def build_model(self):
        parts = {"fc": nn.Linear(8, 12), "final_norm": nn.LayerNorm(12), "norm": nn.LayerNorm(12), "out": nn.Linear(12, 6)}
        model = nn.Sequential()
        for name, part in parts.items():
            model.add_module(name, part)
        return model


def test_a_name_that_ends_others_is_written_with_all_that_peft_takes_for_it(tmp_path):
    module = tiny.three_links(toy(Named, modules_to_save=["norm"], rank=4))
    module.export(tmp_path / "out", "peft")
    x = torch.randn(3, 8)
    model = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "out")
    torch.testing.assert_close(model(x), module.model.eval()(x), rtol=0, atol=1e-5)


def test_a_checkpoint_that_does_not_say_which_modules_it_trained_is_resumed_with_them_named(tmp_path):
    """As an earlier release wrote it."""
    name = tiny.folder(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    ids = torch.randint(2, 400, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}
    data = DataLoader([batch] * 2, batch_size=None)

    def fit(max_epochs, path=None, **more):
        module = COLASequenceClassifier(name, target_modules=["query"], rank=2, num_labels=3, seed=0, **more)
        run = trainer(tmp_path, max_epochs=max_epochs, limit_val_batches=0, chain={"every_n_train_steps": 5})
        run.fit(module, data, data, ckpt_path=path)
        return run

    path = tmp_path / "end.ckpt"
    fit(1, modules_to_save=["classifier"]).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]["cola"]
    del state["modules_to_save"], state["module"]["init_args"]["modules_to_save"]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"Missing key\(s\) in state_dict: .*model\.bert\.pooler\.dense"):
        fit(2, path)
    assert fit(2, path, modules_to_save=["classifier"]).global_step == 4
