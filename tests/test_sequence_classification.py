"""A new head beside the links, with a learning rate of its own."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from cola_lightning import (
    COLACausalLM,
    COLASequenceClassifier,
    StepOutput,
    TextClassificationDataModule,
    UserError,
)
from tests import tiny
from tests.toy import assert_bit_equal, trainer, weights

ROWS = [{"sentence": f"It was {'great' if k % 2 else 'terrible'}{' indeed' * (k % 3)}.", "label": k % 2} for k in range(48)]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TextClassificationDataModule(str(folder), batch_size=8)


def classifier(path, architecture="roberta", **arguments):
    name = tiny.folder(path / architecture, architecture, "AutoModel")  # a body without a head
    arguments = {"rank": 2, "alpha": 4, "seed": 0, "target_modules": tiny.targets(architecture)} | arguments
    return COLASequenceClassifier(name, **arguments)


@pytest.mark.parametrize(("architecture", "head"), [("roberta", "classifier"), ("llama", "score"), ("gpt2", "score")])
def test_the_head_is_found_trained_whole_and_drawn_from_the_seed(tmp_path, architecture, head):
    def trained(seed):
        module = classifier(tmp_path, architecture, num_labels=3, seed=seed)
        module.configure_model()
        assert module.modules_to_save == [head]
        return {name: p for name, p in module.model.named_parameters() if p.requires_grad}

    first, again, other = trained(0), trained(0), trained(1)
    heads = [name for name in first if name.startswith(f"{head}.")]
    assert heads
    assert all(".lora_" in name for name in first.keys() - set(heads))
    assert [name for name in heads if not torch.equal(first[name], again[name])] == []
    assert [name for name in heads if not torch.equal(first[name], other[name])] != []
    assert [value.shape[0] for name, value in first.items() if name in heads][-1] == 3


def test_the_head_has_a_learning_rate_of_its_own_in_every_link(tmp_path, data):
    module = classifier(tmp_path, modules_to_save_lr=5e-3, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2)
    run.fit(module, datamodule=data)
    assert module.link == 1
    links, head = run.optimizers[0].param_groups
    assert (links["initial_lr"], head["initial_lr"]) == (1e-3, 5e-3)
    names = {id(p): name for name, p in module.model.named_parameters()}
    assert all(".lora_" in names[id(p)] for p in links["params"])
    assert {names[id(p)].partition(".")[0] for p in head["params"]} == {"classifier"}


def test_it_learns_and_its_checkpoint_gives_the_same_head_and_predictions(tmp_path, data):
    arguments = {"architecture": "llama", "target_modules": "all-linear"}
    module = classifier(tmp_path, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3), metric="f1", **arguments)
    run = trainer(tmp_path, chain={"every_n_epochs": 4}, max_epochs=8)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val_f1"] > 0.9
    run.save_checkpoint(tmp_path / "end.ckpt")
    (before,) = run.test(module, datamodule=data, verbose=False)
    predictions = run.predict(module, datamodule=data)
    loaded = classifier(tmp_path, **arguments)
    run = trainer(tmp_path)
    assert torch.equal(
        torch.cat([p["prediction"] for p in predictions]),
        torch.cat([p["prediction"] for p in run.predict(loaded, datamodule=data, ckpt_path=tmp_path / "end.ckpt")]),
    )
    assert_bit_equal(weights(loaded.model), weights(module.model))
    (again,) = run.test(loaded, datamodule=data, verbose=False)
    assert again["test_loss"] == before["test_loss"]


@pytest.mark.parametrize(
    ("metric", "n_labels", "value"),
    [("accuracy", 2, 0.75), ("f1", 2, 2 / 3), ("matthews_corrcoef", 2, 0.5774), ("f1", 3, 11 / 15)],
)
def test_metrics_against_values_by_hand(tmp_path, metric, n_labels, value):
    # Predicted 1 0 0 0, true 1 1 0 0: accuracy 3/4; F1 of label 1 = 2 * 1 * 0.5 / 1.5; with label 0's, 4/5, the mean is 11/15.
    module = classifier(tmp_path, metric=metric, num_labels=n_labels)
    output = StepOutput(torch.tensor(0.0), 4, torch.tensor([1, 0, 0, 0]), torch.tensor([1, 1, 0, 0]))
    ((name, (make, values)),) = module.measured({}, output).items()
    made = make()
    made.update(*values)
    assert name == metric
    assert made.compute().item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "roberta"])
def test_a_row_means_the_same_alone_and_padded_in_a_batch(tmp_path, data, architecture):
    module = classifier(tmp_path, architecture)
    module.configure_model()
    module.tokenizer.padding_side = "left"
    module.eval()
    data.trainer = SimpleNamespace(lightning_module=module, training=False)
    data.setup("test")
    short, long = sorted(data.test, key=data.length)[:: len(data.test) - 1]
    logits = [module.predict_step(data.collate(rows), 0)["scores"] for rows in ([short], [long, short])]
    assert data.length(short) < data.length(long)
    torch.testing.assert_close(logits[0][0], logits[1][1], atol=1e-5, rtol=1e-5)


def test_a_learning_rate_of_modules_that_nobody_trains_is_named(tmp_path):
    causal = COLACausalLM(tiny.folder(tmp_path / "opt", "opt"), rank=2, modules_to_save_lr=1e-3)
    with pytest.raises(UserError, match=r"model\.modules_to_save_lr: expected modules_to_save beside it"):
        trainer(tmp_path, max_steps=1).fit(causal, datamodule=tiny.reviews())


def test_the_heads_learning_rate_holds_in_full_fine_tuning_too(tmp_path, data):
    module = classifier(tmp_path, target_modules=None, modules_to_save_lr=5e-3)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, datamodule=data)
    others, head = run.optimizers[0].param_groups
    assert (others["initial_lr"], head["initial_lr"]) == (1e-3, 5e-3)
    assert sum(p.numel() for p in head["params"]) == sum(p.numel() for p in module.model.classifier.parameters())


# ---------------------------------------------------------------------- labels


NAMES = ["terrible", "great", "so so"]
NAMED = [{"sentence": f"It was {NAMES[k % 3]} {k}.", "label": NAMES[k % 3]} for k in range(60)]


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def named_data(tmp_path, rows=NAMED, **arguments):
    return TextClassificationDataModule(file_of(tmp_path / "rows.jsonl", rows), **{"batch_size": 8} | arguments)


def fitted(tmp_path, data, **arguments):
    module = classifier(tmp_path, **arguments)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "end.ckpt")
    return module, run


def test_the_labels_are_the_datas_and_stand_in_model_checkpoint_and_predictions(tmp_path):
    module, _ = fitted(tmp_path, named_data(tmp_path))
    expected = ["great", "so so", "terrible"]
    assert module.label_names == expected
    assert module.model.config.id2label == dict(enumerate(expected))
    assert module.model.config.label2id == {name: place for place, name in enumerate(expected)}
    assert module.merged_model().config.id2label == dict(enumerate(expected))
    loaded = COLASequenceClassifier.load_from_checkpoint(tmp_path / "end.ckpt")
    assert loaded.label_names == expected
    assert loaded.model.config.id2label == dict(enumerate(expected))
    assert_bit_equal(weights(loaded.model), weights(module.model))
    unlabelled = named_data(tmp_path, [{"sentence": "It was."}, {"sentence": "It was great.", "label": "great"}] * 3)
    predictions = trainer(tmp_path).predict(loaded, datamodule=unlabelled)
    assert [target for batch in predictions for target in batch["target"]] == [None, "great"] * 3
    best = [expected[place] for batch in predictions for place in batch["scores"].argmax(-1)]
    assert [name for batch in predictions for name in batch["prediction"]] == best


@pytest.mark.parametrize(
    ("values", "arguments", "names", "written"),
    [
        ([0, 1], {}, ["0", "1"], [0, 1]),
        (["0", "1"], {}, ["0", "1"], [0, 1]),  # as a CSV file has them
        ([1, 2, 10], {}, ["1", "2", "10"], [1, 2, 10]),
        ([0, 1], {"num_labels": 3}, ["0", "1", "2"], [0, 1]),
        (["b", "a"], {"num_labels": 2}, ["a", "b"], ["b", "a"]),
        (["b", "a"], {"label_names": ["b", "c", "a"]}, ["b", "c", "a"], ["b", "a"]),
        ([0, 1], {"label_names": ["bad", "good"]}, ["bad", "good"], ["bad", "good"]),  # places
        ([True, False], {}, ["0", "1"], [1, 0]),
    ],
)
def test_labels_are_names_or_numbers_in_order_unless_they_are_given(tmp_path, values, arguments, names, written):
    rows = [{"sentence": f"It was {k}.", "label": values[k % len(values)]} for k in range(40)]
    data = named_data(tmp_path, rows)
    module, _ = fitted(tmp_path, data, **arguments)
    assert module.label_names == names
    assert module.num_labels == len(names) == module.model.config.num_labels
    batches = trainer(tmp_path).predict(module, datamodule=data)
    targets = [value for batch in batches for value in batch["target"]]
    assert [getattr(value, "tolist", lambda value=value: value)() for value in targets[: len(written)]] == written


@pytest.mark.parametrize("value", [2, "2", True])
def test_a_number_is_an_index_only_among_names_that_are_given(tmp_path, value):
    """Of names that were found as text, nobody who wrote the number knows the order."""
    names = ["great", "so so", "terrible"]
    (tmp_path / "rows").mkdir()
    file_of(tmp_path / "rows" / "train.jsonl", NAMED)
    file_of(tmp_path / "rows" / "test.jsonl", [{"sentence": "Hm.", "label": value}])
    rows = TextClassificationDataModule(str(tmp_path / "rows"))
    fitted(tmp_path, named_data(tmp_path))
    message = (
        r"test\, row 1: expected one of the labels great, so so, terrible in the field 'label', "
        rf"received '{int(value)}' \(an index needs model\.label_names\)"
    )
    for module in (classifier(tmp_path), COLASequenceClassifier.load_from_checkpoint(tmp_path / "end.ckpt")):
        for stage in ("test", "predict"):
            with pytest.raises(UserError, match=message):
                getattr(trainer(tmp_path), stage)(module, datamodule=rows)
    given = classifier(tmp_path, label_names=names)
    (batch,) = trainer(tmp_path).predict(given, datamodule=rows, ckpt_path=tmp_path / "end.ckpt")
    assert batch["target"] == [names[int(value)]]


def test_a_metric_knows_how_many_labels_the_data_has(tmp_path):
    data = named_data(tmp_path)
    module, _ = fitted(tmp_path, data, metric="matthews_corrcoef")
    (measured,) = trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert -1 <= measured["val_matthews_corrcoef"] <= 1


def test_labels_that_are_classes_keep_the_order_that_the_data_gives_them(tmp_path):
    import datasets

    kind = datasets.ClassLabel(names=["not_entailment", "entailment"])
    rows = datasets.Dataset.from_list([{"sentence": f"It was {k}.", "label": k % 2} for k in range(40)])
    rows.cast_column("label", kind).to_parquet(tmp_path / "rows.parquet")
    data = TextClassificationDataModule(str(tmp_path / "rows.parquet"), batch_size=8)
    module, _ = fitted(tmp_path, data)
    assert module.label_names == ["not_entailment", "entailment"]


def test_a_pretrained_head_with_the_datas_labels_keeps_their_order(tmp_path):
    own = {"id2label": {0: "terrible", 1: "so so", 2: "great"}, "num_labels": 3}
    name = tiny.folder(tmp_path / "bert", "bert", "AutoModelForSequenceClassification", **own)
    how = {"rank": 2, "alpha": 4, "seed": 0, "target_modules": ["query"]}
    module = COLASequenceClassifier(name, **how)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=named_data(tmp_path))
    assert module.label_names == ["terrible", "so so", "great"]


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_label_that_is_not_known_is_refused_with_its_place_and_the_known_ones(tmp_path, stage):
    (tmp_path / "rows").mkdir()
    file_of(tmp_path / "rows" / "train.jsonl", NAMED)
    for split in ("validation", "test"):
        file_of(tmp_path / "rows" / f"{split}.jsonl", [*NAMED, {"sentence": "Hm.", "label": "odd"}])
    data = TextClassificationDataModule(str(tmp_path / "rows"))
    message = r"(validation|test), row 61: expected one of the labels great, so so, terrible in .* 'label', received 'odd'"
    with pytest.raises(UserError, match=message):
        getattr(trainer(tmp_path, max_steps=1), stage)(classifier(tmp_path), datamodule=data)


def test_labels_are_refused_where_they_are_not_those_of_the_checkpoint(tmp_path):
    """A fresh module takes them from the data, and the checkpoint's must be the same, in the same order."""
    data = named_data(tmp_path)
    module, _ = fitted(tmp_path, data)
    (before,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    (again,) = trainer(tmp_path).test(classifier(tmp_path), datamodule=data, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert again == before
    order = ["terrible", "so so", "great"]
    message = r"model\.label_names: expected \['great', .*\], on which the chain was trained, received \['terrible'"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).test(classifier(tmp_path, label_names=order), datamodule=data, ckpt_path=tmp_path / "end.ckpt")
    with pytest.raises(UserError, match=message):
        COLASequenceClassifier.load_from_checkpoint(tmp_path / "end.ckpt", label_names=order).configure_model()
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, max_steps=1).fit(
            classifier(tmp_path, label_names=order, init_chain=str(tmp_path / "end.ckpt")), datamodule=data
        )
    begun = classifier(tmp_path, init_chain=str(tmp_path / "end.ckpt"))  # takes them from the chain
    assert begun.label_names == ["great", "so so", "terrible"]


def test_labels_come_with_a_checkpoint_and_reading_them_changes_nothing(tmp_path):
    expected = ["great", "so so", "terrible"]
    module, _ = fitted(tmp_path, named_data(tmp_path))
    fresh, other = (classifier(tmp_path, num_labels=3) for _ in range(2))
    batch = dict(module.tokenizer(["Hm."], return_tensors="pt"))
    trainer(tmp_path).predict(fresh, DataLoader([batch], batch_size=None), ckpt_path=tmp_path / "end.ckpt")
    assert fresh.model.config.id2label == dict(enumerate(expected))
    other.configure_model()
    other.load_state_dict(module.state_dict())
    before = dict(other.model.config.id2label), dict(vars(other))
    assert other.label_names == expected
    assert (other.model.config.id2label, vars(other)) == before
    other.settle_labels(["so so"])
    assert other.model.config.id2label == dict(enumerate(expected))


@pytest.mark.parametrize("row", [{}, {"label": None}, {"label": " "}, {"label": -1}])
def test_rows_without_a_label_are_predicted_and_nothing_else(tmp_path, row):
    module, _ = fitted(tmp_path, named_data(tmp_path))
    data = named_data(tmp_path, [{"sentence": "Hm."} | row] * 30)
    for stage in ("fit", "validate", "test"):
        with pytest.raises(UserError, match=r"(row \d+: expected .* field 'label'|label_field: expected one of .*), received"):
            getattr(trainer(tmp_path, max_steps=1), stage)(module, datamodule=data)
    targets = [target for batch in trainer(tmp_path).predict(module, datamodule=data) for target in batch["target"]]
    assert targets == [None] * 30


def test_another_number_of_labels_than_the_datas_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.num_labels: expected 3, the data's labels great, so so, terrible, received 2"):
        fitted(tmp_path, named_data(tmp_path), num_labels=2)
    module = classifier(tmp_path)
    module.configure_model()  # with two labels, for nobody has said how many there are
    with pytest.raises(UserError, match=r"model\.num_labels: expected 3, the data's labels great, so so, terrible, received 2"):
        trainer(tmp_path, max_steps=1).fit(module, datamodule=named_data(tmp_path))


# ---------------------------------------------------------------------- what the pretrained files do not hold


def of_masked_lm(path, **arguments):
    """A classifier on a BERT that was saved as a masked language model: its files hold no pooler."""
    name = tiny.folder(path / "masked", "bert", "AutoModelForMaskedLM")
    return COLASequenceClassifier(name, **{"rank": 2, "alpha": 4, "seed": 0, "target_modules": ["query", "value"]} | arguments)


def trained_whole(module):
    module.configure_model()
    named = module.model.named_parameters()
    return sorted({name.rpartition(".")[0] for name, p in named if p.requires_grad and ".lora_" not in name})


def test_what_is_newly_initialised_is_trained_whole_and_what_is_pretrained_is_not(tmp_path):
    assert trained_whole(of_masked_lm(tmp_path)) == ["bert.pooler.dense", "classifier"]
    assert trained_whole(of_masked_lm(tmp_path, target_modules="all-linear")) == ["bert.pooler.dense", "classifier"]
    assert trained_whole(of_masked_lm(tmp_path, modules_to_save=["classifier"])) == ["classifier"]
    assert trained_whole(classifier(tmp_path, "bert")) == ["classifier"]


@pytest.mark.parametrize("save_base", [False, True])
def test_its_checkpoint_trains_the_same_modules_again(tmp_path, data, save_base):
    module = of_masked_lm(tmp_path, save_base=save_base)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = COLASequenceClassifier.load_from_checkpoint(tmp_path / "end.ckpt")
    assert again.modules_to_save == module.modules_to_save == ["bert.pooler", "classifier"]
    assert_bit_equal(weights(again.model), weights(module.model))
