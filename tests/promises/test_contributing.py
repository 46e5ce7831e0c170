"""The examples of CONTRIBUTING.md run, and do what they are for."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cola_lightning
from cola_lightning import AdaptedModel, LoRAConfig, PromptDataModule
from cola_lightning.data import tasks
from cola_lightning.data.rows import Row
from cola_lightning.lora import inject
from cola_lightning.lora.config import DRAWS
from tests.helpers import tiny
from tests.helpers.toy import ValidatedToy, trainer

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


@pytest.fixture(autouse=True)
def _tables_of_before(monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    monkeypatch.setitem(DRAWS, "orthogonal", None)  # which is removed after the test


def example(heading):
    """What the section's block of Python defines."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {}
    exec(compile(block, f"CONTRIBUTING.md, {heading}", "exec"), names)
    return names


def test_a_prompted_task_takes_ten_lines(tmp_path):
    example("A prompted task")
    row = {"question": "Is tea hot?", "sentence": "Tea is served hot.", "label": 0}
    made = tasks.find_task("qnli").example(Row(row, "here"))
    assert made.prompt == 'Tea is served hot.\nDoes this answer "Is tea hot?"? Yes or No?\n'
    assert (made.options, made.answer) == (("Yes", "No"), 0)
    tiny.write_rows(tmp_path, [{"question": f"Is it {k}?", "sentence": f"It is {k}.", "label": k % 2} for k in range(16)])
    module = cola_lightning.COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    rows = PromptDataModule("QNLI", str(tmp_path), train_size=8, val_size=8, test_size=16, batch_size=4)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=rows)
    assert "val_accuracy" in run.callback_metrics


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_layer_type_is_trained_and_merged(finished_links):
    names, ids = example("A layer type"), torch.arange(20).view(4, 5)
    options = LoRAConfig(["0", "2"], rank=3, alpha=6, dropout=0.3, finished_links=finished_links)
    adapted = AdaptedModel(lambda: nn.Sequential(nn.Embedding(20, 8), nn.Tanh(), nn.Linear(8, 4)), options)
    assert type(adapted.layers["0"]) is names["LoRAEmbedding"]
    for _ in range(2):
        adapted.model.train()
        optimizer = torch.optim.AdamW(adapted.trained_parameters(), lr=1e-2)
        F.cross_entropy(adapted.model(ids).flatten(0, 1), ids.flatten() % 4).backward()
        optimizer.step()
        before = adapted.model.eval()(ids)
        adapted.tie_knot()
        torch.testing.assert_close(adapted.model(ids), before, rtol=1e-5, atol=1e-6)
    weight = adapted.merged_model(0)[0].weight + adapted.chain.delta("0").T
    torch.testing.assert_close(adapted.merged_model()[0].weight, weight, rtol=1e-5, atol=1e-6)


def test_a_variant_draws_A_by_its_rule():
    adapted = example("A variant of the method")["adapted"]
    for _ in range(2):
        (layer,) = adapted.layers.values()
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(2))
        adapted.tie_knot()


def test_a_data_module_feeds_a_run(tmp_path):
    class Sines(ValidatedToy):
        def build_model(self):
            return nn.Linear(8, 8)

    rows = example("A data module")["SineDataModule"](batch_size=50)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(Sines(target_modules=None, seed=0), datamodule=rows)
    assert run.global_step == 12
