"""Measures of options that are chosen, against scikit-learn's; of answers, by hand; and of evaluations, each on its own."""

import warnings

import pytest
import sklearn.metrics
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader

from cola_lightning import COLACausalLM, TemplateDataModule
from cola_lightning.hf.metrics import ANSWER_METRICS, METRICS
from cola_lightning.hf.transformers_module import StepOutput
from tests.helpers import tiny
from tests.helpers.toy import trainer


def chosen(n_options):
    generator = torch.Generator().manual_seed(n_options)
    return torch.randint(n_options, (2, 30), generator=generator).unbind()


# The number of options, predictions and targets; in some, all of either are the same, or no row has the third option.
ROWS = [(n_options, *chosen(n_options)) for n_options in (2, 3, 5)] + [(3, *chosen(2))]
ROWS += [(2, torch.tensor(mine), torch.tensor(theirs)) for mine, theirs in [([0, 1], [1, 1]), ([1, 1], [0, 1])]]


@pytest.mark.parametrize("name", ["f1", "matthews_corrcoef", "accuracy"])
@pytest.mark.parametrize(("n_options", "predictions", "targets"), ROWS)
def test_measures_are_scikit_learns_whatever_the_batches(name, n_options, predictions, targets):
    average = "binary" if n_options == 2 else "macro"
    theirs = {
        "f1": lambda: sklearn.metrics.f1_score(targets, predictions, average=average),
        "matthews_corrcoef": lambda: sklearn.metrics.matthews_corrcoef(targets, predictions),
        "accuracy": lambda: sklearn.metrics.accuracy_score(targets, predictions),
    }
    for size in (30, 7, 1):
        metric = METRICS[name](n_options)
        for some in zip(predictions.split(size), targets.split(size), strict=True):
            metric.update(*some)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A single label was found")
            assert metric.compute().item() == pytest.approx(theirs[name](), abs=1e-6)


MEASURED = [  # what is written, what should be, F1, exact match
    ("The Cat.", ["cat"], 1, 1),
    ("  two   towns ", ["two towns"], 1, 1),
    ("an apple a day", ["the apple day"], 1, 1),
    ("a cat sat", ["cat sat down"], 4 / 5, 0),  # 2 of 2 words, 2 of 3
    ("no no, no", ["No"], 1 / 2, 0),  # 1 of 3 words, 1 of 1
    ("blue", ["red sky", "Blue sky", "green"], 2 / 3, 0),
    ("green", ["red sky", "a green!"], 1, 1),
    ("twenty-one", ["twenty one"], 0, 0),  # punctuation goes without a blank in its place
    ("", ["cat"], 0, 0),
    ("", ["cat", "the"], 1, 1),
    ("naïve", ["naive", "NAÏVE"], 1, 1),
]


@pytest.mark.parametrize(("name", "place"), [("f1", 2), ("exact_match", 3)])
def test_answers_are_measured_as_by_hand_whatever_the_batches(name, place):
    for row in MEASURED:
        metric = ANSWER_METRICS[name]()
        metric.update([row[0]], [row[1]])
        assert metric.compute().item() == pytest.approx(row[place])
    metric = ANSWER_METRICS[name]()
    for batch in (MEASURED[:7], MEASURED[7:]):
        metric.update([row[0] for row in batch], [row[1] for row in batch])
    assert metric.compute().item() == pytest.approx(sum(row[place] for row in MEASURED) / len(MEASURED))


def test_each_of_several_loaders_has_its_own_measures(tmp_path):
    datas = []
    for every in (2, 5):  # in one, a label is more frequent
        rows = [{"text": f"It was {'old ' * (k % 4)}{k}", "label": int(k % every == 0)} for k in range(20)]
        source = tiny.write_rows(tmp_path / f"{every}", rows)
        datas.append(TemplateDataModule(source, prompt="{text}", options=[" no", " yes"], metric="f1", batch_size=8))
    module, run = tiny.causal_lm(tmp_path, changes={"max_position_embeddings": 128}), trainer(tmp_path)
    alone = [run.test(module, data, verbose=False)[0] for data in datas]
    rows = [[row for batch in run.predict(module, data) for row in batch["prediction"]] for data in datas]

    class Both(LightningDataModule):
        def test_dataloader(self):
            return [DataLoader(data.test, batch_size=8, collate_fn=data.collate) for data in datas]

        val_dataloader = predict_dataloader = test_dataloader

    assert alone[0] != pytest.approx(alone[1], abs=1e-3)
    for fn, stage in (("test", "test"), ("validate", "val")):
        received = getattr(trainer(tmp_path), fn)(module, Both(), verbose=False)
        for k, one in enumerate(alone):
            named = {f"{name.replace('test', stage)}/dataloader_idx_{k}": value for name, value in one.items()}
            assert received[k] == pytest.approx(named, abs=1e-5)
    batches = trainer(tmp_path).predict(module, Both())
    assert [[row for batch in some for row in batch["prediction"]] for some in batches] == rows


class Scripted(COLACausalLM):
    """Each tenth row is right."""

    def step(self, batch):
        right = (batch % 10 == 0).long()
        return StepOutput(torch.zeros(()), len(batch), right, torch.ones_like(right), logged={"share": right.bfloat16()})


def test_measures_of_many_rows_are_means_in_any_precision(tmp_path):
    """A count in bfloat16 stops growing at some hundreds of rows."""
    module = Scripted(tiny.folder(tmp_path), target_modules=["q_proj"], rank=1, alpha=2, seed=0)
    run = trainer(tmp_path, precision="bf16-true")
    (found,) = run.validate(module, DataLoader(torch.arange(1000), batch_size=8))
    assert found["val_accuracy"] == pytest.approx(0.1, abs=1e-6)
    assert found["val_share"] == pytest.approx(0.1, abs=1e-6)


def test_an_evaluation_that_was_interrupted_leaves_nothing_to_the_next_one(tmp_path):
    class Interrupted(Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError("by hand")

    module, rows = Scripted(tiny.folder(tmp_path), target_modules=["q_proj"], rank=1, alpha=2, seed=0), torch.arange(20)
    with pytest.raises(RuntimeError, match="by hand"):
        trainer(tmp_path, Interrupted()).validate(module, DataLoader(rows[:1], batch_size=1))  # which is right
    (found,) = trainer(tmp_path).validate(module, DataLoader(rows, batch_size=4))
    assert found["val_accuracy"] == pytest.approx(0.1)
