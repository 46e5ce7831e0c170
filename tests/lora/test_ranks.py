"""Ranks, alphas and scalings by layer, LoRA+'s rate of B, and targets that are left out, as in peft."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from cola_lightning import Chain, LoRAConfig, UserError, inject_lora, lora_layers
from cola_lightning.chain.report import report
from tests.helpers import tiny
from tests.helpers.toy import Toy, assert_bit_equal, batches, toy, trainer, weights

PATTERNS = {"rank_pattern": {"down_proj": 6, r"^model\.layers\.1\..*v_proj": 2}, "alpha_pattern": {"v_proj": 5}}
OWN = {"rank": 4, "rank_pattern": {"2": 8}, "alpha_pattern": {"0": 6}, "use_rslora": True}  # of the toy


@pytest.mark.parametrize("layers", [None, [1], 0, []])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_one_link_with_patterns_is_pefts_lora_step_by_step(layers, use_rslora):
    torch.manual_seed(0)
    patterns = PATTERNS if layers in (None, []) else {"rank_pattern": {"down_proj": 6}}
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": use_rslora, "layers_to_transform": layers}
    ours = AutoModelForCausalLM.from_config(tiny.config("llama"))
    theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=4, lora_alpha=8, **options, **patterns))
    names = inject_lora(ours, LoRAConfig(rank=4, alpha=8, **options, **patterns))
    parts = {name: part for name, part in theirs.base_model.model.named_modules() if hasattr(part, "lora_A")}
    assert names == list(parts)
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            assert (layer.rank, layer.scaling) == (parts[name].r["default"], parts[name].scaling["default"])
            layer.lora_A.copy_(parts[name].lora_A["default"].weight)
    for mine, other in tiny.losses_of_both(ours, theirs, steps=6):
        assert mine == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_link_of_half_the_rank_has_half_of_each_layers_and_goes_through_every_file(tmp_path, finished_links):
    module = toy(Toy, optimizer=lambda p: AdamW(p, lr=1e-2), finished_links=finished_links, **OWN)
    chain = {"every_n_epochs": 1, "ranks": [4, 2], "alphas": [4, 8]}
    trainer(tmp_path, chain=chain, max_epochs=2).fit(module, batches())
    links = module.full_chain().links
    assert [[A.shape[0] for A, _ in link.factors.values()] for link in links] == [[4, 8], [2, 4]]
    scalings = [[link.scaling_of(name) for name in "02"] for link in links]
    assert scalings == [[6 / 4**0.5, 4 / 8**0.5], [12 / 2**0.5, 8 / 4**0.5]]
    merged = module.merged_model()
    for name in "02":
        change = merged[int(name)].weight - module.merged_model(0)[int(name)].weight
        torch.testing.assert_close(change, sum(link.delta(name) for link in links), rtol=1e-4, atol=1e-6)

    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = Toy.load_from_checkpoint(tmp_path / "run.ckpt")
    assert [layer.rank for layer in resumed.adapted.layers.values()] == [2, 4]
    assert_bit_equal(weights(resumed), weights(module))
    assert_bit_equal(merged.state_dict(), resumed.merged_model().state_dict())
    module.full_chain().save(tmp_path / "chain")
    assert module.full_chain().is_beginning_of(Chain.load(tmp_path / "chain"))
    assert report(Chain.load(tmp_path / "chain"))[0].update_norm == pytest.approx(links[0].norm())

    module.export(tmp_path / "peft", "peft")
    again = PeftModel.from_pretrained(toy().merged_model(0), tmp_path / "peft").merge_and_unload()
    for name in "02":
        torch.testing.assert_close(again[int(name)].weight, merged[int(name)].weight, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exclude_modules": ["model"]}, r"model\.target_modules: no layer is left"),
        ({"exclude_modules": ["k_porj"]}, r"model\.exclude_modules: .*'k_porj'; the nearest"),
        ({"layers_to_transform": [1, 7]}, r"model\.layers_to_transform: no target is in layer 7\. .*: 0, 1$"),
        ({"rank_pattern": {"v_porj": 2}}, r"model\.rank_pattern: 'v_porj' matches no adapted layer; the nearest .* v_proj"),
        ({"alpha_pattern": {"v_proj": 0}}, r"model\.alpha_pattern must be numbers above 0"),
    ],
)
def test_what_matches_nothing_is_refused(given, message):
    model = AutoModelForCausalLM.from_config(tiny.config("llama"))
    with pytest.raises(UserError, match=message):
        inject_lora(model, LoRAConfig(["q_proj", "v_proj"], **given))
