"""4-bit bases: they compute with the weights that bitsandbytes gives, nothing writes those, and they leave de-quantised."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from cola_lightning import (
    COLACausalLM,
    COLAModule,
    COLASequenceClassifier,
    EpochDataModule,
    UserError,
    inject_lora,
    lora_layers,
    strip_lora,
)
from cola_lightning.chain.base import describe_base
from cola_lightning.cli import main
from cola_lightning.errors import ExportError
from cola_lightning.export import verify
from cola_lightning.export.verify import ReferenceLogits, reference_logits
from cola_lightning.lora import linear4bit
from tests import tiny
from tests.toy import Toy, ValidatedToy, adapt_layer, assert_bit_equal, batches, toy, trainer, weights

pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

# peft 0.21 asks each transformers model for it; transformers 5.24 deprecates it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

NF4 = {"quantization": "nf4", "finished_links": "stack"}


@pytest.fixture(autouse=True)
def _a_cpu_on_which_bitsandbytes_packs_weights_anew(monkeypatch):
    """There its own layer, in evaluation, writes its weight and gives other outputs."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def difference(mine, theirs):
    return (mine - theirs).abs().max().item()


def assert_near(mine, theirs, relative):
    """Close in norm, which for gradients, whose entries are of many sizes, says more than their entries."""
    assert torch.linalg.vector_norm(theirs) > 0
    assert torch.linalg.vector_norm(mine.double() - theirs.double()) <= relative * torch.linalg.vector_norm(theirs.double())


# ---------------------------------------------------------------------- one layer


def quantized(dtype=torch.float32, bias=True):
    """A layer of a size that bitsandbytes can pack anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=bias, dtype=dtype))
    linear4bit.quantize(model, dtype)
    return model[0]


def adapted(dtype=torch.float32, bias=True):
    layer = adapt_layer(quantized(dtype, bias), 4, 6.0, finished_links="stack")
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
    return layer


def inputs(dtype=torch.float32):
    return torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def plain_output(layer, x):
    """What a plain layer makes of the weight that bitsandbytes gives, and of the link, in float32."""
    weight = dequantize_4bit(layer.weight.detach(), layer.weight.quant_state).float()
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), weight + layer.alpha / layer.rank * layer.lora_B @ layer.lora_A, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "is_autocast", "relative"),
    [(torch.float32, False, 1e-5), (torch.float32, True, 1e-2), (torch.bfloat16, False, 1e-2)],
    ids=["float32", "autocast", "bfloat16"],
)
def test_outputs_and_gradients_are_those_of_a_plain_layer(bias, dtype, is_autocast, relative):
    layer, x = adapted(dtype, bias), inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        y = layer(x)
    expected, leaves = plain_output(layer, x), [x, layer.lora_A, layer.lora_B]
    assert layer.dtype == dtype
    assert y.dtype == (torch.bfloat16 if is_autocast else dtype)
    assert_near(y, expected, relative)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    mine, theirs = torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream.float())
    for gradient, wanted in zip(mine, theirs, strict=True):
        assert_near(gradient, wanted, relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [adapted, quantized])
def test_evaluation_computes_as_training_does_and_leaves_the_weight_alone(make, dtype):
    layer, x = make(dtype), inputs(dtype).detach()
    expected, before = layer.train()(x), {name: value.clone() for name, value in layer.state_dict().items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer.eval()(x), expected)
    assert torch.equal(layer.train()(x), expected)
    assert_bit_equal(layer.state_dict(), before)


def test_finished_links_stay_beside_the_weight():
    layer, x = adapted(), inputs().detach()
    expected, before = layer(x), layer.weight.detach().clone()
    layer.finish()
    layer.reset(rank=2)
    assert_near(layer(x), expected, 1e-6)
    assert torch.equal(layer.weight, before)


# ---------------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("llama"))


def make(base, cls=COLACausalLM, **arguments):
    how = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 6, "seed": 0, "optimizer": lambda p: AdamW(p, lr=1e-2)}
    return cls(base, **how | NF4 | arguments)


class Rows(EpochDataModule):
    """Six batches of random tokens, and one of validation."""

    def __init__(self, n_labels=None):
        super().__init__(batch_size=2)
        self.n_labels = n_labels

    def setup(self, stage):
        ids = torch.randint(2, 400, (14, 8), generator=torch.Generator().manual_seed(3))
        labels = ids if self.n_labels is None else ids[:, 0] % self.n_labels
        rows = [{"input_ids": ids[k], "attention_mask": torch.ones_like(ids[k]), "labels": labels[k]} for k in range(14)]
        self.train, self.val = rows[:12], rows[12:]


def fit(folder, module, *callbacks, ckpt_path=None, n_labels=None, **options):
    """Three links of two steps."""
    options = {"max_steps": 6, "enable_checkpointing": bool(callbacks)} | options
    run = trainer(folder, *callbacks, chain={"every_n_train_steps": 2}, **options)
    run.fit(module, datamodule=Rows(n_labels), ckpt_path=ckpt_path)
    return module


def kinds(model):
    """The type of each linear layer, by name."""
    return {name: type(part).__name__ for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def test_a_knot_leaves_the_loss_and_training_the_weights(base, tmp_path):
    class Watched(COLACausalLM):
        @torch.no_grad()
        def loss(self):
            data = Rows()
            data.setup("fit")
            return self.step(data.collate(data.train)).loss.item()

        def tie_knot(self, **how):
            before = self.loss()
            link = super().tie_knot(**how)
            moved.append(abs(self.loss() - before))
            return link

    moved, module = [], make(base, Watched)
    module.configure_model()
    frozen = {name: value.clone() for name, value in module.model.state_dict().items() if ".lora_" not in name}
    assert any(name.endswith("q_proj.weight.absmax") for name in frozen)
    first = module.loss()
    fit(tmp_path, module)
    assert len(moved) == 2
    assert max(moved) <= 1e-4
    assert all(link.norm() > 0.1 for link in module.chain.links)
    assert module.loss() < first - 0.01
    assert_bit_equal({name: value for name, value in module.model.state_dict().items() if ".lora_" not in name}, frozen)


def test_a_base_made_again_is_the_same(base):
    first, second, plain = make(base), make(base), make(base, quantization=None)
    for module in (first, second, plain):
        module.configure_model()
    assert first.chain.base == second.chain.base
    assert first.chain.base.dtypes == ["nf4"]
    assert plain.chain.base.fingerprint != first.chain.base.fingerprint
    assert_bit_equal(first.model.state_dict(), second.model.state_dict())


def test_the_body_is_quantised_and_the_head_is_not(base):
    module = make(base)
    module.configure_model()
    found = kinds(module.model)
    assert found.pop("lm_head") == "Linear"
    assert len(found) == 14
    for name, kind in found.items():
        assert kind == ("LoRALinear4bit" if name.endswith(("q_proj", "v_proj")) else "Linear4bit")
        assert module.model.get_submodule(name).weight.dtype == torch.uint8
    assert {p.dtype for p in module.model.parameters() if p.dtype != torch.uint8} == {torch.float32}


def test_what_is_trained_whole_is_not_quantised(base, tmp_path):
    module = make(base, target_modules="all-linear", modules_to_save=["o_proj"])
    before = module.merged_model(0).model.layers[0].self_attn.o_proj.weight
    fit(tmp_path, module)
    found = kinds(module.model)
    assert {kind for name, kind in found.items() if name.endswith(("o_proj", "lm_head"))} == {"Linear"}
    assert {kind for name, kind in found.items() if not name.endswith(("o_proj", "lm_head"))} == {"LoRALinear4bit"}
    assert difference(module.model.model.layers[0].self_attn.o_proj.weight, before) > 1e-3
    assert difference(tiny.logits(module.merged_model()), tiny.logits(module.model)) <= 1e-4


def test_a_classifiers_new_head_is_not_quantised_and_goes_back_with_the_links(tmp_path):
    name = tiny.folder(tmp_path / "bert", "bert", "AutoModel")
    module = make(name, COLASequenceClassifier, num_labels=3, target_modules=["query", "value"])
    fit(tmp_path, module, n_labels=3)
    found = kinds(module.model)
    assert found.pop("classifier") == "Linear"
    assert {kind for name, kind in found.items() if name.endswith(("query", "value"))} == {"LoRALinear4bit"}
    assert {kind for name, kind in found.items() if not name.endswith(("query", "value"))} == {"Linear4bit"}
    module.trainer.save_checkpoint(tmp_path / "end.ckpt")
    heads = {name for name in torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"] if ".lora_" not in name}
    assert heads == {"cola", "model.classifier.weight", "model.classifier.bias"}
    for links in range(4):
        loaded = COLAModule.load_from_checkpoint(tmp_path / "end.ckpt", links=links)
        assert difference(tiny.logits(loaded.model), tiny.logits(module.merged_model(links))) <= 1e-4


@pytest.mark.parametrize(
    ("precision", "computes_in", "wide", "tolerance"),
    [
        ("bf16-true", torch.bfloat16, torch.float32, 0.1),
        ("bf16-mixed", torch.float32, torch.float32, 1e-4),
        ("64-true", torch.float64, torch.float64, 1e-4),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "opt"])  # without biases, and with
def test_every_precision_trains_wide_links(base, tmp_path, architecture, precision, computes_in, wide, tolerance):
    base = base if architecture == "llama" else tiny.folder(tmp_path / "opt", "opt")
    module = fit(tmp_path, make(base), precision=precision)
    layers = list(lora_layers(module.model).values())
    assert {layer.stack.A.dtype for layer in layers} == {computes_in}
    assert {factor.dtype for layer in layers for factor in (layer.lora_A, layer.lora_B)} == {wide}
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert all(link.norm() > 0.1 for link in module.full_chain().links)
    assert {"train_loss", "val_loss"} <= module.trainer.callback_metrics.keys()
    assert all(torch.isfinite(value) for value in module.trainer.callback_metrics.values())
    merged = module.merged_model()
    assert {parameter.dtype for parameter in merged.parameters()} == {wide}
    assert difference(tiny.logits(merged), tiny.logits(module.model)) <= tolerance


@pytest.mark.parametrize("how", [{"activation_checkpointing": True}, {"dtype": "bfloat16"}, {"dtype": "float16"}], ids=str)
def test_what_else_a_base_can_be(base, tmp_path, how):
    module = fit(tmp_path, make(base, **how))
    assert difference(tiny.logits(module.merged_model()), tiny.logits(module.model)) <= (0.1 if "dtype" in how else 1e-4)


def test_a_copy_is_a_model_of_its_own(base):
    module = tiny.three_links(make(base))
    expected, twin = tiny.logits(module.model), copy.deepcopy(module.model)
    assert torch.equal(tiny.logits(twin), expected)
    with torch.no_grad():
        for layer in lora_layers(twin).values():
            layer.weight.zero_()
    assert difference(tiny.logits(twin), expected) > 1e-2
    assert torch.equal(tiny.logits(module.model), expected)


def test_stripped_of_its_links_a_model_is_what_it_was(base):
    module = tiny.three_links(make(base))
    expected = tiny.logits(module.model)
    with pytest.raises(UserError, match=r"^merge: expected True, for layer 'model.layers.0.self_attn.q_proj' has links"):
        strip_lora(module.model)
    strip_lora(module.model, merge=True)
    found = kinds(module.model)
    assert {kind for name, kind in found.items() if name.endswith(("q_proj", "v_proj", "lm_head"))} == {"Linear"}
    assert {kind for name, kind in found.items() if not name.endswith(("q_proj", "v_proj", "lm_head"))} == {"Linear4bit"}
    assert difference(tiny.logits(module.model), expected) <= 1e-4


# ---------------------------------------------------------------------- checkpoints


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run of three links, and its checkpoint after each step."""
    folder = tmp_path_factory.mktemp("trained")
    module = fit(folder, make(base, dropout=0.1), every_step(folder))
    return SimpleNamespace(module=module, folder=folder, path=folder / "step=6.ckpt")


def test_a_checkpoint_holds_no_weight_of_the_base(trained):
    checkpoint = torch.load(trained.path, weights_only=True)
    state = checkpoint["state_dict"].pop("cola")
    assert len(checkpoint["state_dict"]) == 8
    assert all(name.endswith((".lora_A", ".lora_B")) for name in checkpoint["state_dict"])
    assert state["base_weights"] is None
    assert all(name.endswith((".lora_A", ".lora_B")) for name in state["chain"]["tensors"])


def test_what_is_loaded_computes_the_same_to_the_bit(trained):
    loaded = COLAModule.load_from_checkpoint(trained.path)
    assert kinds(loaded.model) == kinds(trained.module.model)
    assert torch.equal(tiny.logits(loaded.model), tiny.logits(trained.module.model))


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_run_that_goes_on_in_the_middle_of_a_link_is_the_run_itself(base, trained, tmp_path):
    resumed = fit(tmp_path, make(base, dropout=0.1), every_step(tmp_path), ckpt_path=trained.folder / "step=3.ckpt")
    assert resumed.link == trained.module.link == 2
    assert resumed.chain.is_beginning_of(trained.module.chain)
    assert_bit_equal(weights(resumed), weights(trained.module))
    assert torch.equal(tiny.logits(resumed.model), tiny.logits(trained.module.model))


@pytest.mark.parametrize("links", range(4))
def test_a_checkpoint_goes_back_to_fewer_links(trained, links):
    loaded = COLAModule.load_from_checkpoint(trained.path, links=links)
    assert loaded.link == min(links, 2)
    assert difference(tiny.logits(loaded.model), tiny.logits(trained.module.merged_model(links))) <= 1e-4


def test_a_chain_goes_on_from_a_checkpoint(base, trained):
    module = make(base, init_chain=str(trained.path))
    module.configure_model()
    assert len(module.chain) == 3
    assert difference(tiny.logits(module.model), tiny.logits(trained.module.model)) <= 1e-4


def test_a_chain_of_a_4_bit_base_fits_no_other(trained):
    with pytest.raises(
        UserError, match=r"^base: expected the one on which the chain was trained, .*, in float32 and not in nf4"
    ):
        COLAModule.load_from_checkpoint(trained.path, quantization=None)


# ---------------------------------------------------------------------- what leaves


def command(*words):
    return main(["export", *map(str, words)])


def test_a_merged_model_is_plain_and_gives_the_logits(trained):
    expected, before = tiny.logits(trained.module.model), kinds(trained.module.model)
    merged = trained.module.merged_model()
    assert {type(part) for part in merged.modules() if isinstance(part, nn.Linear)} == {nn.Linear}
    assert not [part for part in merged.modules() if type(part).__module__.startswith(("bitsandbytes", "cola_lightning"))]
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in merged.parameters())
    assert difference(tiny.logits(merged), expected) <= 1e-4
    assert kinds(trained.module.model) == before
    assert torch.equal(tiny.logits(trained.module.model), expected)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_merged_by_the_command(trained, tmp_path, capsys, dtype):
    words = ["--dtype", dtype] if dtype else []
    assert command("--checkpoint", trained.path, "--format", "merged", "--output", tmp_path / "out", *words) == 0
    compared, says, _ = capsys.readouterr().out.splitlines()
    assert compared.startswith("loaded again, its logits differ from the module's by at most ")
    assert says == f"4-bit weights were de-quantised, to {dtype or 'float32'}"
    model, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), trained.module.merged_model()
    assert not hasattr(model.config, "quantization_config")
    assert set(kinds(model).values()) == {"Linear"}
    assert_bit_equal(model.state_dict(), expected.to(getattr(torch, dtype or "float32")).state_dict())
    assert difference(tiny.logits(model), tiny.logits(trained.module.model)) <= (0.1 if dtype == "bfloat16" else 1e-4)


def test_an_adapter_by_the_command(trained, tmp_path, capsys):
    assert command("--checkpoint", trained.path, "--format", "peft", "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "loaded again with peft, its logits differ from the module's by at most " in out
    model = PeftModel.from_pretrained(trained.module.merged_model(0), tmp_path / "out")
    assert difference(tiny.logits(model), tiny.logits(trained.module.model)) <= 1e-4


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_users_own_4_bit_model_is_adapted_and_never_merged_into(quant_type):
    torch.manual_seed(0)
    model = nn.Sequential(Linear4bit(64, 96, quant_type=quant_type).to("cpu"), nn.Tanh(), nn.Linear(96, 2))
    x = inputs()
    expected, weight = model(x), model[0].weight
    with pytest.raises(UserError, match=r"^model.finished_links: expected stack for .* weight of '0', received"):
        inject_lora(model, ["0"], rank=2, alpha=4)
    assert type(model[0]) is Linear4bit
    assert inject_lora(model, ["0"], rank=2, alpha=4, finished_links="stack") == ["0"]
    assert model[0].weight is weight
    assert_near(model(x), expected, 1e-6)
    assert describe_base(model).dtypes == [quant_type]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["0.lora_A", "0.lora_B"]


# ---------------------------------------------------------------------- where it could go wrong


def test_stripped_of_nothing_it_evaluates_as_before():
    model, x = nn.Sequential(quantized()), inputs().detach()
    expected = model(x)
    inject_lora(model, ["0"], rank=2, alpha=4, finished_links="stack")
    strip_lora(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)


def test_stripped_of_nothing_it_computes_in_the_same_dtype():
    model = nn.Sequential(quantized(torch.bfloat16))
    inject_lora(model, ["0"], rank=2, alpha=4, finished_links="stack")
    strip_lora(model)
    assert model[0].compute_dtype == torch.bfloat16


def test_what_hangs_on_a_layer_stays_through_quantisation_links_and_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    layer, attributes = model[0], vars(model[0]).keys()
    layer.register_buffer("scale", torch.tensor(3.0))
    layer.register_forward_hook(lambda module, args, output: output * module.scale)
    linear4bit.quantize(model, torch.float32)
    x = inputs().detach()
    expected = 3 * F.linear(x, linear4bit.dequantized_weight(layer), layer.bias)
    assert_near(model(x), expected, 1e-5)
    inject_lora(model, ["0"], rank=2, alpha=4, finished_links="stack")
    assert_near(copy.deepcopy(model)(x), expected, 1e-5)
    strip_lora(model, merge=True)
    assert_near(model(x), expected, 1e-5)
    assert (model[0] is layer, type(layer), vars(layer).keys()) == (True, nn.Linear, attributes)


def test_a_layer_can_be_pickled():
    layer, x = adapted(), inputs()
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_a_model_without_linear_layers_is_not_quantised():
    with pytest.raises(
        UserError, match=r"^model\.quantization: expected null, for a ReLU has no Linear layers to quantise; rec"
    ):
        linear4bit.quantize(nn.ReLU(), torch.float32)


def test_a_base_is_the_same_however_many_threads_make_it():
    """Else a checkpoint cannot be loaded on another machine."""
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(2112, 1024, bias=False))  # more than 32,768 scales
            linear4bit.quantize(model, torch.float32)
        finally:
            torch.set_num_threads(1)
        inject_lora(model, ["0"], rank=2, alpha=4, finished_links="stack")
        found.add(describe_base(model).fingerprint)
    assert len(found) == 1


def test_an_export_that_gives_other_logits_is_not_kept(trained, tmp_path, monkeypatch):
    probe = reference_logits(trained.module.model)
    monkeypatch.setattr(verify, "reference_logits", lambda *_: ReferenceLogits(probe.inputs, probe.logits + 1))
    with pytest.raises(ExportError, match="its logits differ from the module's by at most 1"):
        trained.module.export(tmp_path / "out")


def test_an_adapter_says_that_its_base_was_in_4_bits(trained, tmp_path, capsys):
    assert command("--checkpoint", trained.path, "--format", "peft", "--output", tmp_path / "out", "--no_verify") == 0
    assert "bnb_4bit_quant_type='nf4'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "targets"), [("64-true", ["q_proj"]), ("bf16-true", ["q_proj"]), ("32-true", ["q_proj", "lm_head"])]
)
def test_a_merged_model_leaves_in_the_dtype_of_its_base(base, tmp_path, capsys, precision, targets):
    module = fit(tmp_path, make(base, target_modules=targets), precision=precision)
    module.trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert command("--checkpoint", tmp_path / "end.ckpt", "--format", "merged", "--output", tmp_path / "out") == 0
    assert "4-bit weights were de-quantised, to float32\n" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_a_model_without_a_layer_to_quantise_is_refused(tmp_path):
    module = make(tiny.folder(tmp_path / "gpt2", "gpt2"), target_modules=["c_attn"])
    with pytest.raises(UserError, match=r"^model.quantization: "):
        module.configure_model()


class OwnToy(ValidatedToy):
    """A user's toy with two layers in 4 bits; the weights are others each time."""

    def build_model(self):
        first, second = (Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4") for _ in range(2))
        return nn.Sequential(nn.Linear(8, 64), first.to("cpu"), nn.Tanh(), second.to("cpu"), nn.Linear(64, 6))


def test_a_users_4_bit_layers_that_are_not_adapted_are_merged_as_they_are(tmp_path):
    module, x = toy(OwnToy, target_modules=["1"], finished_links="stack"), next(iter(batches()))[0]
    trainer(tmp_path, max_steps=2).fit(module, batches(2), batches(1))
    assert difference(module.merged_model()(x), module.model.train()(x)) <= 1e-4


def test_a_users_4_bit_base_is_not_kept_in_checkpoints():
    with pytest.raises(UserError, match=r"^model\.save_base: expected false for a base in 4 bits"):
        toy(OwnToy, target_modules=["1"], finished_links="stack", save_base=True).configure_model()


def test_a_model_that_transformers_quantised_is_merged_and_saved(base, tmp_path):
    class Own(COLACausalLM):
        def build_model(self):
            how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            return AutoModelForCausalLM.from_pretrained(base, quantization_config=how, device_map="cpu").train()

    module = Own(base, target_modules="all-linear", rank=4, seed=0, finished_links="stack")
    merged = module.merged_model()
    merged.save_pretrained(tmp_path / "out")
    assert difference(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), tiny.logits(module.model)) <= 1e-4


class Normed(Toy):
    """A toy with a frozen layer whose weight is computed of two others."""

    def build_model(self):
        return nn.Sequential(nn.Linear(8, 12), nn.utils.parametrizations.weight_norm(nn.Linear(12, 6)))


def test_a_checkpoint_holds_no_frozen_part_of_a_computed_weight():
    module = toy(Normed, target_modules=r"0")
    module.configure_model()
    assert [name for name in module.state_dict() if ".lora_" not in name] == ["cola"]


def test_the_base_is_transformers_own_and_peft_puts_the_adapter_on_it(tmp_path):
    folder = tiny.folder(tmp_path, "llama")
    module = make(folder, target_modules=["q_proj", "v_proj"])
    module.configure_model()
    for _ in range(3):
        for layer in lora_layers(module.model).values():
            nn.init.normal_(layer.lora_B, std=0.1)
        module.tie_knot()
    module.export(tmp_path / "adapter", "peft", verify=False)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu", dtype=torch.float32)
    for layer in base.modules():
        layer.support_avx512bf16_for_cpu = False  # bitsandbytes' own packing fails at these sizes
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert type(loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer) is Linear4bit
    assert difference(tiny.logits(loaded), tiny.logits(module.model)) <= 1e-5
