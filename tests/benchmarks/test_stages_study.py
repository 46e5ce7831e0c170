"""The study of stages, with a tiny model in float32: its loop is LoRA by hand, its rows, its scales."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from benchmarks.stages import scales, training
from benchmarks.stages.arms import ARMS
from benchmarks.stages.language import LANGUAGE
from cola_lightning import Chain
from tests.helpers import tiny

pytestmark = pytest.mark.docs

TASKS = list(LANGUAGE.tasks)
SMALL = {"steps": 4, "batch_size": 4, "eval_batch_size": 4, "rank": 2, "alpha": 4, "autocast": None}


@pytest.fixture
def language(tmp_path):
    """The sequence with a tiny model."""
    return replace(LANGUAGE, **SMALL, model={"model_name": tiny.folder(tmp_path / "model")}, chains=tmp_path / "chains")


@pytest.fixture
def data():
    """Rows of random tokens, six for test and validation each."""
    generator = torch.Generator().manual_seed(0)

    def row():
        n, n_prompt = (int(torch.randint(*sizes, (1,), generator=generator)) for sizes in ((10, 20), (2, 8)))
        return {"input_ids": torch.randint(400, (n,), generator=generator).tolist(), "spans": [n_prompt, n]}

    sizes = {"train": 20, "validation": 6, "test": 6}
    return {task: {split: [row() for _ in range(n)] for split, n in sizes.items()} for task in TASKS}


class ByHand(nn.Module):
    """A linear layer with a LoRA."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.A, self.B = nn.Parameter(torch.zeros(2, linear.in_features)), nn.Parameter(torch.zeros(linear.out_features, 2))

    def forward(self, x):
        return self.linear(x) + 2.0 * (x @ self.A.T) @ self.B.T


def loss_by_hand(model, rows):
    """The mean loss of the responses' tokens, one row at a time, with all logits."""
    total = 0.0
    for row in rows:
        ids, (start, end) = torch.tensor(row["input_ids"]), row["spans"]
        total = total + F.cross_entropy(model(ids[None]).logits[0, start - 1 : end - 1], ids[start:end], reduction="sum")
    return total / sum(row["spans"][1] - row["spans"][0] for row in rows)


@pytest.mark.parametrize("name", ["lora", "link", "half"])
def test_the_loop_is_that_of_lora_by_hand(name, language, data):
    arm, rate = ARMS[name], 1e-2
    adapted = language.adapted_model(seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(language.model["model_name"]).requires_grad_(False)
    layers = {}
    for k, block in enumerate(model.model.layers):
        for target in ("q_proj", "v_proj"):
            layer = layers[f"model.layers.{k}.self_attn.{target}"] = ByHand(getattr(block.self_attn, target))
            setattr(block.self_attn, target, layer)
    for stage, rows in enumerate(training.rows_of_stages(language, arm, data, TASKS[:3], 3)):
        if name == "link" or not stage:
            with torch.no_grad():
                for key, layer in layers.items():
                    layer.A.copy_(adapted.layers[key].lora_A)
                    layer.B.zero_()
        optimizer = torch.optim.AdamW([part for layer in layers.values() for part in (layer.A, layer.B)], lr=rate)
        expected = []
        for step in range(4):
            optimizer.param_groups[0]["lr"] = rate * (4 - step) / 4
            loss = loss_by_hand(model, rows[4 * step : 4 * step + 4])
            expected.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert training.train_stage(language, adapted, rows, rate) == pytest.approx(expected, abs=1e-5)
        link = adapted.tie_knot(knot=arm.knot)
        with torch.no_grad():
            for layer in layers.values():
                layer.linear.weight += link.share * 2.0 * layer.B @ layer.A
                layer.B *= 1 - link.share
    losses = training.evaluate(language, adapted.model, data, "test")["loss"]
    with torch.no_grad():
        for task, of_task in zip(TASKS, losses, strict=True):
            rows = data[task]["test"]
            by_hand = [float(loss_by_hand(model, [row])) * language.sizes([row])[0] for row in rows]
            assert of_task == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("name", ["lora", "half", "link-orthogonal"])
def test_the_updates_of_the_stages_are_the_model_at_the_end(name, language, data):
    run = {"arm": name, "order": 1, "seed": 0, "rate": 1e-2}
    result = training.train(language, run, data)
    assert np.shape(result["matrix"]) == (4, 4, 6)
    updates = scales.stage_updates(Chain.load(language.chain_folder(run)))
    assert [link.name for link in updates.links] == list(language.orders[1])
    adapted = language.adapted_model(0)
    for stage in range(4):
        adapted.go_to(updates.scaled(dict.fromkeys(range(stage + 1, 4), 0.0)))
        losses = np.array(training.evaluate(language, adapted.model, data, "test")["loss"])
        assert losses == pytest.approx(np.array(result["matrix"][stage]), abs=2e-3)


def test_scales_are_fitted_on_the_rows_for_validation(language, data):
    run = {"order": 0, "seed": 0, "rate": 3e-2}
    of = training.train(language, run | {"arm": ARMS["link-scaled"].scaled}, data)
    result = scales.fit_scales(language, run | {"arm": "link-scaled"}, data)
    assert sum(result["validation"]) < sum(of["validation"])
    assert set(result["scales"]) <= {1.0, *scales.SCALES} != {1.0}
    assert np.shape(result["matrix"]) == (1, 4, 6)


def test_a_tasks_rows_are_those_of_its_seed_and_replay_takes_the_place_of_some(language, data):
    language = replace(language, steps=10)
    plain = training.rows_of_stages(language, ARMS["lora"], data, TASKS, 1)
    assert plain == training.rows_of_stages(language, ARMS["half"], data, TASKS[::-1], 1)[::-1]
    assert plain != training.rows_of_stages(language, ARMS["lora"], data, TASKS, 2)
    for stage, rows in enumerate(training.rows_of_stages(language, ARMS["link-replay"], data, TASKS, 1)):
        assert len(rows) == 40
        for k, task in enumerate(TASKS):
            n = 2 if k < stage else 40 - 2 * stage if k == stage else 0
            assert sum(row in data[task]["train"] for row in rows) == n
    (together,) = training.rows_of_stages(language, ARMS["joint"], data, TASKS, 1)
    assert [row in data[TASKS[k % 4]]["train"] for k, row in enumerate(together)] == [True] * 160
