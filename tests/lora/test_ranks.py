"""LoRA+'s rate of B, which is peft's, and targets that are left out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from cola_lightning import LoRAConfig, UserError, inject_lora
from tests.helpers import tiny
from tests.helpers.toy import batches, toy


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
    ],
)
def test_what_matches_nothing_is_refused(given, message):
    model = AutoModelForCausalLM.from_config(tiny.config("llama"))
    with pytest.raises(UserError, match=message):
        inject_lora(model, LoRAConfig(["q_proj", "v_proj"], **given))
