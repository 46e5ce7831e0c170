"""Several sources; and sources that are a pattern of files, plain text, compressed, or saved by ``datasets``."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from lightning.pytorch.callbacks import LambdaCallback

from cola_lightning import (
    COLACausalLM,
    ImageDataModule,
    TemplateDataModule,
    TextClassificationDataModule,
    TextDataModule,
    UserError,
)
from cola_lightning.cli import main
from cola_lightning.data.reading import load_splits
from cola_lightning.data.source import Source
from tests.helpers import tiny
from tests.helpers.tiny import attach
from tests.helpers.tiny import write_file as write
from tests.helpers.toy import assert_bit_equal, trainer, weights

ROWS = [{"text": f"It was {k}."} for k in range(6)]


def texts_of(part, data):
    return [data.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in part]


def read(source, **options):
    return {split: [dict(row) for row in rows()] for split, rows in load_splits(source, **options).items()}


def test_a_pattern_names_the_files_of_one_split(tmp_path):
    for k in (2, 0, 1):
        write(tmp_path / "logs" / f"{k}.jsonl", ROWS[2 * k : 2 * k + 2])
    (tmp_path / "logs" / "0.txt").write_text("A note.")
    assert read(f"{tmp_path}/logs/*.jsonl") == {"train": ROWS}
    data = attach(TextDataModule(f"{tmp_path}/logs/*.jsonl", val_size=2, max_new_tokens=4), "predict")  # all rows, as of a file
    assert [row.prompt for row in data.test] == [row["text"] for row in ROWS]
    assert len(data.identity["files"]) == 3
    with pytest.raises(UserError, match=r"the same ending, one of .*, got .*0\.jsonl' and .*0\.txt'"):
        read(f"{tmp_path}/logs/0.*")
    with pytest.raises(UserError, match=r"^data\.source: .* is not a file, a folder or the name of a data set"):
        read(f"{tmp_path}/logs/*.parquet")


TEXT = "One.\nTwo.\n\n  \n\n\nThree.\n \nFour.\n"
UNITS = {"paragraph": ["One.\nTwo.", "Three.\n \nFour."], "file": [TEXT.strip("\n")]}
UNITS["line"] = ["One.", "Two.", "Three.", "Four."]


def test_a_text_file_has_a_row_for_each_unit_that_is_not_blank(tmp_path):
    source = tmp_path / "notes.txt"
    source.write_text(TEXT)
    for unit, texts in UNITS.items():
        assert read(str(source), text_unit=unit) == {"train": [{"text": text} for text in texts]}
        data = attach(TextDataModule(str(source), text_unit=unit, val_size=0), "fit")
        assert texts_of(data.train, data) == texts


def test_a_folder_that_datasets_has_saved_is_read(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(tmp_path / "splits")
    assert read(str(tmp_path / "one")) == {"train": ROWS}
    assert read(str(tmp_path / "splits")) == {"train": ROWS, "dev": ROWS[1:2]}
    data = attach(TextDataModule(str(tmp_path / "splits")), "fit")
    assert [len(data.train), len(data.val), len(data.identity["files"])] == [6, 1, 2]


def test_a_fit_reads_no_test_split(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", rows_of(0))
    (tmp_path / "test.csv").write_text("text,label\n")  # which cannot be read
    data = attach(TemplateDataModule(str(tmp_path), prompt="{text}", options=["a", "b"]), "fit")
    assert [len(data.train), len(data.val)] == [20, 20]
    assert not data.can_be_tested
    with pytest.raises(UserError, match=r"test\.csv' cannot be read"):
        data.setup("test")


# ---------------------------------------------------------------------- the data of the fit, and other data


def rows_of(start):
    return [{"text": f"It was {k}.", "label": "ab"[k % 2]} for k in range(start, start + 20)]


def rows_file(path, start):
    return write(path / "rows.jsonl", rows_of(start))


def one_split(path, start):
    write(path / "train.jsonl", rows_of(start))
    return str(path)


def pictures(path, start):
    for k in range(start, start + 20):
        (path / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        tiny.picture("top", k).save(path / "ab"[k % 2] / f"{k}.png")
    return str(path)


KINDS = {
    "text": (TextDataModule, rows_file),
    "folder": (TextDataModule, one_split),
    "labelled": (TextClassificationDataModule, rows_file),
    "pictures": (ImageDataModule, pictures),
}


def parts(make, source, *stages, of=(), **options):
    """A data module after its setup for these stages of a module of runs that have held out ``of``."""
    data = make(source, **options)
    module = tiny.stub(tiny.tokenizer(pad=True), label_names=["a", "b"], num_labels=2, run=SimpleNamespace(held_out=[*of]))
    data.trainer = tiny.process(module=module)
    for stage in stages:
        data.setup(stage)
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_measures_what_the_fit_held_out_and_all_rows_of_other_data_and_predict_all_rows(tmp_path, kind):
    make, store = KINDS[kind]
    sizes = {"val_size": 5, "test_size": 4}
    own, other = (store(tmp_path / name, start) for name, start in [("own", 0), ("other", 20)])
    of = parts(make, own, "fit", **sizes).held_out
    moved = shutil.copytree(tmp_path / "own", tmp_path / "moved") / Path(own).relative_to(tmp_path / "own")
    for source, n_val, n_test in [(own, 5, 4), (str(moved), 5, 4), (other, 20, 20)]:
        data = parts(make, source, "validate", "test", of=of, **sizes)
        assert [len(data.val), len(data.test)] == [n_val, n_test], source
        assert len(parts(make, source, "predict", of=of, **sizes).test) == 20


def test_another_source_is_measured_on_the_split_that_it_has_and_an_unknown_fit_asks_for_a_size(tmp_path):
    own, other = rows_file(tmp_path / "own", 0), one_split(tmp_path / "other", 20)
    assert len(parts(TextDataModule, own, "test", test_size=1.0).test) == 20
    of = parts(TextDataModule, own, "fit").held_out
    for known in ((), of):  # of which all rows were trained on
        with pytest.raises(UserError, match=r"data\.test_size: .* has no test rows\. .*1\.0"):
            parts(TextDataModule, own, "test", of=known)
    write(tmp_path / "other" / "test.jsonl", ROWS)
    write(tmp_path / "other" / "dev.jsonl", ROWS[:3])
    data = parts(TextDataModule, other, "validate", "test", of=of, test_size=0.5)
    assert [len(data.val), len(data.test)] == [3, 3]
    assert len(parts(TextDataModule, other, "predict", of=of, test_size=0.5).test) == 6
    named = {"train_split": "train_sft", "val_split": "test_sft", "test_split": "test_sft"}  # of the fit's data
    assert len(parts(TextDataModule, rows_file(tmp_path / "file", 40), "test", of=of, **named).test) == 20


def numbers(part, data):
    """Which of ``rows_of(0)`` these are."""
    return sorted(int(text.split()[-1][:-1]) for text in texts_of(part, data))


def test_rows_that_were_trained_on_are_never_measured_as_held_out(tmp_path):
    rows = rows_file(tmp_path, 0)
    fit = parts(TextDataModule, rows, "fit")
    trained, held_out = numbers(fit.train, fit), numbers(fit.val, fit)
    for options in ({}, {"val_size": 0.5}, {"split_seed": 1}, {"train_size": 3}, {"test_size": 6}):
        data = parts(TextDataModule, rows, "validate", of=fit.held_out, **options)
        assert numbers(data.val, data) == held_out, options
    for options in ({"test_size": 6}, {"test_size": 0.3, "split_seed": 1}):  # it held out no test rows
        with pytest.raises(UserError, match=r"data\.test_size: .* has no test rows"):
            parts(TextDataModule, rows, "test", of=fit.held_out, **options)
    whole = parts(TextDataModule, rows, "test", of=fit.held_out, test_size=1.0)
    assert numbers(whole.test, whole) == sorted(trained + held_out)
    folder = tmp_path / "folder"  # a file of it, or the split itself, is the same data
    write(folder / "train.jsonl", rows_of(0))
    for source, options in [(folder, {"val_split": "train", "val_size": 9}), (folder / "train.jsonl", {})]:
        data = parts(TextDataModule, str(source), "validate", of=fit.held_out, **options)
        assert numbers(data.val, data) == held_out
    write(tmp_path / "more.jsonl", rows_of(20))
    data = parts(TextDataModule, f"{tmp_path}/*.jsonl", "validate", of=fit.held_out)  # that file is no more the first
    assert numbers(data.val, data) == held_out
    nothing = parts(TextDataModule, rows, "fit", val_size=0)
    with pytest.raises(UserError, match=r"data\.source: .* was trained on rows of .*jsonl"):
        parts(TextDataModule, f"{tmp_path}/*.jsonl", "validate", of=nothing.held_out)


def test_a_later_stage_trains_on_no_row_that_an_earlier_one_held_out(tmp_path):
    own, other = rows_file(tmp_path / "own", 0), rows_file(tmp_path / "other", 20)
    first = parts(TextDataModule, own, "fit", "test", test_size=6)
    held_out = numbers(first.val, first) + numbers(first.test, first)
    for options in ({}, {"split_seed": 1, "test_size": 3}, {"test_size": 4, "train_size": 3}):
        for source in (own, [other, Source(own, share=0.8)], [Source(own, share=0.5), own]):
            second = parts(TextDataModule, source, "fit", of=first.held_out, **options)
            assert not {*numbers(second.train, second)} & {*held_out}
            again = parts(TextDataModule, own, "test", of=second.held_out, test_size=6)
            assert texts_of(again.test, again) == texts_of(first.test, first)
    twice = parts(TextDataModule, [own, Source(own, share=0.5)], "fit", "validate")
    assert not {*numbers(twice.train, twice)} & {*numbers(twice.val, twice)}


@pytest.mark.parametrize("how", ["grown", "reordered", "pictures"])
def test_rows_that_were_held_out_stay_so_where_their_data_has_changed(tmp_path, how):
    make, store = KINDS["pictures" if how == "pictures" else "text"]
    source = store(tmp_path / "rows", 0)
    first = parts(make, source, "fit", val_size=5, test_size=4)
    held_out = {part: {str(row) for row in first.parts(stage)[part][0]} for part, stage in (("val", "fit"), ("test", "test"))}
    if how == "pictures":
        store(tmp_path / "rows", 20)  # more of each class: the positions of those that were there are others
    else:
        rows = [*rows_of(0), *rows_of(20)]
        write(Path(source), rows if how == "grown" else rows[::-1])
    second = parts(make, source, "fit", of=first.held_out, val_size=5, test_size=4)
    assert len(second.train) == 40 - 9
    for part, stage in (("val", "validate"), ("test", "test")):
        again = parts(make, source, of=second.held_out)
        assert {str(row) for row in again.parts(stage)[part][0]} == held_out[part]


def test_a_row_that_other_data_has_too_does_not_make_it_the_same_data(tmp_path):
    first = parts(TextDataModule, rows_file(tmp_path / "own", 0), "fit", val_size=5)
    (row, *_) = first.parts("validate")["val"][0]
    other = write(tmp_path / "other.jsonl", [dict(row), *rows_of(20)])
    assert len(parts(TextDataModule, other, "fit", of=first.held_out, val_size=5).val) == 5


def test_a_checkpoint_knows_what_all_its_runs_held_out(tmp_path):
    """In Python too, wherever the files and the checkpoints of the earlier stages are then."""
    files = [rows_file(tmp_path / name, start) for name, start in [("a", 0), ("b", 20), ("c", 40)]]
    chain, measured = None, {}
    for source in files[:2]:
        data = TextDataModule(source, test_size=4, max_length=16)
        run, module = trainer(tmp_path, max_steps=1), tiny.causal_lm(tmp_path, init_chain=chain)
        run.fit(module, datamodule=data)
        data.setup("test")
        measured[source] = texts_of(data.test, data)
        if chain is not None:
            Path(chain).unlink()
        chain = f"{Path(source).parent}.ckpt"
        run.save_checkpoint(chain)
    for source, texts in measured.items():
        moved = shutil.move(source, f"{source}.moved.jsonl")
        for how in ({"ckpt_path": chain}, {}):  # the state is loaded by the Trainer, or before
            data = TextDataModule(moved, test_size=9, split_seed=1, max_length=16)
            module = tiny.causal_lm(tmp_path) if how else COLACausalLM.load_from_checkpoint(chain)
            trainer(tmp_path).test(module, datamodule=data, verbose=False, **how)
            assert texts_of(data.test, data) == texts
    other = TextDataModule(files[2], max_length=16)
    trainer(tmp_path).test(tiny.causal_lm(tmp_path, init_chain=chain), datamodule=other, verbose=False)
    assert len(other.test) == 20


def test_a_run_resumes_inside_an_epoch_on_the_same_training_rows_alone(tmp_path):
    def fit(rows, *callbacks, ckpt_path=None, source=tmp_path / "rows.csv", **options):
        write(source, rows)
        data = TextDataModule(str(source), val_size=2, max_length=16, batch_size=4, length_grouped=False, **options)
        run = trainer(tmp_path, *callbacks, max_epochs=2)
        run.fit(tiny.causal_lm(tmp_path, architecture="gpt2"), datamodule=data, ckpt_path=ckpt_path)

    def save(run, *_):
        run.save_checkpoint(tmp_path / f"{run.global_step}.ckpt", weights_only=False)

    rows = [{"text": f"It was {k}.", "label": "a"} for k in range(18)]
    swapped, edited = [rows[1], rows[0], *rows[2:]], [*rows[:5], {"text": "It was X.", "label": "a"}, *rows[6:]]
    fit(rows, LambdaCallback(on_train_batch_end=save))
    for changed in (swapped, edited):
        with pytest.raises(UserError, match=r"^data\.source \(a hash of its training rows\) must be"):
            fit(changed, ckpt_path=tmp_path / "3.ckpt")
        fit(changed, ckpt_path=tmp_path / "4.ckpt")  # at an epoch's end, they are other data
    fit(rows, ckpt_path=tmp_path / "3.ckpt", source=tmp_path / "moved.csv")
    for path in ("3.ckpt", "4.ckpt"):  # else rows that it held out would be trained on
        with pytest.raises(UserError, match=r"^data: the resumed run has held out other rows"):
            fit(rows, ckpt_path=tmp_path / path, split_seed=1)


def two(folder):
    """A folder with texts in two splits, and a file of instructions with other names, which has the columns of texts, too."""
    tiny.write_rows(folder / "texts", ROWS, ["train", "validation"])
    requested = [{"text": "unused", "ask": f"Who is {k}?", "say": f"Al {k}."} for k in range(20)]
    asked = write(folder / "asked.jsonl", requested)
    return str(folder / "texts"), Source(asked, columns={"prompt": "ask", "response": "say"})


def test_each_source_has_its_own_splits_columns_and_share_and_one_order_mixes_them(tmp_path):
    texts, requested = two(tmp_path)
    half = Source(requested.source, columns=requested.columns, share=0.5)
    data = attach(TextDataModule((texts, half), chat_template=False, batch_size=4, length_grouped=False), "fit")
    alone = [attach(TextDataModule([one], chat_template=False), "fit") for one in (texts, half)]
    assert [len(data.train), len(data.val)] == [6 + 9, 6 + 1]
    for part in ("train", "val"):
        expected = [row for one in alone for row in getattr(one, part)]
        assert [*getattr(data, part)] == expected
    order = [texts_of([{"input_ids": ids} for ids in batch["input_ids"]], data) for batch in data.train_dataloader()]
    is_text = [text.startswith("It was") for batch in order for text in batch]
    assert sum(is_text) == 6
    assert is_text not in (sorted(is_text), sorted(is_text, reverse=True))
    assert data.prompt_format["kind"] == "response"
    assert [one["source"] for one in data.identity["sources"]] == [texts, requested.source]
    assert all(one["files"] for one in data.identity["sources"])
    assert data.identity["sources"][1]["share"] == 0.5
    again, other = (attach(TextDataModule([half], chat_template=False, split_seed=seed), "fit") for seed in (0, 1))
    own, drawn, others = ({*map(str, one.train["input_ids"][:])} for one in (alone[1], again, other))
    assert drawn == own
    assert len(own | others) > 10  # the share is drawn from all rows, by the seed


def test_templates_and_classifiers_take_several_sources(tmp_path):
    labels = ["no", "yes", "perhaps"]
    first = write(tmp_path / "a.jsonl", [{"text": f"Is it {k}?", "label": labels[k % 2]} for k in range(20)])
    second = write(tmp_path / "b.csv", [{"text": f"Was it {k}?", "label": labels[1 + k % 2]} for k in range(10)])
    templated = attach(TemplateDataModule([first, second], prompt="{text} ", options=labels), "fit")
    assert Counter(row.example.options[row.example.answer] for row in templated.train)["perhaps"] > 0
    assert [len(templated.train), len(templated.val)] == [18 + 9, 2 + 1]
    templated.setup("predict")
    assert [row.example.prompt for row in templated.test[18:22]] == ["Is it 18? ", "Is it 19? ", "Was it 0? ", "Was it 1? "]
    fields = [row["text"] for row in templated.fields_of([19, 20, 0])]  # of predicted rows, as the file of predictions has them
    assert fields == ["Is it 19?", "Was it 0?", "Is it 0?"]
    classified = attach(TextClassificationDataModule([first, second]), "fit")
    assert classified.label_names == sorted(labels)
    assert {*classified.train["labels"]} == {0, 1, 2}


def test_a_run_on_two_sources_resumes_to_the_bit_inside_an_epoch(tmp_path):
    texts, requested = two(tmp_path)

    def fit(*callbacks, ckpt_path=None):
        module = tiny.causal_lm(tmp_path)
        run = trainer(tmp_path, *callbacks, chain={"every_n_train_steps": 4}, max_steps=9)
        run.fit(module, datamodule=TextDataModule([texts, requested], chat_template=False, batch_size=4), ckpt_path=ckpt_path)
        return weights(module)

    def save(run, *_):
        if run.global_step == 3:
            run.save_checkpoint(tmp_path / "3.ckpt", weights_only=False)

    whole = fit(LambdaCallback(on_train_batch_end=save))
    assert_bit_equal(fit(ckpt_path=tmp_path / "3.ckpt"), whole)


def test_sources_are_named_on_the_command_line_and_in_the_config_of_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tiny.folder(Path("model"))
    two(Path())
    sources = "[texts, {source: asked.jsonl, columns: {prompt: ask, response: say}, share: 0.5}]"
    words = ["fit", "--model.model_name", "model", "--data.source", sources, "--data.max_new_tokens", "1"]
    words += ["--trainer.max_steps", "1"]
    assert main([*words, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]) == 0
    out = capfd.readouterr().out
    assert "ask -> say" in out
    assert "asked.jsonl: 9 rows for training, 1 for validation" in out
    (use,) = [line for line in out.splitlines() if line.startswith("checkpoint: ")]
    assert main(["predict", "--config", "runs/version_0/config.yaml", "--ckpt_path", use.partition(": ")[2]]) == 0
