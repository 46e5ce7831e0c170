"""Measures of options that are chosen, against scikit-learn's; those of answers are in test_generation.py."""

import pytest
import sklearn.metrics
import torch

from cola_lightning import COLACausalLM, Example, UserError
from cola_lightning.data.batches import collate_options
from cola_lightning.data.examples import encode_examples
from cola_lightning.modules.language import StepOutput
from cola_lightning.modules.metrics import MatthewsCorrCoef, OptionF1
from tests import tiny


def rows(n_options, seed, n=30):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(n_options, (n,), generator=generator) for _ in range(2)]


@pytest.mark.parametrize("n_options", [2, 3, 5])
@pytest.mark.parametrize("sizes", [[30], [7, 22, 1]])
def test_measures_are_scikit_learns_whatever_the_batches(n_options, sizes):
    predictions, targets = rows(n_options, n_options)
    f1 = sklearn.metrics.f1_score(targets, predictions, average="binary" if n_options == 2 else "macro")
    expected = {OptionF1: f1, MatthewsCorrCoef: sklearn.metrics.matthews_corrcoef(targets, predictions)}
    for kind, value in expected.items():
        metric = kind()
        for some in zip(predictions.split(sizes), targets.split(sizes), strict=True):
            metric.update(*some, n_options)
        assert metric.compute().item() == pytest.approx(value, abs=1e-6)


def test_an_option_that_no_row_has_changes_nothing_and_three_options_are_no_two():
    predictions, targets = rows(2, 0)
    metric = OptionF1()
    metric.update(predictions, targets, 3)
    assert metric.compute().item() == pytest.approx(sklearn.metrics.f1_score(targets, predictions, average="macro"))
    assert metric.compute().item() != pytest.approx(sklearn.metrics.f1_score(targets, predictions))


@pytest.mark.parametrize(("asked", "logged"), [(None, "val_accuracy"), ("f1", "val_f1"), ("accuracy", "val_accuracy")])
def test_a_batch_says_what_is_measured(tmp_path, monkeypatch, asked, logged):
    module = COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    names = []
    monkeypatch.setattr(module, "log", lambda name, value, **_: names.append(name))
    examples = [Example("It was", (" great", " terrible", "."), k) for k in range(3)]
    batch = collate_options(encode_examples(module.tokenizer, examples, 64), 1, metric=asked)
    output = StepOutput(torch.tensor(0.0), 3, torch.tensor([0, 1, 0]), batch["answer"])
    module.measure(batch, output, "val", module.val_metric)
    assert names == [logged]
    metric = module.option_metrics["val_f1"] if asked == "f1" else module.val_metric
    assert metric.compute().item() == pytest.approx((2 / 3 + 1 + 0) / 3 if asked == "f1" else 2 / 3)


@pytest.mark.parametrize(("asked", "references"), [("F1", ()), ("accuracy", ("great",))])
def test_a_metric_that_there_is_not_is_one_line(tmp_path, asked, references):
    module = COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    examples = [Example("It was", (" great",), 0, references=references)]
    batch = collate_options(encode_examples(module.tokenizer, examples, 64), 1, metric=asked)
    with pytest.raises(UserError, match=f"data.metric: expected .* or null, received '{asked}'"):
        module.measure(batch, StepOutput(torch.tensor(0.0), 1), "val", module.val_metric)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_what_an_interrupted_evaluation_has_left_goes_before_the_next(tmp_path, stage):
    module = COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    metrics = module.metrics_of(stage)
    assert len(metrics) == 5
    one = torch.ones(1, dtype=torch.long)
    for metric, values in ((metrics[0], (one, one)), (metrics[1], (one, one, 2)), (metrics[3], (["a"], [["a"]]))):
        metric.update(*values)
    assert [metric.update_called for metric in metrics] == [True, True, False, True, False]
    {"val": module.on_validation_start, "test": module.on_test_start}[stage]()
    assert not any(metric.update_called for metric in metrics)


def test_a_batch_of_ones_own_is_measured_as_step_says(tmp_path, monkeypatch):
    module = COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    names = []
    monkeypatch.setattr(module, "log", lambda name, value, **_: names.append(name))
    output = StepOutput(torch.tensor(0.0), 2, torch.tensor([0, 1]), torch.tensor([0, 1]))
    module.measure([torch.ones(2, 3), torch.ones(2)], output, "val", module.val_metric)
    assert names == ["val_accuracy"]
