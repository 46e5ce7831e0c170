"""Links on mixtures of experts: against peft's LoRA and a loop over experts, through transformers' architectures, in a run."""

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from cola_lightning import AdaptedModel, COLACausalLM, LoRAConfig, inject_lora, lora_layers
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.lora.experts import LoRAExpertsProjection
from tests.helpers import tiny
from tests.helpers.toy import assert_near, difference, strip_lora, trainer, with_trained_links

PROJECTIONS = ["experts.gate_up_proj", "experts.down_proj"]


def base(architecture, **changes):
    torch.manual_seed(0)
    config = tiny.config(architecture)
    config.update(changes)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_one_link_equals_pefts_lora_of_parameters_step_by_step(architecture):
    ours = base(architecture)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=PROJECTIONS)
    theirs = get_peft_model(copy.deepcopy(ours), config)
    assert inject_lora(ours, LoRAConfig(PROJECTIONS, rank=4, alpha=8))
    wrappers = {f"{name}.lora_A": part for name, part in theirs.base_model.model.named_modules() if hasattr(part, "lora_A")}
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            experts, _, projection = name.rpartition(".")
            wrapper = wrappers[f"{experts}{'' if projection == 'down_proj' else '.base_layer'}.lora_A"]
            layer.lora_A.copy_(wrapper.lora_A["default"].weight.view_as(layer.lora_A))
    for mine, other in tiny.losses_of_both(ours, theirs, steps=6):
        assert mine == pytest.approx(other, abs=1e-5)
    strip_lora(ours)
    merged, before = theirs.merge_and_unload().state_dict(), base(architecture).state_dict()
    for name, value in ours.state_dict().items():
        assert difference(value, merged[name]) <= 1e-5, name
        assert torch.equal(value, before[name]) == (".experts." not in name)


FIELDS = {  # all that experts classes read of their configurations
    **dict.fromkeys(["hidden_act", "hidden_activation", "mlp_hidden_act"], "silu"),
    **dict.fromkeys(["hidden_size", "moe_hidden_size"], 32),
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["swiglu_limit", "swiglu_alpha", "mlp_gate_softcap", "mlp_up_softcap"], 7.0),
    **{"moe_latent_size": None, "post_norm_eps": 1e-6, "_experts_implementation": "eager"},
}


@pytest.mark.parametrize(
    ("models", "least"),
    [
        ("aria gpt_oss muse_spark nemotron_h qwen3_moe", 5),  # transposed, with biases, with a norm after them, without a gate
        pytest.param("*", 68, marks=pytest.mark.slow),
    ],
)
def test_every_experts_class_of_transformers_computes_the_same_with_new_links_and_merged_ones(models, least):
    """Against their own loops over experts."""
    inputs = torch.randn(9, 32), torch.stack([torch.randperm(4)[:2] for _ in range(9)]), torch.rand(9, 2)
    found = [
        getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)
        for model in models.split()
        for path in sorted(Path(transformers.models.__file__).parent.glob(f"{model}/modeling_*.py"))
        for name in re.findall(r"@use_experts_implementation.*\nclass (\w+)", path.read_text(encoding="utf-8"))
    ]
    assert len(found) >= least
    for cls in found:
        experts = cls(SimpleNamespace(**FIELDS))
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_(std=0.3)
        model, before = nn.ModuleDict({"experts": experts}), experts(*inputs)
        assert len(inject_lora(model, LoRAConfig(r".*_proj", rank=2, alpha=2))) == 2
        assert_near(experts(*inputs), before, 1e-6)
        with_trained_links(model)
        expected = experts(*inputs)
        strip_lora(model)
        assert_near(experts(*inputs), expected, 1e-5)


ALWAYS = ["gpt_oss", "nemotron_h"]  # the experts of all are in the test above


@pytest.mark.parametrize(
    "architecture", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in tiny.MIXTURES if name not in ALWAYS)]
)
def test_an_architecture_trains_and_knots_and_exports_and_generates(tmp_path, architecture):
    """With links on all linear layers and experts. PEFT itself refuses a Mamba layer's output projection."""
    targets = r".*(experts\..*|[qkvo])_proj" if architecture == "nemotron_h" else "all-linear"
    options = {"target_modules": targets, "experts": True, "rank": 4, "seed": 0, "optimizer": lambda p: AdamW(p, lr=3e-2)}
    module = COLACausalLM(tiny.folder(tmp_path / "base", architecture), **options)
    ids = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(1))
    data = DataLoader([{"input_ids": ids, "labels": ids}] * 4, batch_size=None)
    run = trainer(tmp_path, chain={"every_n_train_steps": 2, "ranks": [4, 3]}, max_steps=4, limit_val_batches=0)
    run.fit(module, data, data)
    assert [link.rank for link in module.full_chain().links] == [4, 3]
    experts = {name: layer for name, layer in module.adapted.layers.items() if isinstance(layer, LoRAExpertsProjection)}
    assert experts
    assert all(link.delta(name).any() for link in module.full_chain().links for name in experts)
    expected = tiny.logits(module.model)
    assert difference(tiny.logits(module.merged_model(0)), expected) > 1e-2
    for format_ in ("merged", "peft"):
        module.export(tmp_path / format_, format_)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    largest = expected.abs().max().item()
    assert difference(tiny.logits(merged), expected) <= 1e-5 * largest
    with_adapter = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")
    assert difference(tiny.logits(with_adapter), expected) <= 1e-5 * largest
    words = [model.generate(ids[:1], max_new_tokens=6, do_sample=False) for model in (module.model.eval(), merged.eval())]
    assert torch.equal(*words)
    chain, (again,) = module.full_chain(), read_chain(tmp_path / "peft").links
    for name in experts:
        assert difference(again.delta(name), chain.delta(name)) <= 1e-5 * chain.delta(name).abs().max()


def test_all_linear_leaves_experts_unless_asked():
    adapted = AdaptedModel(lambda: base("qwen3_moe"), LoRAConfig("all-linear", rank=2, alpha=2))
    assert not [name for name in adapted.layers if ".experts." in name]
    model = base("qwen3_moe")
    next(part for part in model.modules() if hasattr(part, "has_post_expert_norm"))._is_expert_parallel = True
    names = inject_lora(model, LoRAConfig("all-linear", rank=2, alpha=2, experts=True))
    assert [name for name in names if ".experts." in name] == [f"model.layers.1.mlp.{name}" for name in PROJECTIONS]


def test_a_projection_alone_is_adapted_by_name_and_the_others_stay_parameters():
    model = base("deepseek_v3")
    before, expected = dict(model.named_parameters()), tiny.logits(model)
    names = inject_lora(model, LoRAConfig(["down_proj"], rank=2, alpha=2))
    assert [name for name in names if ".experts." in name] == ["model.layers.1.mlp.experts.down_proj"]
    assert model.get_parameter("model.layers.1.mlp.experts.gate_up_proj") is before["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(tiny.logits(model), expected)
    strip_lora(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert not [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module")  # but a parameter
def test_a_module_begins_with_an_adapter_of_pefts_on_experts_and_goes_on_with_it(tmp_path):
    name = tiny.folder(tmp_path / "base", "mixtral")
    fields = {"r": 3, "lora_alpha": 7, "rank_pattern": {"experts.down_proj": 5}, "target_modules": ["q_proj"]}
    config = LoraConfig(**fields, target_parameters=["down_proj", "gate_up_proj"])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".lora_B." in key:
                parameter.normal_().mul_(0.1)
    theirs.save_pretrained(tmp_path / "peft")
    options = {"target_modules": ["q_proj", *PROJECTIONS], "rank": 2, "seed": 0}
    module = COLACausalLM(name, init_chain=str(tmp_path / "peft"), **options)
    assert difference(tiny.logits(module.model), tiny.logits(theirs)) <= 1e-5
    assert difference(tiny.logits(module.merged_model(0)), tiny.logits(theirs)) > 1e-2
    assert "loaded again with peft" in module.export(tmp_path / "again", "peft")[-1]
    ranks = {name.rpartition(".")[2]: layer.rank for name, layer in module.adapted.layers.items()}
    assert ranks == {"q_proj": 2, "gate_up_proj": 2, "down_proj": 2}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, where a graph ends
@pytest.mark.parametrize(
    ("mode", "part"), [pytest.param("merge", "", marks=pytest.mark.slow), ("stack", "model.layers.0.mlp.experts.down_proj")]
)
def test_a_compiled_and_a_checkpointed_model_and_another_implementation_compute_the_same(mode, part):
    def build():
        return base("qwen3_moe", num_hidden_layers=1)

    adapted = AdaptedModel(build, LoRAConfig(["q_proj", "experts.down_proj"], rank=2, alpha=2, finished_links=mode))
    with_trained_links(adapted.model)
    adapted.tie_knot()
    with_trained_links(adapted.model, seed=3)
    ids, gradients = torch.randint(2, 400, (2, 10)), []
    compiled = copy.deepcopy(adapted.model)
    compiled.get_submodule(part).compile(backend="eager")
    checkpointed = copy.deepcopy(adapted.model)
    checkpointed.train().activation_checkpointing_enable()
    switched = copy.deepcopy(adapted.model)
    switched.set_experts_implementation("batched_mm")
    for model in (adapted.model, compiled, checkpointed, switched):
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([layer.lora_A.grad for layer in lora_layers(model).values()])
    for mine in gradients[1:]:
        torch.testing.assert_close(mine, gradients[0], rtol=1e-4, atol=1e-6)
