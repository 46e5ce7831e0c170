"""A new head beside the links, with a learning rate of its own; labels, whose names and order are the data's."""

import datasets
import pytest
import torch
import transformers
from peft import PeftModel

from cola_lightning import COLASequenceClassifier, StepOutput, TextClassificationDataModule, UserError
from tests.helpers import tiny
from tests.helpers.toy import assert_bit_equal, trainer, weights

ROWS = [{"sentence": f"It was {'great' if k % 2 else 'terrible'}{' indeed' * (k % 3)}.", "label": k % 2} for k in range(48)]


def classifier(path, architecture="roberta", auto_class="AutoModel", **arguments):
    """By default on a body without a head."""
    name = tiny.folder(path / f"{architecture} {auto_class}", architecture, auto_class)
    arguments = {"rank": 2, "alpha": 4, "seed": 0, "target_modules": tiny.targets(architecture)} | arguments
    return COLASequenceClassifier(name, **arguments)


def data_of(path, rows=ROWS, **arguments):
    """The rows in one file, from which all parts are drawn."""
    return TextClassificationDataModule(tiny.write_file(path, rows), **{"batch_size": 8, "test_size": 0.1} | arguments)


def test_what_is_newly_initialised_is_trained_whole_and_drawn_from_the_seed_and_what_is_pretrained_is_not(tmp_path):
    """The files of a BERT that was saved as a masked language model hold no pooler."""

    def trained_whole(*model, **options):
        module = classifier(tmp_path, *model, num_labels=3, **options)
        module.configure_model()
        return {name: p for name, p in module.model.named_parameters() if p.requires_grad and ".lora_" not in name}

    for expected, *model, options in [
        (["classifier.dense", "classifier.out_proj"], "roberta", "AutoModel", {}),
        (["score"], "llama", "AutoModel", {}),
        (["bert.pooler.dense", "classifier"], "bert", "AutoModelForMaskedLM", {"target_modules": "all-linear"}),
        (["classifier"], "bert", "AutoModelForMaskedLM", {"modules_to_save": ["classifier"]}),
        (["classifier"], "bert", "AutoModel", {}),
    ]:
        first, again, other = (trained_whole(*model, seed=seed, **options) for seed in (0, 0, 1))
        assert sorted({name.rpartition(".")[0] for name in first}) == expected
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        assert not all(torch.equal(value, other[name]) for name, value in first.items())
        assert len([*first.values()][-1]) == 3


@pytest.mark.parametrize("target_modules", ["all-linear", None])
def test_the_head_has_a_learning_rate_of_its_own_in_every_link_and_in_full_fine_tuning(tmp_path, target_modules):
    module = classifier(tmp_path, target_modules=target_modules, modules_to_save_lr=5e-3)
    chain = {"every_n_epochs": 1} if target_modules else None
    run = trainer(tmp_path, chain=chain, max_epochs=2)
    run.fit(module, datamodule=data_of(tmp_path / "rows.jsonl"))
    others, head = run.optimizers[0].param_groups
    assert (others["initial_lr"], head["initial_lr"]) == (1e-3, 5e-3)
    names = {id(p): name for name, p in module.model.named_parameters()}
    assert {names[id(p)] for p in head["params"]} == {name for name in names.values() if name.startswith("classifier.")}
    assert chain is None or (module.n_finished == 1 and all(".lora_" in names[id(p)] for p in others["params"]))


def test_it_learns_and_its_checkpoint_gives_the_same_head_and_predictions(tmp_path):
    data, options = data_of(tmp_path / "rows.jsonl"), {"architecture": "llama", "target_modules": "all-linear"}
    module = classifier(tmp_path, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), metric="f1", **options)
    run = trainer(tmp_path, chain={"every_n_epochs": 2}, max_epochs=4)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val_f1"] > 0.9
    run.save_checkpoint(tmp_path / "end.ckpt")
    predicted, loaded = run.predict(module, datamodule=data), classifier(tmp_path, **options)
    again = trainer(tmp_path).predict(loaded, datamodule=data, ckpt_path=tmp_path / "end.ckpt")
    assert [batch["prediction"] for batch in again] == [batch["prediction"] for batch in predicted]
    assert_bit_equal(weights(loaded.model), weights(module.model))


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_pipeline_of_an_export_gives_the_scores_that_were_trained_whatever_the_base_was_for(tmp_path, kind):
    name = tiny.folder(tmp_path / "model", "roberta", "AutoModelForSequenceClassification", num_labels=3, problem_type=kind)
    module = COLASequenceClassifier(name, rank=2, target_modules=["query"], label_names=["no", "yes"], seed=0)
    module.export(tmp_path / "merged")
    _, code, *_ = module.export(tmp_path / "peft", "peft")
    adapted = PeftModel.from_pretrained(eval(code.removeprefix("its base: ")), tmp_path / "peft")
    for model in (str(tmp_path / "merged"), adapted.merge_and_unload()):
        pipe = transformers.pipeline("text-classification", model, tokenizer=name, top_k=None)
        assert sum(label["score"] for (scores,) in [pipe(["It was great."])] for label in scores) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "roberta"])
def test_a_row_means_the_same_alone_and_padded_in_a_batch(tmp_path, architecture):
    module = classifier(tmp_path, architecture)
    module.configure_model()
    module.tokenizer.padding_side = "left"
    module.eval()
    data = tiny.set_up(data_of(tmp_path / "rows.jsonl"), module.tokenizer, "test")
    short, long = sorted(data.test, key=lambda row: row["length"])[:: len(data.test) - 1]
    logits = [module.predict_step(data.collate(rows), 0)["scores"] for rows in ([short], [long, short])]
    assert short["length"] < long["length"]
    torch.testing.assert_close(logits[0][0], logits[1][1], atol=1e-5, rtol=1e-5)


NAMES = ["great", "so so", "terrible"]
NAMED = [{"sentence": f"It was {NAMES[-1 - k % 3]} {k}.", "label": NAMES[-1 - k % 3]} for k in range(60)]


def pooled(path, **arguments):
    """On the files of a masked language model, which hold no pooler."""
    return classifier(path, "bert", "AutoModelForMaskedLM", **arguments)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A classifier of named labels, its data and its checkpoint, whose pooler and head are new."""
    folder = tmp_path_factory.mktemp("fitted")
    data, module = data_of(folder / "rows.jsonl", NAMED), pooled(folder, metric="f1")
    run = trainer(folder, max_steps=2)
    run.fit(module, datamodule=data)
    run.save_checkpoint(folder / "end.ckpt")
    return module, data, folder / "end.ckpt"


def test_the_labels_are_the_datas_and_stand_in_model_checkpoint_predictions_and_metrics(tmp_path, fitted):
    module, _, path = fitted
    loaded = COLASequenceClassifier.load_from_checkpoint(path)
    for one in (module, loaded):
        assert one.label_names == NAMES
        assert one.run.config.modules_to_save == ["bert.pooler", "classifier"]
        for config in (one.model.config, one.merged_model().config):
            assert config.id2label == dict(enumerate(NAMES))
            assert config.label2id == {name: place for place, name in enumerate(NAMES)}
    assert_bit_equal(weights(loaded.model), weights(module.model))
    unlabelled = data_of(tmp_path / "new.jsonl", [{"sentence": "It was."}, {"sentence": "It was great.", "label": "great"}] * 3)
    batches = trainer(tmp_path).predict(loaded, datamodule=unlabelled)
    assert [target for batch in batches for target in batch["target"]] == [None, "great"] * 3
    best = [NAMES[place] for batch in batches for place in batch["scores"].argmax(-1)]
    assert [name for batch in batches for name in batch["prediction"]] == best
    # Predicted 1 0 0 0, true 1 1 0 0: F1 of label 1 = 2 * 1 * 0.5 / 1.5; with label 0's, 4/5, the mean is 11/15.
    output = StepOutput(torch.tensor(0.0), 4, torch.tensor([1, 0, 0, 0]), torch.tensor([1, 1, 0, 0]))
    ((name, (make, values)),) = module.batch_metrics({}, output).items()
    metric = make()
    metric.update(*values)
    assert (name, metric.compute().item()) == ("f1", pytest.approx(11 / 15))


# Labels in the data, what is given, the classes, and the first predicted rows' targets.
LABELS = [
    (["0", "1"], {}, ["0", "1"], ["0", "1"]),  # as a CSV file has them
    ([1, 2, 10], {}, ["1", "2", "10"], ["1", "2", "10"]),
    ([0, 1], {"num_labels": 3}, ["0", "1", "2"], ["0", "1"]),
    (["b", "a"], {"num_labels": 2}, ["a", "b"], ["b", "a"]),
    (["b", "a"], {"label_names": ["b", "c", "a"]}, ["b", "c", "a"], ["b", "a"]),
    ([0, 1], {"label_names": ["bad", "good"]}, ["bad", "good"], ["bad", "good"]),  # places
    ([True, False], {}, ["0", "1"], ["1", "0"]),
]


@pytest.mark.parametrize(("values", "arguments", "names", "written"), LABELS)
def test_labels_are_names_or_numbers_in_order_unless_they_are_given(tmp_path, values, arguments, names, written):
    rows = [{"sentence": f"It was {k}.", "label": values[k % len(values)]} for k in range(20)]
    module = classifier(tmp_path, **arguments)
    batches = trainer(tmp_path).predict(module, datamodule=data_of(tmp_path / "rows.jsonl", rows))
    assert module.label_names == names
    assert module.num_labels == len(names) == module.model.config.num_labels
    assert [str(value) for batch in batches for value in batch["target"]][: len(written)] == written


def test_labels_keep_the_order_of_the_datas_classes_and_of_a_pretrained_head(tmp_path):
    kind = datasets.ClassLabel(names=["not_entailment", "entailment"])
    rows = datasets.Dataset.from_list([{"sentence": f"It was {k}.", "label": k % 2} for k in range(40)])
    rows.cast_column("label", kind).to_parquet(tmp_path / "rows.parquet")
    module = classifier(tmp_path)
    trainer(tmp_path).predict(module, datamodule=TextClassificationDataModule(str(tmp_path / "rows.parquet")))
    assert module.label_names == ["not_entailment", "entailment"]
    own = {"id2label": {0: "terrible", 1: "so so", 2: "great"}, "num_labels": 3}
    name = tiny.folder(tmp_path / "bert", "bert", "AutoModelForSequenceClassification", **own)
    module = COLASequenceClassifier(name, rank=2, alpha=4, seed=0, target_modules=["query"])
    trainer(tmp_path).predict(module, datamodule=data_of(tmp_path / "rows.jsonl", NAMED))
    assert module.label_names == ["terrible", "so so", "great"]


@pytest.mark.parametrize("value", [2, "2"])
def test_a_number_is_an_index_only_among_names_that_are_given(tmp_path, fitted, value):
    """Of names that were found as text, nobody who wrote the number knows the order."""
    _, _, path = fitted
    tiny.write_rows(tmp_path / "rows", NAMED, ["train"])
    rows = TextClassificationDataModule(tiny.write_rows(tmp_path / "rows", [{"sentence": "Hm.", "label": value}], ["test"]))
    with pytest.raises(UserError, match=r"'2' in the field 'label' .* \(an index needs model\.label_names\)"):
        trainer(tmp_path).test(pooled(tmp_path), datamodule=rows)
    for options, target in [({}, None), ({"label_names": NAMES}, "terrible")]:
        (batch,) = trainer(tmp_path).predict(pooled(tmp_path, **options), datamodule=rows, ckpt_path=path)
        assert batch["target"] == [target]


def test_rows_without_a_label_are_predicted_and_nothing_else(tmp_path, fitted):
    module, _, _ = fitted
    for row in ({}, {"label": None}, {"label": " "}, {"label": -1}):
        data = data_of(tmp_path / "new.jsonl", [{"sentence": "Hm."} | row] * 30)
        for stage in ("fit", "validate", "test"):
            with pytest.raises(UserError, match=r"the field 'label' is .*, not a label.*: .*row \d+|data\.label_field"):
                getattr(trainer(tmp_path, max_steps=1), stage)(module, datamodule=data)
        batches = trainer(tmp_path).predict(module, datamodule=data)
        assert [target for batch in batches for target in batch["target"]] == [None] * 30


def test_labels_are_refused_where_they_are_not_those_of_the_checkpoint(tmp_path, fitted):
    """A fresh module takes them from the data, and the checkpoint's must be the same, in the same order."""
    module, data, path = fitted
    expected = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert trainer(tmp_path).test(pooled(tmp_path, metric="f1"), datamodule=data, ckpt_path=path, verbose=False) == expected
    assert pooled(tmp_path, init_chain=str(path)).label_names == NAMES
    order = {"label_names": NAMES[::-1]}
    for use in (
        lambda: trainer(tmp_path).test(pooled(tmp_path, **order), datamodule=data, ckpt_path=path, verbose=False),
        lambda: COLASequenceClassifier.load_from_checkpoint(path, **order).configure_model(),
        lambda: trainer(tmp_path, max_steps=1).fit(pooled(tmp_path, **order, init_chain=str(path)), datamodule=data),
    ):
        with pytest.raises(UserError, match=r"model\.label_names: must be \['great', .*\], on which the chain was trained"):
            use()


def test_another_number_of_labels_than_the_datas_is_refused(tmp_path):
    made = classifier(tmp_path)
    made.configure_model()  # with two labels, for nobody has said how many there are
    for module in (classifier(tmp_path, num_labels=2), made):
        with pytest.raises(UserError, match=r"model\.num_labels: is \d, but the data has 3: .*great"):
            trainer(tmp_path, max_steps=1).fit(module, datamodule=data_of(tmp_path / "rows.jsonl", NAMED))
