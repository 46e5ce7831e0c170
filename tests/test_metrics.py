"""Measures of options that are chosen, against scikit-learn's; those of answers are in test_generation.py."""

import json
import warnings

import pytest
import sklearn.metrics
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from cola_lightning import (
    COLACausalLM,
    COLASequenceClassifier,
    Example,
    TemplateDataModule,
    TextClassificationDataModule,
)
from cola_lightning.data.examples import collate_options, encode_examples
from cola_lightning.hf.language import StepOutput
from cola_lightning.hf.metrics import METRICS
from tests import tiny
from tests.toy import trainer


def rows(n_options, seed, n=30):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(n_options, (n,), generator=generator) for _ in range(2)]


@pytest.mark.parametrize("n_options", [2, 3, 5])
@pytest.mark.parametrize("sizes", [[30], [7, 22, 1]])
def test_measures_are_scikit_learns_whatever_the_batches(n_options, sizes):
    predictions, targets = rows(n_options, n_options)
    f1 = sklearn.metrics.f1_score(targets, predictions, average="binary" if n_options == 2 else "macro")
    expected = {"f1": f1, "matthews_corrcoef": sklearn.metrics.matthews_corrcoef(targets, predictions)}
    for name, value in expected.items():
        metric = METRICS[name]()
        for some in zip(predictions.split(sizes), targets.split(sizes), strict=True):
            metric.update(*some, n_options)
        assert metric.compute().item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("predictions", "targets"), [([1, 1], [1, 1]), ([0, 0], [1, 1]), ([0, 1], [1, 1]), ([1, 1], [0, 1])])
def test_a_correlation_with_what_does_not_vary_is_0_as_scikit_learns(predictions, targets):
    metric = METRICS["matthews_corrcoef"]()
    metric.update(torch.tensor(predictions), torch.tensor(targets), 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")
        assert metric.compute().item() == sklearn.metrics.matthews_corrcoef(targets, predictions) == 0


def test_an_option_that_no_row_has_changes_nothing_and_three_options_are_no_two():
    predictions, targets = rows(2, 0)
    metric = METRICS["f1"]()
    metric.update(predictions, targets, 3)
    assert metric.compute().item() == pytest.approx(sklearn.metrics.f1_score(targets, predictions, average="macro"))
    assert metric.compute().item() != pytest.approx(sklearn.metrics.f1_score(targets, predictions))


@pytest.mark.parametrize(("asked", "name"), [(None, "accuracy"), ("f1", "f1"), ("accuracy", "accuracy")])
def test_a_batch_says_what_is_measured(tmp_path, asked, name):
    module = COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    examples = [Example("It was", (" great", " terrible", "."), k) for k in range(3)]
    batch = collate_options(encode_examples(module.tokenizer, examples, 64), 1, metric=asked)
    output = StepOutput(torch.tensor(0.0), 3, torch.tensor([0, 1, 0]), batch["answer"])
    ((received, (make, values)),) = module.measured(batch, output).items()
    metric = make()
    metric.update(*values)
    assert received == name
    assert metric.compute().item() == pytest.approx((2 / 3 + 1 + 0) / 3 if asked == "f1" else 2 / 3)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_what_an_interrupted_evaluation_has_left_goes_before_the_next(tmp_path, sources, stage):
    class Interrupt(Callback):
        def on_validation_batch_end(self, *_):
            raise InterruptedError

        on_test_batch_end = on_validation_batch_end

    module = COLACausalLM(
        tiny.folder(tmp_path / "model", max_position_embeddings=128), target_modules=["q_proj"], rank=2, seed=0
    )
    often, seldom = (TemplateDataModule(source, batch_size=8, **CHOSEN | {"metric": "f1"}) for source in sources)
    evaluate = {"validate": Trainer.validate, "test": Trainer.test}[stage]
    expected = evaluate(trainer(tmp_path), module, often, verbose=False)
    with pytest.raises(InterruptedError):
        evaluate(trainer(tmp_path, Interrupt()), module, seldom, verbose=False)
    assert any(metric.update_called for metric in module.evaluation_metrics.values())
    assert evaluate(trainer(tmp_path), module, often, verbose=False) == expected


def test_a_batch_of_ones_own_is_measured_as_step_says(tmp_path):
    module = COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    output = StepOutput(torch.tensor(0.0), 2, torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert module.measured([torch.ones(2, 3), torch.ones(2)], output).keys() == {"accuracy"}


@pytest.fixture
def sources(tmp_path):
    """Two data sets, of which a label is more frequent in one, and the sizes of their batches."""
    for name, every in (("often", 2), ("seldom", 5)):
        rows = [{"text": f"It was {'old ' * (k % 4)}{k}", "label": int(k % every == 0)} for k in range(20)]
        rows = [row | {"said": "old" if row["label"] else "new"} for row in rows]
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / name) for name in ("often", "seldom")]


class Old(COLACausalLM):
    """What it writes is known."""

    def generate(self, batch):
        return ["old"] * len(batch["prompt"])


CHOSEN = {"prompt": "{text}", "options": [" no", " yes"]}
KINDS = {
    "accuracy": (COLACausalLM, TemplateDataModule, CHOSEN),
    "f1": (COLACausalLM, TemplateDataModule, CHOSEN | {"metric": "f1"}),
    "answers": (Old, TemplateDataModule, {"prompt": "{text}", "answer": "said"}),
    "classifier": (COLASequenceClassifier, TextClassificationDataModule, {"text_fields": ["text"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_several_loaders_has_its_own_measures(tmp_path, sources, kind):
    make_module, make_data, arguments = KINDS[kind]
    auto_class = "AutoModel" if kind == "classifier" else "AutoModelForCausalLM"
    name = tiny.folder(tmp_path / "model", "llama", auto_class, max_position_embeddings=128)
    module = make_module(name, target_modules=["q_proj"], rank=2, seed=0)
    datas = [make_data(source, batch_size=8, **arguments) for source in sources]
    first = trainer(tmp_path)
    alone = {fn: [getattr(first, fn)(module, data, verbose=False)[0] for data in datas] for fn in ("validate", "test")}
    rows = [[row for batch in first.predict(module, data) for row in batch["prediction"]] for data in datas]
    for data in datas:
        data.trainer = first
        data.setup("validate")

    class Both(LightningDataModule):
        def val_dataloader(self):
            return [DataLoader(data.val, batch_size=8, collate_fn=data.collate) for data in datas]

        def test_dataloader(self):
            return [DataLoader(data.test, batch_size=8, collate_fn=data.collate) for data in datas]

        predict_dataloader = test_dataloader

    for _ in range(2):  # nothing is left of the first time
        for fn, expected in alone.items():
            received = getattr(trainer(tmp_path), fn)(module, Both(), verbose=False)
            named = [{f"{name}/dataloader_idx_{k}": value for name, value in one.items()} for k, one in enumerate(expected)]
            assert received == [pytest.approx(some, abs=1e-5) for some in named]
    assert alone["test"][0] != pytest.approx(alone["test"][1], abs=1e-3)
    assert [
        [row for batch in some for row in batch["prediction"]] for some in trainer(tmp_path).predict(module, Both())
    ] == rows
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    run.fit(module, Both().val_dataloader()[0], Both().val_dataloader())
    assert {f"val_loss/dataloader_idx_{k}" for k in (0, 1)} < run.callback_metrics.keys()
