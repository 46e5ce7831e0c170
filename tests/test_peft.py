"""One link against peft's LoRA, step for step: the oracle that was not written here. Convolutions: ``test_convolution.py``."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from cola_lightning import inject_lora, lora_layers
from tests import tiny

TARGETS = {"opt": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 under transformers 5.24
@pytest.mark.parametrize("name", TARGETS)
def test_one_link_equals_pefts_lora_for_50_steps(name):
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(tiny.config(name))
    how = {"target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2", "lora_dropout": 0.0}
    theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=4, lora_alpha=8, **how))
    assert inject_lora(ours, TARGETS[name], rank=4, alpha=8)
    peft_modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for layer_name, layer in lora_layers(ours).items():
            layer.lora_A.copy_(peft_modules[layer_name].lora_A["default"].weight)
    optimizers = [AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (ours, theirs)]
    for _ in range(50):
        tokens = torch.randint(40, (4, 12))
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert any(layer.lora_B.any() for layer in lora_layers(ours).values())
    merged = theirs.merge_and_unload()
    for layer_name, layer in lora_layers(ours).items():
        layer.finish()
        torch.testing.assert_close(layer.weight, merged.get_submodule(layer_name).weight, rtol=1e-4, atol=1e-5)
