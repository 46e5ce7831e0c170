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

ROOT = Path(__file__).parent.parent
METHODS = ["LoRA", "COLA merge", "COLA stack", "full fine-tuning"]
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


@pytest.fixture(scope="module")
def results():
    return [json.loads(line) for line in (ROOT / "benchmarks" / "scale.jsonl").read_text().splitlines()]


def config(architecture="llama", n_layers=LAYERS):
    made = tiny.config(architecture)
    made.num_hidden_layers = n_layers
    return made


def module_of(scale, method, folder):
    """The package's own module, to be trained by this method."""
    is_full = method.finished_links is None
    chain = {"target_modules": None if is_full else scale.TARGETS, "rank": scale.RANK, "alpha": scale.ALPHA, "seed": 0}
    chain |= {} if is_full else {"finished_links": method.finished_links}
    return COLACausalLM(tiny.folder(folder), dtype="float32" if is_full else "bfloat16", **chain)


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_weights_links_and_stack_are_those_of_a_module(tmp_path, scale, method):
    module = module_of(scale, method, tmp_path)
    module.configure_model()
    for _ in range(method.n_finished):
        module.tie_knot()
    parts, layers = scale.sizes(scale.build(config(), method)), module.adapted.layers.values()
    assert parts.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert parts.base + parts.links == sum(p.nbytes for p in module.parameters())
    assert parts.links == sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in layers)
    assert parts.stack == sum(layer.stack.nbytes for layer in layers if layer.stack is not None)
    own = [sum(p.nbytes for name, p in b.named_parameters() if "lora_" not in name) for b in module.model.model.layers]
    assert (parts.block, parts.root) == (max(own), parts.base - sum(own))


def test_each_finished_link_adds_its_factors_in_bf16_to_the_stack(scale):
    stacks = [scale.sizes(scale.build(config(), scale.Method("", "stack", n))) for n in range(4)]
    assert [parts.stack for parts in stacks] == [n * stacks[0].trained * 2 for n in range(4)]


@pytest.mark.parametrize("method", METHODS, indirect=True)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
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


def test_dropouts_mask_is_a_byte_an_element_and_autocast_widens_layer_norms_as_on_a_gpu(scale):
    plain, dropping = config("opt"), config("opt")
    dropping.dropout = 0.1
    kept = [scale.activations(some, scale.METHODS[0], ROWS, LENGTH)["all"] for some in (plain, dropping)]
    assert kept[1] - kept[0] == 2 * LAYERS * ROWS * LENGTH * plain.hidden_size
    norm, x = torch.nn.LayerNorm(8, dtype=torch.bfloat16), torch.ones(2, 8, dtype=torch.bfloat16)
    with scale.AsOnAGPU(), torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    with scale.AsOnAGPU():
        assert norm(x).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")  # which is so
@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_a_checkpoint_is_as_large_as_its_formula_says(tmp_path, scale, method):
    module, ids = module_of(scale, method, tmp_path), torch.randint(3, 300, (2, 2, 8))
    chain = None if method.finished_links is None else {"at_steps": [1] if method.n_finished else []}
    run = trainer(tmp_path, chain=chain, max_steps=2)
    run.fit(module, DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=None))
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert module.link == method.n_finished
    planned = scale.checkpoint_bytes(scale.sizes(scale.build(config(), method)), method.n_finished)
    assert planned < (tmp_path / "run.ckpt").stat().st_size < planned + OVERHEAD


def test_parts_of_the_memory_on_each_gpu(scale):
    linked = scale.Sizes(trained=10, base=1000, block=400, root=200, links=40, stack=20)
    one = {"base": 1000, "links": 40, "stack": 20, "gradients": 40, "optimizer": 80, "buffers": 0}
    assert scale.memory(linked, "1 GPU", 1) == one
    assert scale.memory(linked, "DDP", 2) == one | {"buffers": 40}
    assert scale.memory(linked, "FSDP2", 2) == one | {"base": 500, "buffers": 40 + 2 * 400 + 200}
    full = scale.Sizes(trained=250, base=1000, block=400, root=200, links=0, stack=0)
    parts = {"base": 500, "links": 0, "stack": 0, "gradients": 500, "optimizer": 1000}
    assert scale.memory(full, "FSDP2", 2) == parts | {"buffers": 3 * 400 + 2 * 200}


def test_gradients_are_sent_whole_and_sharded_weights_twice_but_for_the_root(scale):
    linked = scale.Sizes(trained=10, base=1000, block=400, root=200, links=40, stack=0)
    assert scale.bytes_a_step(linked, "1 GPU", 1) == 0
    assert scale.bytes_a_step(linked, "DDP", 2) == 40  # half of the gradients to be summed, half of the sum
    assert scale.bytes_a_step(linked, "FSDP2", 2) == 40 + (2 * 800 + 200) / 2
    full = scale.Sizes(trained=250, base=1000, block=400, root=200, links=0, stack=0)
    assert scale.bytes_a_step(full, "FSDP2", 4) == (2 * 800 + 200 + 1000) * 3 / 4
    assert scale.bytes_a_knot(linked, "FSDP2", 2) == 0


@pytest.mark.parametrize("model", ["OPT-1.3B", pytest.param("Llama-2-7B", marks=pytest.mark.slow), "Llama-3-8B"])
def test_the_results_are_what_is_computed_now(scale, results, model):
    found = {}
    for result in results:
        found.setdefault((result["model"], result["method"]), []).append(result)
    assert list(found) == [(each, name) for each in scale.MODELS for name in METHODS]
    for method in scale.METHODS:
        of_layouts = found[model, method.name]
        if model == "OPT-1.3B":
            assert of_layouts == list(scale.plan(model, scale.MODELS[model], method))
            continue
        parts = scale.sizes(scale.build(scale.MODELS[model], method))  # of the larger ones what takes no forward pass
        for (layout, processes), result in zip(scale.PROCESSES.items(), of_layouts, strict=True):
            assert (result["layout"], result["processes"], result["trained"]) == (layout, processes, parts.trained)
            assert result["memory"] == scale.memory(parts, layout, processes)
            assert result["step_bytes"] == scale.bytes_a_step(parts, layout, processes)
            assert result["knot_bytes"] == scale.bytes_a_knot(parts, layout, processes)
            assert result["checkpoint_bytes"] == scale.checkpoint_bytes(parts, method.n_finished)


def test_the_models_have_as_many_parameters_as_their_names_say(results):
    trained = {result["model"]: result["trained"] for result in results if result["method"] == "full fine-tuning"}
    llama = {"Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824}
    llama |= {"Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248}
    assert trained == {"OPT-1.3B": 1_315_758_080} | llama


def test_a_base_in_4_bits_is_as_large_as_a_quantized_one(tmp_path, scale):
    pytest.importorskip("bitsandbytes")
    quantization = {"quantization": "nf4", "finished_links": "stack", "dtype": "bfloat16"}
    module = COLACausalLM(tiny.folder(tmp_path), target_modules=scale.TARGETS, rank=scale.RANK, seed=0, **quantization)
    module.configure_model()
    held = sum(p.nbytes for name, p in module.model.named_parameters() if "lora_" not in name)
    scales = [p.quant_state.absmax.nbytes for p in module.model.parameters() if hasattr(p, "quant_state")]
    planned = scale.sizes(scale.build(config(), scale.METHODS[2])).in_4_bits
    assert planned == held + sum(scales)


def test_the_tables_in_docs_are_the_benchmarks(scale, results):
    for page, columns, rows in [
        ("scaling.md", scale.COLUMNS, scale.rows(results)),
        ("troubleshooting.md", scale.OPTIONS, scale.rows_of_options(results)),
    ]:
        assert scale.markdown(columns, rows) in (ROOT / "docs" / page).read_text()
