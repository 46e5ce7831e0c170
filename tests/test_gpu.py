"""What holds on a device: chains on bases of several kinds by ``pytest -m gpu``, one of them always on the CPU; its benchmark.

One link against peft is in test_adapter.py, and DDP, FSDP1 and FSDP2 are in test_distributed.py.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW

from cola_lightning import COLACausalLM, COLAModule
from tests import forked, tiny
from tests.test_quantization import Rows
from tests.toy import assert_bit_equal, trainer, weights

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODES = {"float32, merge": ("float32", None, "merge"), "bf16, merge": ("bfloat16", None, "merge")}
MODES |= {"bf16, stack": ("bfloat16", None, "stack"), "nf4, stack": ("bfloat16", "nf4", "stack")}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deterministic"),  # what CUDA has no such kernel for
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft 0.21 under transformers 5.24
]


# ---------------------------------------------------------------------- a chain on a device


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.gpu] * (name != "bf16, stack")) for name in MODES]
)
def chained(request, device, tmp_path_factory):
    """A run of three links of two steps on the device, and its checkpoint after each step."""
    dtype, quantization, finished_links = MODES[request.param]
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    torch.use_deterministic_algorithms(device == "cuda", warn_only=True)
    how = {"dtype": dtype, "quantization": quantization, "finished_links": finished_links, "attn_implementation": "eager"}
    chain = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 6, "dropout": 0.1, "seed": 0}
    name, folder = tiny.folder(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("run")

    def fit(to, ckpt_path=None):
        module = COLACausalLM(name, optimizer=lambda parameters: AdamW(parameters, lr=1e-2), **how, **chain)
        saving = ModelCheckpoint(to, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "enable_checkpointing": True}
        run = trainer(to, saving, chain={"every_n_train_steps": 2}, max_steps=6, **options)
        run.fit(module, datamodule=Rows(), ckpt_path=ckpt_path)
        assert run.strategy.root_device.type == device
        return module

    yield SimpleNamespace(module=fit(folder), fit=fit, folder=folder, is_half=dtype == "bfloat16")
    torch.use_deterministic_algorithms(False)


def loaded(chained, device):
    """A module from the last checkpoint, on the device."""
    return COLAModule.load_from_checkpoint(chained.folder / "step=6.ckpt", map_location=device)


def difference(mine, theirs):
    """The largest difference, relative to the largest value."""
    return float((mine - theirs).abs().max() / theirs.abs().max())


def test_a_knot_keeps_the_function(chained, device):
    module = loaded(chained, device)
    expected = tiny.logits(module.model)
    link = module.tie_knot()
    assert expected.device.type == device
    assert link.norm() > 0.05
    assert not any(layer.lora_B.any() for layer in module.adapted.layers.values())
    assert difference(tiny.logits(module.model), expected) < (2e-2 if chained.is_half else 1e-5)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_run_that_resumes_inside_a_link_is_the_run_itself(chained, tmp_path):
    resumed = chained.fit(tmp_path, ckpt_path=str(chained.folder / "step=3.ckpt"))
    assert len(resumed.chain) == 2
    assert resumed.chain.is_beginning_of(chained.module.chain)
    assert_bit_equal(weights(resumed), weights(chained.module))


def test_an_export_is_the_model_and_takes_no_second_copy_on_the_device(chained, device, tmp_path):
    module = loaded(chained, device)
    before = weights(module)
    if device == "cuda":
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    lines = {format_: module.export(tmp_path / format_, format_) for format_ in ("merged", "peft", "chain")}
    if device == "cuda":
        held = sum(parameter.nbytes for parameter in module.parameters())
        assert torch.cuda.max_memory_allocated() - allocated < held / 4
    assert all(any("loaded again" in line for line in text) for text in lines.values())
    assert_bit_equal(weights(module), before)
    assert {parameter.device.type for parameter in module.parameters()} == {device}
    assert difference(tiny.logits(module.merged_model()), tiny.logits(module.model)) < (2e-2 if chained.is_half else 1e-5)


# ---------------------------------------------------------------------- the benchmark


@pytest.fixture
def gpu():
    yield importlib.import_module("gpu")
    del sys.modules["gpu"]


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_measures_every_side_and_option_on_the_same_batches(gpu, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(device == "cuda"))  # transformers' Trainer would take all
    found = {}
    for made in gpu.plan(True):
        if not made["compile"]:  # which takes a minute on a CPU
            result = gpu.measure(made, device)
            assert "error" not in result
            assert len(result["all_seconds"]) == gpu.STEPS
            assert min(result["seconds"], result["gib"], result["tokens_a_second"]) > 0
            found[made["side"], made["base"], made["checkpointing"]] = result
    assert len(found) == 10
    for (side, base, _), result in found.items():  # at the start a link adds nothing
        assert result["loss"] == pytest.approx(found["floor", base, False]["loss"], rel=1e-5 if device == "cpu" else 1e-2)
        if side != "floor":  # A and B of two layers in two blocks, and two moments: the finished link is in float32, too
            assert result["checkpoint_bytes"] > 3 * 4 * 2 * 8 * (64 + 64 + 64 + 32)
            assert ("knot_seconds" in result) is (side == "cola")


# In place of the benchmark's own functions: one that works, one that dies, one that takes too long, one without memory. It is
# called without any time, then with some, and once more when its first line is gone.
STAND_INS = """
import os, sys, time, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gpu

def too_large(*of):
    raise torch.OutOfMemoryError("tried to allocate 1 TiB")

gpu.plan = lambda is_small: [
    {"model": "small", "base": base, "length": 16, "checkpointing": False, "compile": False, "side": side}
    for base, side in [("bf16", "floor"), ("bf16", "cola"), ("bf16", "peft"), ("nf4", "cola")]
]
gpu.cola = lambda made, *of: os._exit(3) if made["base"] == "bf16" else too_large()
gpu.peft = lambda *of: time.sleep(60)
path = Path("gpu.jsonl")
for words in (["--minutes", "0"], ["--limit", "3"], []):
    sys.argv[1:] = ["--small", "--output", str(path), *words]
    gpu.main()
    assert path.exists() is (words != ["--minutes", "0"])
    if words == ["--limit", "3"]:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
"""


def test_the_benchmark_writes_a_line_for_what_failed_and_repeats_only_what_is_missing(gpu, tmp_path):
    forked.run("-c", STAND_INS, BENCHMARKS, cwd=tmp_path, check=True)
    results = tiny.read_rows(tmp_path / "gpu.jsonl")
    errors = [result.get("error") for result in results]
    assert errors == ["the process ended with 3", "no end in 3 seconds", "out of memory", None]
    assert all({"device", "torch", "transformers", "peft", "lightning"} <= result.keys() for result in results)
    assert [row[5].rpartition(" / ")[0] for row in gpu.rows(results)] == ["failed / failed", ""]
    assert gpu.rows(results)[1][5] == "out of memory"


def test_the_benchmarks_plan_is_all_that_was_asked(gpu):
    plan = gpu.plan(False)
    assert len({tuple(one.values()) for one in plan}) == len(plan)
    for field, n in {"model": 2, "base": 2, "length": 3, "checkpointing": 2, "compile": 2, "side": 3}.items():
        assert len({one[field] for one in plan}) == n
    lines = [one | {"device": "a GPU", "seconds": 2.0, "gib": 4.0, "tokens_a_second": 1.0} for one in plan]
    assert [len(row) for row in gpu.rows(lines)] == [len(gpu.COLUMNS)] * 48
    assert gpu.rows(lines)[0][:8] == ["a GPU", "Llama-3.2-1B", "bf16", "512", "", "2.000 / 2.000 / 2.000", "1.00", "1.00"]
    assert gpu.rows_of_memory(lines)[0] == ["a GPU", "Llama-3.2-1B", "bf16", "", *["4.0 / 4.0"] * 3]
    assert gpu.rows([])[0][0] == gpu.rows_of_memory([])[0][0] == gpu.NOT_RUN
