"""What the plan for large models says of a small one is what is there, and its results are what it says now."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cola_lightning import COLACausalLM
from tests import tiny
from tests.toy import trainer

METHODS = ["LoRA", "COLA merge", "COLA stack", "COLA float32", "full fine-tuning"]
ROWS, LENGTH, LAYERS = 3, 16, 2
OVERHEAD = 64_000  # of a checkpoint beside its tensors: their names and places, the loops' state, the recipe


@pytest.fixture(scope="module")
def scale():
    yield importlib.import_module("scale")
    del sys.modules["scale"]


@pytest.fixture
def method(scale, request):
    (found,) = [method for method in scale.METHODS if method.name == request.param]
    return found


def config(architecture="llama", n_layers=LAYERS):
    made = tiny.config(architecture)
    made.num_hidden_layers = n_layers
    return made


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")  # which is so
@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_weights_links_stack_and_checkpoint_are_those_of_a_module(tmp_path, scale, method):
    is_full = method.finished_links is None
    chain = {"target_modules": None if is_full else scale.TARGETS, "rank": scale.RANK, "alpha": scale.ALPHA, "seed": 0}
    chain |= {} if is_full else {"finished_links": method.finished_links}
    module = COLACausalLM(tiny.folder(tmp_path), dtype=str(method.dtype).removeprefix("torch."), **chain)
    run = trainer(tmp_path, chain=None if is_full else {"at_steps": [1] if method.n_finished else []}, max_steps=2)
    ids = torch.randint(3, 300, (2, 2, 8))
    run.fit(module, DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=None))
    assert module.link == method.n_finished
    parts, layers = scale.sizes(scale.build(config(), method)), module.adapted.layers.values()
    assert parts.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert parts.base + parts.links == sum(p.nbytes for p in module.parameters())
    assert parts.links == sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in layers)
    assert parts.stack == sum(layer.stack.nbytes for layer in layers if layer.stack is not None)
    own = [sum(p.nbytes for name, p in b.named_parameters() if "lora_" not in name) for b in module.model.model.layers]
    assert (parts.block, parts.root) == (max(own), parts.base - sum(own))
    run.save_checkpoint(tmp_path / "run.ckpt")
    planned = scale.checkpoint_bytes(parts, method.n_finished)
    assert planned < (tmp_path / "run.ckpt").stat().st_size < planned + OVERHEAD


@pytest.mark.parametrize(
    ("architecture", "method"), [*(("llama", name) for name in METHODS), ("opt", "LoRA")], indirect=["method"]
)
def test_activations_are_those_of_a_real_forward_pass(scale, method, architecture, monkeypatch):
    monkeypatch.setattr(scale, "AsOnAGPU", contextlib.nullcontext)  # on the CPU it is as on the CPU
    planned = scale.activations(config(architecture), method, ROWS, LENGTH)
    real = {n: saved_by(scale, method, architecture, n) for n in (LAYERS, LAYERS - 1)}
    everything, inputs = real[LAYERS]
    assert planned["all"] == everything
    block, block_input = (ours - one_less for ours, one_less in zip(real[LAYERS], real[LAYERS - 1], strict=True))
    linear = [m for m in scale.build(config(architecture), method).base_model.modules() if isinstance(m, torch.nn.Linear)]
    copies = sum(m.weight.numel() for m in linear) * 2 if method.finished_links is None else 0  # autocast's, of what is trained
    assert planned["checkpointed"] == inputs + max(block - block_input, copies)


def saved_by(scale, method, architecture, n_layers):
    """What a real model keeps for the backward pass, and with activation checkpointing, counted by address."""
    model = scale.build(config(architecture, n_layers), method, "cpu")
    held = [*model.parameters(), *model.buffers()]
    held += [factor for layer in scale.lora_layers(model).values() if layer.stack for factor in (layer.stack.A, layer.stack.B)]
    ids = torch.randint(2, 400, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:2, :5] = 0
    counts = []
    for _ in range(2):
        saved = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=method.finished_links != "stack"),
        ):
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            output = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)
            loss = F.cross_entropy(output.logits[:, 0].float(), ids[:, -1])
        assert loss.isfinite()
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
        counts.append(sum(storages[place] for place in storages.keys() - {p.untyped_storage().data_ptr() for p in held}))
        scale.checkpoint_activations(model)
    return counts


@pytest.mark.parametrize(
    "method", ["LoRA", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[1:])], indirect=True
)
def test_the_results_are_what_is_computed_now(scale, method):
    lines = (Path(__file__).parent.parent / "benchmarks" / "scale.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    trained = {result["model"]: result["trained"] for result in results if result["method"] == "full fine-tuning"}
    llama = {"Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824}
    llama |= {"Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248}
    assert trained == {"OPT-1.3B": 1_315_758_080} | llama
    found = [one for one in results if (one["model"], one["method"]) == ("OPT-1.3B", method.name)]
    assert found == list(scale.plan("OPT-1.3B", scale.MODELS["OPT-1.3B"], method))


def test_a_base_in_4_bits_is_as_large_as_a_quantized_one(tmp_path, scale):
    pytest.importorskip("bitsandbytes")
    quantization = {"quantization": "nf4", "finished_links": "stack", "dtype": "bfloat16"}
    module = COLACausalLM(tiny.folder(tmp_path), target_modules=scale.TARGETS, rank=scale.RANK, seed=0, **quantization)
    module.configure_model()
    held = sum(p.nbytes for name, p in module.model.named_parameters() if "lora_" not in name)
    scales = sum(p.quant_state.absmax.nbytes for p in module.model.parameters() if hasattr(p, "quant_state"))
    assert scale.sizes(scale.build(config(), scale.METHODS[2])).in_4_bits == held + scales
