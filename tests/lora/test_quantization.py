"""4-bit bases: they compute with the weights that bitsandbytes gives, nothing writes those, and they leave de-quantised."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from cola_lightning import COLACausalLM, COLAModule, LoRAConfig, UserError, inject_lora
from cola_lightning.chain.base import describe_base
from cola_lightning.cli import main
from cola_lightning.lora import quantization
from tests.helpers import tiny
from tests.helpers.tiny import RandomRows as Rows
from tests.helpers.toy import adapt_layer, assert_bit_equal, difference, quantized_linear, trainer, with_trained_link


@pytest.fixture(autouse=True)
def _a_cpu_on_which_bitsandbytes_packs_weights_anew(monkeypatch):
    """There its own layer, in evaluation, writes its weight and gives other outputs."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def adapted(dtype):
    return with_trained_link(adapt_layer(quantized_linear(dtype, bias=False), 4, 6.0, finished_links="stack"))


def stripped(dtype):
    return adapted(dtype).strip_()


def inputs(dtype=torch.float32):
    return torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [quantized_linear, adapted, stripped])
def test_evaluation_computes_as_training_does_and_leaves_the_weight_alone(make, dtype):
    layer, x = make(dtype), inputs(dtype)
    expected, before = layer.train()(x), {name: value.clone() for name, value in layer.state_dict().items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer.eval()(x), expected)
    assert torch.equal(layer.train()(x), expected)
    assert_bit_equal(layer.state_dict(), before)


def test_a_base_is_the_same_however_many_threads_make_it():
    """Else a checkpoint cannot be loaded on another machine."""
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(2112, 1024, bias=False))  # more than 32,768 scales
            quantization.quantize(model, torch.float32)
        finally:
            torch.set_num_threads(1)
        inject_lora(model, LoRAConfig(["0"], rank=2, alpha=4, finished_links="stack"))
        found.add(describe_base(model).fingerprint)
    assert len(found) == 1


def make(base, **arguments):
    links = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 6, "seed": 0, "finished_links": "stack"}
    return COLACausalLM(base, **links | {"quantization": "nf4", "optimizer": lambda p: AdamW(p, lr=1e-2)} | arguments)


def fit(folder, module, **options):
    """Three links of two steps."""
    run = trainer(folder, chain={"every_n_train_steps": 2}, max_steps=6, **options)
    run.fit(module, datamodule=Rows())
    return module


def kinds(model, *endings):
    """The types of the linear layers whose names end so, and of the others."""
    found = {name: type(part).__name__ for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    return tuple({kind for name, kind in found.items() if name.endswith(endings) is is_named} for is_named in (True, False))


def frozen(module):
    return {name: value.clone() for name, value in module.model.state_dict().items() if ".lora_" not in name}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run of three links, its frozen weights before them, and its checkpoint."""
    folder, module = tmp_path_factory.mktemp("trained"), make(base, dropout=0.1)
    module.configure_model()
    before = frozen(module)
    fit(folder, module).trainer.save_checkpoint(folder / "run.ckpt")
    return SimpleNamespace(module=module, before=before, path=folder / "run.ckpt")


def test_a_base_made_again_is_the_same_and_its_head_is_not_quantised(base):
    first, second, plain = make(base), make(base), make(base, quantization=None)
    for module in (first, second, plain):
        module.configure_model()
    assert first.chain.base == second.chain.base
    assert first.chain.base.dtypes == ["nf4"]
    assert plain.chain.base.fingerprint != first.chain.base.fingerprint
    assert_bit_equal(first.model.state_dict(), second.model.state_dict())
    assert kinds(first.model, "lm_head") == ({"Linear"}, {"LoRALinear4bit", "Linear4bit"})
    assert kinds(first.model, "q_proj", "v_proj")[0] == {"LoRALinear4bit"}
    assert {p.dtype for p in first.model.parameters()} == {torch.uint8, torch.float32}


def test_training_leaves_the_weights_and_a_knot_and_a_plain_copy_the_logits(trained):
    module = COLAModule.load_from_checkpoint(trained.path)
    expected = tiny.logits(module.model)
    merged = module.merged_model()
    assert not [part for part in merged.modules() if type(part).__module__.startswith(("bitsandbytes", "cola_lightning"))]
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in merged.parameters())
    assert difference(tiny.logits(merged), expected) <= 1e-4
    assert torch.equal(tiny.logits(module.model), expected)
    assert module.tie_knot(rank=2).norm() > 0.1
    assert difference(tiny.logits(module.model), expected) <= 1e-4
    assert any(name.endswith("q_proj.weight.absmax") for name in trained.before)
    assert_bit_equal(frozen(trained.module), trained.before)


def test_on_a_base_in_half_precision_links_are_trained_wide(tmp_path):
    module = fit(tmp_path, make(tiny.folder(tmp_path / "opt", "opt"), dtype="float16"))  # with biases
    layers = list(module.adapted.layers.values())
    assert {layer.stack.A.dtype for layer in layers} == {torch.float16}
    assert {factor.dtype for layer in layers for factor in (layer.lora_A, layer.lora_B)} == {torch.float32}
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert all(link.norm() > 0.1 for link in module.full_chain().links)
    merged = module.merged_model()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert difference(tiny.logits(merged), tiny.logits(module.model)) <= 0.1


def test_a_checkpoint_holds_no_weight_of_the_base_and_goes_to_any_number_of_its_links(base, trained):
    checkpoint = torch.load(trained.path, weights_only=True)
    others = {name for name in checkpoint["state_dict"] if not name.endswith((".lora_A", ".lora_B"))}
    assert others == {"chain.metadata"}
    expected = tiny.logits(trained.module.model)
    assert torch.equal(tiny.logits(COLAModule.load_from_checkpoint(trained.path).model), expected)
    for links in (0, 2, 3):
        loaded = COLAModule.load_from_checkpoint(trained.path, links=links)
        assert loaded.n_finished == min(links, 2)
        assert difference(tiny.logits(loaded.model), tiny.logits(trained.module.merged_model(links))) <= 1e-4
    module = make(base, init_chain=str(trained.path))
    module.configure_model()
    assert len(module.chain) == 3
    assert difference(tiny.logits(module.model), expected) <= 1e-4
    with pytest.raises(UserError, match=r"^base: .* in float32 and not in nf4"):
        COLAModule.load_from_checkpoint(trained.path, quantization=None)


def nf4(**settings):
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)


def test_peft_puts_an_adapter_on_the_plain_base_and_on_transformers_own_in_4_bits(base, trained, tmp_path, capsys):
    assert main(["export", str(trained.path), "--format", "peft", "--output", str(tmp_path / "out")]) == 0
    assert "bnb_4bit_quant_type='nf4'" in capsys.readouterr().out
    expected = tiny.logits(trained.module.model)
    plain = PeftModel.from_pretrained(trained.module.merged_model(0), tmp_path / "out")
    assert difference(tiny.logits(plain), expected) <= 1e-4
    settings = {"quantization_config": nf4(bnb_4bit_compute_dtype=torch.float32), "device_map": "cpu", "dtype": torch.float32}
    own = AutoModelForCausalLM.from_pretrained(base, **settings)
    for layer in own.modules():
        layer.support_avx512bf16_for_cpu = False  # bitsandbytes' own packing fails at these sizes
    loaded = PeftModel.from_pretrained(own, tmp_path / "out")
    assert type(loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer) is Linear4bit
    assert difference(tiny.logits(loaded), expected) <= 1e-5


def test_a_model_that_transformers_quantised_is_merged_and_saved(base, tmp_path):
    class Own(COLACausalLM):
        def build_model(self):
            return AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4(), device_map="cpu").train()

    module = Own(base, target_modules="all-linear", rank=4, seed=0, finished_links="stack")
    module.merged_model().save_pretrained(tmp_path / "out")
    assert difference(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), tiny.logits(module.model)) <= 1e-4
