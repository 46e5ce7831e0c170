"""The examples of CONTRIBUTING.md run, and do what they are for."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cola_lightning
from cola_lightning import AdaptedModel, COLAModule, PromptDataModule, UserError, inject_lora
from cola_lightning.chain import schedule
from cola_lightning.data import tasks
from cola_lightning.data.rows import Row
from cola_lightning.lora import inject
from tests import tiny
from tests.toy import assert_bit_equal, trainer, weights

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(autouse=True)
def _tables_of_before(monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    monkeypatch.setattr(schedule, "FROZEN_FACTOR", dict(schedule.FROZEN_FACTOR))


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
    for split in ("train", "validation", "test"):
        lines = [f'{{"question": "Is it {k}?", "sentence": "It is {k}.", "label": {k % 2}}}\n' for k in range(16)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    module = cola_lightning.COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    rows = PromptDataModule("QNLI", str(tmp_path), train_size=8, val_size=8, test_size=16, batch_size=4)
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2)
    run.fit(module, datamodule=rows)
    assert len(module.chain) == 1
    assert "val_accuracy" in run.callback_metrics


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_layer_type_has_what_every_layer_has(finished_links):
    names = example("A layer type")

    def make():
        torch.manual_seed(0)
        arguments = {"target_modules": ["0", "2"], "rank": 3, "alpha": 6, "dropout": 0.3, "finished_links": finished_links}
        return AdaptedModel.of(lambda: nn.Sequential(nn.Embedding(20, 8), nn.Tanh(), nn.Linear(8, 4)), **arguments)

    adapted, ids = make(), torch.arange(20).view(4, 5)
    assert type(adapted.layers["0"]) is names["LoRAEmbedding"]
    plain = adapted.merged_model(0)
    for _ in range(3):
        adapted.model.train()
        optimizer = torch.optim.AdamW(adapted.trained_parameters(), lr=1e-2)
        F.cross_entropy(adapted.model(ids).flatten(0, 1), ids.flatten() % 4).backward()
        optimizer.step()
        adapted.model.eval()
        before = adapted.model(ids)
        adapted.tie_knot()
        torch.testing.assert_close(adapted.model(ids), before, rtol=1e-5, atol=1e-6)
    weight = plain[0].weight + adapted.chain.delta("0").T
    torch.testing.assert_close(adapted.merged_model()[0].weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adapted.model(ids)[0], adapted.merged_model().eval()(ids)[0], rtol=1e-5, atol=1e-6)
    again = make()
    again.go_to(adapted.chain)
    again.begin_link(3, 6)
    assert_bit_equal(weights(again.model), weights(adapted.model))
    assert torch.equal(again.model.eval()(ids), adapted.model(ids))
    assert type(adapted.merged_model()[0]) is nn.Embedding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_that_looks_up_indices_computes_in_its_own_dtype(dtype):
    example("A layer type")
    model = nn.Sequential(nn.Embedding(20, 8)).to(dtype)
    inject_lora(model, ["0"], rank=2, alpha=4, finished_links="stack")
    nn.init.ones_(model[0].lora_B)
    before = model(torch.arange(20))
    model[0].finish()
    after = model(torch.arange(20))
    assert before.dtype == after.dtype == dtype
    torch.testing.assert_close(before, after, rtol=2e-2, atol=2e-2)


def test_a_layer_type_that_peft_export_does_not_know_is_refused(tmp_path):
    from cola_lightning.export.adapter import as_peft_weights

    example("A layer type")
    adapted = AdaptedModel.of(lambda: nn.Sequential(nn.Embedding(20, 8)), target_modules=["0"], rank=2, alpha=4)
    link = adapted.tie_knot()
    with pytest.raises(UserError, match=r"^format: expected merged, for PEFT has no LoRA, or another, for '0', a Embedding"):
        as_peft_weights(adapted.merged_model(0), link.factors)


def test_a_variant_trains_the_factor_that_its_rule_says():
    names = example("A variant of the method")
    adapted = names["adapted"]
    x = torch.randn(16, 8)
    for trained in "BABA":
        (layer,) = adapted.layers.values()
        before = {"A": layer.lora_A.detach().clone(), "B": layer.lora_B.detach().clone()}
        optimizer = torch.optim.SGD(adapted.trained_parameters(), lr=0.1)
        adapted.model(x).square().sum().backward()
        optimizer.step()
        assert [name for name in "AB" if not torch.equal(getattr(layer, f"lora_{name}"), before[name])] == [trained]
        adapted.tie_knot()
    assert len(adapted.chain) == 4


class Sines(COLAModule):
    def build_model(self):
        return nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_a_data_module_feeds_a_run(tmp_path):
    names = example("A data module")
    rows = names["SineDataModule"](batch_size=50)
    module = Sines(target_modules=None, seed=0)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, datamodule=rows)
    assert run.global_step == 12
