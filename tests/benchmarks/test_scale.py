"""What the plan for large models says of a small one is what is there, and its results are what it says now."""

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks import scale
from benchmarks.lines import Lines
from cola_lightning import COLACausalLM
from tests.helpers import tiny
from tests.helpers.toy import trainer

pytestmark = pytest.mark.docs


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")  # which is so
@pytest.mark.parametrize("method", scale.METHODS, ids=lambda method: method.name)
def test_weights_links_and_stack_are_those_of_a_module(tmp_path, method):
    is_full = method.finished_links is None
    chain = {"target_modules": None if is_full else scale.TARGETS, "rank": scale.RANK, "alpha": scale.ALPHA, "seed": 0}
    chain |= {} if is_full else {"finished_links": method.finished_links}
    module = COLACausalLM(tiny.folder(tmp_path), dtype=str(method.dtype).removeprefix("torch."), **chain)
    run = trainer(tmp_path, chain=None if is_full else {"at_steps": [1] if method.n_finished else []}, max_steps=2)
    ids = torch.randint(3, 300, (2, 2, 8))
    run.fit(module, DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=None))
    assert module.n_finished == method.n_finished
    parts, layers = scale.sizes(scale.build(tiny.config("llama"), method)), module.adapted.layers.values()
    assert parts["trained"] == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert parts["base"] + parts["links"] == sum(p.nbytes for p in module.parameters())
    assert parts["links"] == sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in layers)
    assert parts["stack"] == sum(layer.stack.A.nbytes + layer.stack.B.nbytes for layer in layers if layer.stack is not None)


@pytest.mark.parametrize(
    "method", [scale.METHODS[0], *(pytest.param(method, marks=pytest.mark.slow) for method in scale.METHODS[1:])]
)
def test_the_results_are_what_is_computed_now(method):
    results = Lines(scale.FILE).results
    (found,) = (one for one in results if (one["model"], one["method"]) == ("OPT-1.3B", method.name))
    assert found == scale.plan("OPT-1.3B", method)
