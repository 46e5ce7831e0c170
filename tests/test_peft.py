"""One link against peft's LoRA, step for step: the oracle that was not written here."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from cola_lightning import inject_lora, lora_layers

MODELS = {
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
                word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.0,
            )
        ),
        ["q_proj", "v_proj"],
    ),
    "llama": (
        lambda: LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
                max_position_embeddings=32,
            )
        ),
        ["q_proj", "v_proj", "down_proj"],
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        ),
        ["c_attn", "c_fc"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 under transformers 5.24
@pytest.mark.parametrize("name", MODELS)
def test_one_link_equals_pefts_lora_for_50_steps(name):
    build, target_modules = MODELS[name]
    torch.manual_seed(0)
    ours = build()
    theirs = get_peft_model(
        copy.deepcopy(ours),
        LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, fan_in_fan_out=name == "gpt2", lora_dropout=0.0),
    )
    assert inject_lora(ours, target_modules, rank=4, alpha=8)
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
