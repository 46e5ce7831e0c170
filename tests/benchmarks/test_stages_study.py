"""The study of stages, with tiny models in float32: its loop is LoRA by hand, its rows, its scales, its measures, its plan."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from torch import nn
from torch.nn import functional as F

from benchmarks.lines import Lines
from benchmarks.stages import encoder, measures, plan, scales, tables, training
from benchmarks.stages.arms import ARMS
from benchmarks.stages.encoder import ENCODER
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


SETTINGS = {"olora": {"weight": 0.05, "norms": 0.01}, "olora-written": {"weight": 0.5, "norms": 0.0}}


@pytest.mark.parametrize("name", ["lora", "link", "half", "olora", "olora-written", "slao"])
def test_a_run_is_a_plain_loop(name, language, data):
    run = {"arm": name, "order": 0, "seed": 3, "rate": 1e-2} | SETTINGS.get(name, {})
    result, drawn = training.train(language, run, data), language.adapted_model(seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(language.model["model_name"]).requires_grad_(False)
    layers = {}
    for k, block in enumerate(model.model.layers):
        for target in ("q_proj", "v_proj"):
            layer = layers[f"model.layers.{k}.self_attn.{target}"] = ByHand(getattr(block.self_attn, target))
            setattr(block.self_attn, target, layer)
    earlier = {key: [] for key in layers}
    trained = dict[str, tuple[torch.Tensor, torch.Tensor]]()
    merged = {key: torch.zeros_like(layer.B) for key, layer in layers.items()}

    def penalty():
        total = run["norms"] * sum(layer.A.norm() + layer.B.norm() for layer in layers.values())
        for key, layer in layers.items():
            for A in earlier[key]:
                total = (
                    total + run["weight"] * ((A @ layer.A.T) ** 2 if name == "olora-written" else (A @ layer.A.T).abs()).sum()
                )
        return total

    for stage, rows in enumerate(training.rows_of_stages(language, ARMS[name], data, TASKS, 3)):
        with torch.no_grad():
            for key, layer in layers.items():
                if ARMS[name].knot == "cola" or not stage:
                    layer.A.copy_(drawn.layers[key].lora_A)
                    layer.B.zero_()
                elif name == "slao":
                    layer.A.copy_(torch.linalg.qr(trained[key][0].T)[0].T)
                    layer.A *= (layer.A * trained[key][0]).sum(1, keepdim=True).sign()
                    layer.B.copy_(trained[key][1])
        optimizer = torch.optim.AdamW([part for layer in layers.values() for part in (layer.A, layer.B)], lr=1e-2)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 1e-2 * (4 - step) / 4
            loss = loss_by_hand(model, rows[4 * step : 4 * step + 4])
            (loss + penalty() if "weight" in run else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = {key: (layer.A.detach().clone(), layer.B.detach().clone()) for key, layer in layers.items()}
        with torch.no_grad():
            for key, layer in layers.items():
                merged[key] += (layer.B - merged[key]) / (stage + 1) ** 0.5
                if name == "slao":
                    layer.B.copy_(merged[key])
            losses = {task: [float(loss_by_hand(model, [row])) for row in data[task]["test"]] for task in TASKS[: stage + 1]}
            for task, found in zip(TASKS, result["matrix"][stage], strict=False):
                sizes = language.sizes(data[task]["test"])
                by_hand = [value * size for value, size in zip(losses.get(task, []), sizes, strict=False)]
                assert found == pytest.approx(by_hand, abs=2e-3)
            share = {"cola": 1.0, "half": 0.5, "record": 0.0}[ARMS[name].knot]
            for key, layer in layers.items():
                earlier[key].append(layer.A.clone())
                layer.linear.weight += share * 2.0 * layer.B @ layer.A
                layer.B *= 1 - share
        drawn.tie_knot()


@pytest.mark.parametrize("name", ["lora", "link", "half", "link-replay"])
def test_the_updates_of_the_stages_are_the_model_at_the_end(name, language, data):
    run = {"arm": name, "order": 1, "seed": 0, "rate": 1e-2}
    result = training.train(language, run, data)
    updates = scales.stage_updates(Chain.load(language.chain_folder(run)))
    assert [link.name for link in updates.links] == list(language.orders[1])
    adapted = language.adapted_model(0)
    for stage in range(4):
        adapted.go_to(updates.scaled(dict.fromkeys(range(stage + 1, 4), 0.0)))
        losses, seen = training.evaluate(language, adapted.model, data, "test")["loss"], language.orders[1][: stage + 1]
        for task, of_task, found in zip(TASKS, losses, result["matrix"][stage], strict=True):
            assert found == (pytest.approx(of_task, abs=2e-3) if task in seen else [])  # of the tasks so far


@pytest.mark.parametrize("name", ["lora-scaled", "link-scaled"])
def test_scales_are_fitted_on_the_rows_for_validation(name, language, data):
    run = {"order": 0, "seed": 0, "rate": 3e-2}
    of = training.train(language, run | {"arm": ARMS[name].of}, data)
    result = scales.rescale(language, run | {"arm": name}, data)
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


@pytest.mark.parametrize("name", ["joint", "alone"])
def test_a_bound_has_the_losses_at_the_end(name, language, data):
    run = {"arm": name, "order": 1, "seed": 0, "rate": 1e-2}
    result = training.train(language, run, data)
    assert np.shape(result["matrix"]) == (1, 4, 6)
    assert len(result["validation"]) == 4
    if name == "alone":  # a model for a task is the one after the first stage of an order that begins with it
        first = training.train(language, run | {"arm": "link"}, data)
        k = TASKS.index(language.orders[1][0])
        assert result["matrix"][0][k] == first["matrix"][0][k]


def test_the_penalty_is_zero_for_rows_that_are_orthogonal_to_earlier_ones(language):
    adapted = language.adapted_model(0)
    adapted.tie_knot()
    earlier = {name: next(iter(adapted.chain.link_factors(name)))[0] for name in adapted.layers}
    products = [(earlier[name] @ layer.lora_A.T).detach() for name, layer in adapted.layers.items()]
    sums = {"written": sum(p.square().sum().item() for p in products), "released": sum(p.abs().sum().item() for p in products)}
    for kind, summed in sums.items():
        assert training.penalty(adapted, kind, 2.0, 0.0).item() == pytest.approx(2 * summed, rel=1e-5)
    norms = sum(layer.lora_A.norm() + layer.lora_B.norm() for layer in adapted.layers.values())
    assert training.penalty(adapted, "released", 0.0, 0.1).item() == pytest.approx(0.1 * norms.item(), rel=1e-5)
    with torch.no_grad():
        for name, layer in adapted.layers.items():
            layer.lora_A -= layer.lora_A @ torch.linalg.pinv(earlier[name]) @ earlier[name]
    assert training.penalty(adapted, "written", 1.0, 0.0).item() < 1e-9


def test_slao_goes_on_from_orthonormal_rows_and_averages_B(language):
    adapted = language.adapted_model(0)
    slao, layer = training.SLAO(adapted), next(iter(adapted.layers.values()))
    merged = trained = torch.zeros_like(layer.lora_B)
    for stage in (1, 2, 3):
        slao.begin()
        if stage > 1:
            assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(2), atol=1e-5)
            assert torch.equal(layer.lora_B, trained)  # of the stage before
        with torch.no_grad():
            layer.lora_A += torch.randn(layer.lora_A.shape, generator=torch.Generator().manual_seed(stage))
            layer.lora_B += stage
        trained = layer.lora_B.detach().clone()
        slao.end()
        merged = merged + (trained - merged) / math.sqrt(stage)
        assert torch.allclose(layer.lora_B, merged)


def test_forgetting_is_against_the_lowest_loss_since_a_tasks_own_stage():
    sizes = [np.array([1.0, 3.0])] * 4
    means = [[1.0, 5, 5, 5], [0.8, 2, 0, 5], [1.2, 2.1, 3, 5], [1.5, 1.9, 3.3, 4]]  # after each stage, per token
    line = {"order": 0, "matrix": [[[loss, 3 * loss] for loss in losses] for losses in means]}
    assert [of.sum() for of in measures.forgetting(LANGUAGE, line, sizes)] == pytest.approx([0.7 / 3, -0.1 / 3, 0.3 / 3, 0])
    assert measures.total(measures.after_own_stage(LANGUAGE, line, sizes)) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert measures.total(measures.at_the_end(LANGUAGE, line, sizes)) == pytest.approx((1.5 + 1.9 + 3.3 + 4) / 4)


def test_an_interval_of_several_tasks_is_over_the_rows_of_each():
    """Of one task it is over rows and runs, as the study on GSM8K tests."""
    ones, gaps = np.ones((2, 7)), np.random.default_rng(0).random((2, 7))
    of_tasks = [gap.var(ddof=1) / 7 / 4 for gap in gaps]
    mean, low, high = measures.difference_of(gaps[None] / 14, 0 * gaps[None], ones)
    freedom = sum(of_tasks) ** 2 / sum(variance**2 / 6 for variance in of_tasks)
    assert mean == pytest.approx(gaps.mean())
    assert (high - low) / 2 == pytest.approx(math.sqrt(sum(of_tasks)) * stats.t.ppf(0.975, freedom))


def test_rates_are_tuned_until_the_best_is_between_two_and_a_second_call_repeats_nothing(language, data, tmp_path, monkeypatch):
    done = []

    def result(sequence, run, data):
        done.append(run)
        loss = abs(math.log(run["rate"] / (4e-3 if run["arm"] == "link" else 1e-3))) + run["seed"] / 10 + 1
        matrix = generator.random((1 if ARMS[run["arm"]].of else 4, 4, 6)) * loss
        return {"matrix": matrix.tolist(), "validation": [loss] * 4, "seconds": 1}

    generator, lines = np.random.default_rng(0), Lines(tmp_path / "lines.jsonl")
    monkeypatch.setattr(plan, "train", result)
    monkeypatch.setattr(plan, "rescale", result)
    plan.run_missing(language, lines, data)
    first = [run for run in done if not run["seed"] + run["order"]]
    assert sorted(run["rate"] for run in first if run["arm"] == "link")[-2:] == [4e-3, 8e-3]  # the best is not at an edge
    assert {run["rate"] for run in done if run["arm"] == "link-scaled"} == {4e-3}
    assert {run["arm"] for run in done} == {arm for arms in language.rounds for arm in arms}
    n = len(done)
    again = Lines(lines.path)
    plan.run_missing(language, again, data)
    assert len(done) == n
    head, *rows = tables.table(language, again)
    assert {len(row) for row in rows} == {len(head)}
    n_runs = str(language.seeds * len(language.orders))
    assert [rows[0][:3], rows[1][:3]] == [["one LoRA that goes on", "0.001", n_runs], ["a new link per stage", "0.004", n_runs]]
    assert rows[-1][:3] == ["one LoRA, at the rate of a new link", "0.004", n_runs]


# ---------------------------------------------------------------------- the encoder


@pytest.fixture
def texts(tmp_path):
    """An encoder's sequence with a tiny model, and a folder with the files that it reads."""
    words = tiny.TEXT[0].split()
    say = [" ".join(words[k % 9 :] + words[: k % 7]) + f" {k}" for k in range(20)]
    for task in ENCODER.tasks:
        folder = tmp_path / "O-LoRA" / "CL_Benchmark" / "kind" / task
        folder.mkdir(parents=True)
        rows = [{"sentence": text, "label": encoder.WORDS[task][k % 2]} for k, text in enumerate(say)]
        for split, part in (("train", rows[:14]), ("test", rows[14:])):
            (folder / f"{split}.json").write_text(json.dumps(part))
    model = tiny.folder(tmp_path / "model", "bert", "AutoModel", num_hidden_layers=encoder.N_LOWER + 1)
    sizes = {"n_test": 4, "n_between": 2, "n_validation": 3, "chains": tmp_path / "chains"}
    return replace(ENCODER, **SMALL, **sizes, model={"model_name": model}), tmp_path


def test_an_encoder_scores_as_the_whole_model_among_the_words_of_the_task(texts):
    sequence, folder = texts
    data, model = sequence.read_data(folder), sequence.adapted_model(0).model
    tokenizer, whole = sequence.files

    def embedded(texts):
        found = []
        for text in texts:
            ids = torch.tensor([tokenizer(text, truncation=True, max_length=sequence.max_tokens)["input_ids"]])
            found.append(F.normalize(whole(input_ids=ids).last_hidden_state[0].mean(0), dim=0))
        return torch.stack(found)

    head = embedded(sequence.words)
    for task in sequence.tasks:
        labels, own = dict(encoder.read_texts(task, "test", folder)), encoder.WORDS[task]
        rows = data[task]["test"]
        scores = sequence.row_scores(model, rows)
        assert len(rows) == 4
        for k, row in enumerate(rows):
            text = next(text for text in labels if torch.equal(sequence.states([text])[0], row.states))
            logits = (encoder.SCALE * embedded([text])[0] @ head.T)[[sequence.words.index(word) for word in own]]
            label = own.index(labels[text])
            assert scores["loss"][k].item() == pytest.approx(F.cross_entropy(logits, torch.tensor(label)).item(), abs=1e-3)
            assert scores["accuracy"][k] == (logits.argmax() == label)


def test_an_encoder_is_trained_and_its_table_has_its_accuracies(texts):
    sequence, folder = texts
    lines, data = Lines(folder / "lines.jsonl"), sequence.read_data(folder)
    for arm in ("lora", "link"):
        for seed in (0, 1):
            run = {"arm": arm, "order": 0, "seed": seed, "rate": 1e-2}
            lines.add(run | training.train(sequence, run, data))
    base = training.matrices(sequence, [training.evaluate(sequence, sequence.adapted_model(0).model, data, "test")])
    lines.add({"arm": "base", "tokens": [sequence.sizes(of["test"]) for of in data.values()], "validation": [0]} | base)
    assert lines.results[0]["matrix"][0] == lines.results[2]["matrix"][0]  # the first stage is the same
    _, of_lora, of_link = tables.table(sequence, lines)
    means = [
        np.mean([[np.mean(training.of_bits(of)) for of in line["matrix"][-1]] for line in lines.results[k : k + 2]])
        for k in (0, 2)
    ]
    assert [of_lora[3], of_link[3]] == [f"{mean:.3f}" for mean in means]
    assert float(of_link[4].split()[0]) == pytest.approx(means[1] - means[0], abs=1e-3)
