"""What holds on a device: chains on bases of several kinds by ``pytest -m gpu``, one of them always on the CPU.

One link against peft is in test_adapter.py, and DDP, FSDP1 and FSDP2 are in test_distributed.py.
"""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW

from benchmarks import gpu
from cola_lightning import COLACausalLM, COLAModule
from tests.helpers import tiny
from tests.helpers.tiny import RandomRows as Rows
from tests.helpers.toy import assert_bit_equal, trainer, weights

MODES = {"float32, merge": ("float32", None, "merge"), "bf16, merge": ("bfloat16", None, "merge")}
MODES |= {"bf16, stack": ("bfloat16", None, "stack"), "nf4, stack": ("bfloat16", "nf4", "stack")}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deterministic"),  # what CUDA has no such kernel for
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft 0.21 under transformers 5.24
]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.gpu] * (name != "bf16, stack")) for name in MODES]
)
def chained(request, device, tmp_path_factory):
    """A run of three links of two steps on the device, and its checkpoint after each step."""
    dtype, quantization, finished_links = MODES[request.param]
    torch.use_deterministic_algorithms(device == "cuda", warn_only=True)
    given = {"dtype": dtype, "quantization": quantization, "finished_links": finished_links, "attn_implementation": "eager"}
    chain = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 6, "dropout": 0.1, "seed": 0}
    name, folder = tiny.folder(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("run")

    def fit(to, ckpt_path=None):
        module = COLACausalLM(name, optimizer=lambda parameters: AdamW(parameters, lr=1e-2), **given, **chain)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_the_benchmark_measures_both_sides(device, base):
    found = gpu.measure(gpu.TINY, base, 16, device)
    assert [len(found["seconds"][side]) for side in gpu.SIDES] == [7, 7]
    assert len(gpu.row({"model": "tiny", "base": base, **found})) == 7
