"""Ranks, alphas and scalings by layer, and LoRA+'s rate of B: what peft computes, in each thing that a chain goes through."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from cola_lightning import Chain, LoRAConfig, UserError, inject_lora, lora_layers
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.report import report
from tests.helpers import tiny
from tests.helpers.toy import Toy, assert_bit_equal, batches, toy, trainer, weights

PATTERNS = {"rank_pattern": {"down_proj": 6, r"^model\.layers\.1\..*v_proj": 2}, "alpha_pattern": {"v_proj": 5}}
CHOSEN = {"exclude_modules": r".*layers\.0.*q_proj", "layers_to_transform": [0, 1]}
OWN = {"rank": 4, "rank_pattern": {"2": 8}, "alpha_pattern": {"0": 6}, "scaling": "rslora"}  # of the toy


def both():
    """A model with the layers and patterns above, here and in peft, with the same A."""
    torch.manual_seed(0)
    ours, targets = AutoModelForCausalLM.from_config(tiny.config("llama")), ["q_proj", "v_proj", "down_proj"]
    options = {"target_modules": targets, "use_rslora": True} | PATTERNS | CHOSEN
    theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=4, lora_alpha=8, **options))
    names = inject_lora(ours, LoRAConfig(targets, rank=4, alpha=8, scaling="rslora", **PATTERNS, **CHOSEN))
    parts = {name: part for name, part in theirs.base_model.model.named_modules() if hasattr(part, "lora_A")}
    assert names == list(parts)
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            assert (layer.rank, layer.scaling) == (parts[name].r["default"], parts[name].scaling["default"])
            layer.lora_A.copy_(parts[name].lora_A["default"].weight)
    return ours, theirs


def test_one_link_with_patterns_equals_pefts_lora_step_by_step():
    ours, theirs = both()
    assert len({(layer.rank, layer.scaling) for layer in lora_layers(ours).values()}) == 4
    for mine, other in tiny.losses_of_both(ours, theirs, steps=6):
        assert mine == pytest.approx(other, abs=1e-6)


def test_a_rate_of_its_own_for_B_is_that_of_lora_plus():
    torch.manual_seed(0)
    module = toy(lr_ratio_B=8, rank=4, optimizer=lambda p: AdamW(p, lr=1e-3, weight_decay=0.1), lr_schedule="constant")
    module.configure_model()
    base = module.merged_model(0)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"]))
    with torch.no_grad():
        for name, layer in module.adapted.layers.items():
            theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.copy_(layer.lora_A)
    mine = module.configure_optimizers()["optimizer"]
    other = create_loraplus_optimizer(theirs, AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1)
    for x, y in [*batches(10), *batches(10)]:
        losses = [nn.functional.mse_loss(model(x), y) for model in (module.model, theirs)]
        for loss, optimizer in zip(losses, (mine, other), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)


def test_a_link_of_half_the_rank_has_half_of_each_layers_and_goes_through_every_file(tmp_path):
    module = toy(Toy, optimizer=lambda p: AdamW(p, lr=1e-2), **OWN)
    chain = {"every_n_epochs": 1, "ranks": [4, 2], "alphas": [4, 8]}
    trainer(tmp_path, chain=chain, max_epochs=2).fit(module, batches())
    links, layers = module.full_chain().links, module.adapted.layers
    assert [link.rank for link in links] == [4, 2]
    assert [[A.shape[0] for A, _ in link.factors.values()] for link in links] == [[4, 8], [2, 4]]
    assert [layer.rank for layer in layers.values()] == [2, 4]
    scalings = [[link.scaling(name) for name in "02"] for link in links]
    assert scalings == [[6 / 4**0.5, 4 / 8**0.5], [12 / 2**0.5, 8 / 4**0.5]]
    merged = module.merged_model(0)
    for name in "02":
        change = module.merged_model()[int(name)].weight - merged[int(name)].weight
        torch.testing.assert_close(change, sum(link.delta(name) for link in links), rtol=1e-4, atol=1e-6)
        assert module.full_chain().total_rank(name) == {"0": 6, "2": 12}[name]

    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = Toy.load_from_checkpoint(tmp_path / "run.ckpt")
    assert [layer.rank for layer in resumed.adapted.layers.values()] == [2, 4]
    assert_bit_equal(weights(resumed), weights(module))
    module.full_chain().save(tmp_path / "chain")
    loaded = Chain.load(tmp_path / "chain")
    assert all(mine.own_values == other.own_values for mine, other in zip(loaded.links, links, strict=True))
    assert module.full_chain().is_beginning_of(loaded)
    reports = report(loaded)
    assert [len(layer.singular_values) for layer in reports[0].layers.values()] == [4, 8]

    x = torch.randn(4, 8)
    module.export(tmp_path / "peft", "peft")
    again = PeftModel.from_pretrained(toy().merged_model(0), tmp_path / "peft")
    assert again.peft_config["default"].rank_pattern == {"^0": 6}
    torch.testing.assert_close(again(x), module.model.eval()(x), rtol=0, atol=1e-5)
    read = read_chain(tmp_path / "peft")
    assert [[A.shape[0] for A, _ in link.factors.values()] for link in read.links] == [[4, 8], [2, 4]]
    for mine, other in zip(read.links, links, strict=True):
        torch.testing.assert_close(mine.delta("2"), other.delta("2"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers_to_transform": [1, 7]}, r"model\.layers_to_transform: no target is in layer 7; .* 0 to 1"),
        ({"exclude_modules": ["model"]}, r"model\.target_modules: no layer is left"),
        ({"exclude_modules": ["k_porj"]}, r"model\.exclude_modules: .*'k_porj'; the nearest"),
        ({"rank_pattern": {"v_porj": 2}}, r"model\.rank_pattern: 'v_porj' matches"),
        ({"alpha_pattern": {"v_proj": 0}}, r"model\.alpha_pattern must be numbers above 0"),
        ({"scaling": "dora"}, r"model\.scaling must be lora or rslora"),
    ],
)
def test_what_matches_nothing_is_refused(given, message):
    model = AutoModelForCausalLM.from_config(tiny.config("llama"))
    with pytest.raises(UserError, match=message):
        inject_lora(model, LoRAConfig(["q_proj", "v_proj"], **given))
