"""The study of stages, with a tiny model in float32: its loop is LoRA by hand, its rows, its scales, its measures, its plan."""

import math

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from torch import nn
from torch.nn import functional as F

from benchmarks import gsm8k, stages
from benchmarks.lines import Lines
from tests.helpers import tiny

TASKS = list(stages.TASKS)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Rows of random tokens, six for test and validation each; the model, the steps and the precision are the tests' own."""
    settings = {"STEPS": 4, "BATCH_SIZE": 4, "EVAL_BATCH_SIZE": 4, "RANK": 2, "ALPHA": 4, "AUTOCAST": None}
    settings |= {"MODEL": {"model_name": tiny.folder(tmp_path / "model")}, "CHAINS": tmp_path / "chains"}
    for name, value in settings.items():
        monkeypatch.setattr(stages, name, value)
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
def test_the_loop_is_that_of_lora_by_hand(name, data):
    arm, rate = stages.ARMS[name], 1e-2
    adapted = stages.adapted_model(seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(stages.MODEL["model_name"]).requires_grad_(False)
    layers = {}
    for k, block in enumerate(model.model.layers):
        for target in ("q_proj", "v_proj"):
            layer = layers[f"model.layers.{k}.self_attn.{target}"] = ByHand(getattr(block.self_attn, target))
            setattr(block.self_attn, target, layer)
    for stage, rows in enumerate(stages.rows_of_stages(arm, data, TASKS[:3], 3)):
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
        assert stages.train_stage(adapted, rows, rate) == pytest.approx(expected, abs=1e-5)
        link = adapted.tie_knot(knot=arm.knot)
        with torch.no_grad():
            for layer in layers.values():
                layer.linear.weight += link.share * 2.0 * layer.B @ layer.A
                layer.B *= 1 - link.share
    losses = stages.evaluate(adapted.model, data, "test")
    with torch.no_grad():
        for task, of_task in zip(TASKS, losses, strict=True):
            rows = data[task]["test"]
            by_hand = [float(loss_by_hand(model, [row])) * stages.n_tokens([row])[0] for row in rows]
            assert of_task == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("name", ["lora", "link", "half", "link-replay", "link-orthogonal"])
def test_the_updates_of_the_stages_are_the_model_at_the_end(name, data):
    run = {"arm": name, "order": 1, "seed": 0, "rate": 1e-2}
    result = stages.train(run, data)
    assert np.shape(result["matrix"]) == (4, 4, 6)
    updates = stages.stage_updates(stages.Chain.load(stages.chain_folder(run)))
    assert [link.name for link in updates.links] == list(stages.ORDERS[1])
    adapted = stages.adapted_model(0)
    for stage in range(4):
        adapted.go_to(updates.scaled(dict.fromkeys(range(stage + 1, 4), 0.0)))
        losses = np.array(stages.evaluate(adapted.model, data, "test"))
        assert losses == pytest.approx(np.array(result["matrix"][stage]), abs=2e-3)


@pytest.mark.parametrize("name", ["lora-scaled", "link-scaled"])
def test_scales_are_fitted_on_the_rows_for_validation(name, data):
    run = {"order": 0, "seed": 0, "rate": 3e-2}
    of = stages.train(run | {"arm": stages.ARMS[name].scaled}, data)
    result = stages.fit_scales(run | {"arm": name}, data)
    assert sum(result["validation"]) < sum(of["validation"])
    assert set(result["scales"]) <= {1.0, *stages.SCALES} != {1.0}
    assert np.shape(result["matrix"]) == (1, 4, 6)


def test_a_tasks_rows_are_those_of_its_seed_and_replay_takes_the_place_of_some(data, monkeypatch):
    monkeypatch.setattr(stages, "STEPS", 10)
    plain = stages.rows_of_stages(stages.ARMS["lora"], data, TASKS, 1)
    assert plain == stages.rows_of_stages(stages.ARMS["half"], data, TASKS[::-1], 1)[::-1]
    assert plain != stages.rows_of_stages(stages.ARMS["lora"], data, TASKS, 2)
    for stage, rows in enumerate(stages.rows_of_stages(stages.ARMS["link-replay"], data, TASKS, 1)):
        assert len(rows) == 40
        for k, task in enumerate(TASKS):
            n = 2 if k < stage else 40 - 2 * stage if k == stage else 0
            assert sum(row in data[task]["train"] for row in rows) == n
    (together,) = stages.rows_of_stages(stages.ARMS["joint"], data, TASKS, 1)
    assert [row in data[TASKS[k % 4]]["train"] for k, row in enumerate(together)] == [True] * 160


@pytest.mark.parametrize("name", ["joint", "alone"])
def test_a_bound_has_the_losses_at_the_end(name, data):
    run = {"arm": name, "order": 1, "seed": 0, "rate": 1e-2}
    result = stages.train(run, data)
    assert np.shape(result["matrix"]) == (1, 4, 6)
    assert len(result["validation"]) == 4
    if name == "alone":  # a model for a task is the one after the first stage of an order that begins with it
        first = stages.train(run | {"arm": "link"}, data)
        k = TASKS.index(stages.ORDERS[1][0])
        assert result["matrix"][0][k] == first["matrix"][0][k]


def test_the_penalty_is_zero_for_rows_that_are_orthogonal_to_earlier_ones(data):
    adapted = stages.adapted_model(0)
    assert stages.overlap(adapted) == 0
    adapted.tie_knot()
    assert stages.overlap(adapted) > 0
    with torch.no_grad():
        for name, layer in adapted.layers.items():
            (earlier,) = (lora_A for lora_A, _, _ in adapted.chain.link_factors(name))
            layer.lora_A -= layer.lora_A @ torch.linalg.pinv(earlier) @ earlier
    assert stages.overlap(adapted).item() < 1e-9


def test_forgetting_is_against_the_lowest_loss_since_a_tasks_own_stage():
    sizes = np.array([[1.0, 3.0]] * 4)
    means = [[1.0, 5, 5, 5], [0.8, 2, 0, 5], [1.2, 2.1, 3, 5], [1.5, 1.9, 3.3, 4]]  # after each stage, per token
    line = {"order": 0, "matrix": [[[loss, 3 * loss] for loss in losses] for losses in means]}
    assert stages.forgetting(line, sizes).sum(1) == pytest.approx([0.7 / 3, -0.1 / 3, 0.3 / 3, 0])
    assert stages.after_own_stage(line, sizes).sum() == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert stages.at_the_end(line, sizes).sum() == pytest.approx((1.5 + 1.9 + 3.3 + 4) / 4)


def test_an_interval_is_over_rows_and_runs():
    generator = np.random.default_rng(0)
    sizes, ours, theirs = generator.integers(1, 9, (1, 7)).astype(float), *generator.random((2, 3, 1, 7))
    as_rows = [[[(loss / n, n) for loss, n in zip(run[0], sizes[0], strict=True)] for run in side] for side in (ours, theirs)]
    parts = [side / sizes.sum() for side in (ours, theirs)]
    assert stages.difference_of(*parts, sizes) == pytest.approx(gsm8k.difference_of(*as_rows))  # of one task
    ones, gaps = np.ones((2, 7)), generator.random((2, 7))
    of_tasks = [gap.var(ddof=1) / 7 / 4 for gap in gaps]
    mean, low, high = stages.difference_of(gaps[None] / 14, 0 * gaps[None], ones)
    freedom = sum(of_tasks) ** 2 / sum(variance**2 / 6 for variance in of_tasks)
    assert mean == pytest.approx(gaps.mean())
    assert (high - low) / 2 == pytest.approx(math.sqrt(sum(of_tasks)) * stats.t.ppf(0.975, freedom))


def test_rates_are_tuned_until_the_best_is_between_two_and_a_second_call_repeats_nothing(data, tmp_path, monkeypatch):
    done = []

    def result(run, data):
        done.append(run)
        loss = abs(math.log(run["rate"] / (4e-3 if run["arm"] == "link" else 1e-3))) + run["seed"] / 10 + 1
        matrix = generator.random((1 if "scales" in stages.ARMS[run["arm"]].title else 4, 4, 6)) * loss
        return {"matrix": matrix.tolist(), "validation": [loss] * 4, "seconds": 1}

    generator, lines = np.random.default_rng(0), Lines(tmp_path / "lines.jsonl")
    monkeypatch.setattr(stages, "train", result)
    monkeypatch.setattr(stages, "fit_scales", result)
    stages.run_missing(lines, data)
    assert [(run["arm"], run["rate"]) for run in done[:3]] == [("lora", 1e-3), ("link", 1e-3), ("lora", 5e-4)]
    assert sorted(run["rate"] for run in done if run["arm"] == "link" and not run["seed"] + run["order"]) == [
        *(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    ]
    assert {run["rate"] for run in done if run["arm"] == "link-scaled"} == {4e-3}
    assert {run["arm"] for run in done} == set(stages.ARMS)
    n = len(done)
    again = Lines(lines.path)
    stages.run_missing(again, data)
    assert len(done) == n
    head, *rows = stages.table(again)
    assert {len(row) for row in rows} == {len(head)}
    assert [row[:3] for row in rows[:2]] == [["one LoRA that goes on", "0.001", "6"], ["a new link per stage", "0.004", "6"]]
    assert len(stages.table_of_rates(again)) == 1 + 1 + sum(not run["seed"] + run["order"] for run in done)
