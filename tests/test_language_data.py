"""Rows, tokens and batches: what is read, how it is cut, and what is said when it can't be."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

from cola_lightning import (
    COLACausalLM,
    HubError,
    PromptDataModule,
    TemplateDataModule,
    TextClassificationDataModule,
    TextDataModule,
    UserError,
)
from cola_lightning.chat_template import end_tokens
from cola_lightning.data.base import EpochSampler
from cola_lightning.data.encoding import encode_responses, encode_texts, labels_of
from cola_lightning.data.examples import Example, encode_examples
from cola_lightning.data.splits import draw, load_splits
from tests import tiny
from tests.toy import trainer


def attach(data, architecture="llama", num_labels=2):
    """A trainer as the data module sees it."""
    tokenizer = tiny.tokenizer(architecture, pad=True)
    tokenizer.model_max_length = 64
    module = SimpleNamespace(tokenizer=tokenizer, seed=3, num_labels=num_labels)
    data.trainer = SimpleNamespace(
        lightning_module=module, training=False, world_size=1, global_rank=0, limit_val_batches=1.0, limit_test_batches=1.0
    )
    return data


def write(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def sst2(tmp_path):
    rows = [{"sentence": f"film number {k} ", "label": k % 2, "idx": k} for k in range(40)]
    write(tmp_path / "sst2", "validation", rows[:10])
    return write(tmp_path / "sst2", "train", rows)


def ids(part):
    return [row.example.prompt for row in part]


def test_train_and_validation_are_drawn_together_from_train_and_test_from_validation(sst2):
    def parts(**arguments):
        sizes = {"train_size": 25, "val_size": 12, "test_size": 9}
        data = attach(PromptDataModule("SST2", sst2, **sizes | arguments))
        data.setup("fit")
        data.setup("test")
        return data

    data = parts()
    assert [len(part) for part in (data.train, data.val, data.test)] == [25, 12, 9]
    assert len({*ids(data.train), *ids(data.val)}) == 37
    assert ids(parts().train) == ids(data.train) != ids(parts(split_seed=1).train)
    assert ids(parts(val_size=5).train) == ids(data.train)  # validation comes last
    assert set(ids(data.test)) <= {f"film number {k} It was" for k in range(10)}
    with pytest.raises(UserError, match=r"train_size \+ data.val_size, of .*: expected at least 42 rows, received 40"):
        parts(train_size=30)
    with pytest.raises(UserError, match=r"data.test_size, of .*: expected at least 11 rows, received 10"):
        parts(test_size=11)


def test_without_a_source_the_task_is_read_from_the_folder_of_the_environment_or_the_hub(sst2, monkeypatch):
    monkeypatch.setenv("COLA_DATA_DIR", str(Path(sst2).parent))
    assert PromptDataModule("sst2").source == sst2
    monkeypatch.delenv("COLA_DATA_DIR")
    data = PromptDataModule("sst2")
    assert (data.source, data.subset, data.train_size) == ("nyu-mll/glue", "sst2", 1000)


@pytest.mark.skipif("COLA_DATA_DIR" not in os.environ, reason="COLA_DATA_DIR is not set")
@pytest.mark.parametrize(
    ("task", "own", "sizes"),
    [
        ("SST2", {}, [1000, 500, 872]),
        ("RTE", {}, [1000, 500, 277]),
        ("CB", {}, [150, 100, 56]),
        ("BoolQ", {"train_size": 700, "val_size": 300}, [700, 300, 1000]),  # 1,000 rows are all that there are
    ],
)
def test_the_real_tasks_have_the_protocols_sizes(task, own, sizes):
    data = attach(PromptDataModule(task, max_length=64, **own))
    data.setup("fit")
    data.setup("test")
    assert [len(part) for part in (data.train, data.val, data.test)] == sizes
    assert {row.example.answer for row in data.train} == set(range(len(data.train[0].example.options)))


def test_a_long_prompt_loses_its_beginning_and_keeps_its_first_token_and_its_option():
    example = Example("The capital of the country is the largest town. " * 4 + "It was", (" terrible", " great"), 0)
    for architecture in ("llama", "gpt2"):
        tokenizer = tiny.tokenizer(architecture)
        (whole,), (cut,) = (encode_examples(tokenizer, [example], length) for length in (500, 20))
        has_bos = architecture == "llama"
        assert cut.option_ids == whole.option_ids
        assert len(cut) == 19  # the option's last token is predicted, not read
        assert cut.prefixes[0] == ([0, *whole.prefixes[0][-18:]] if has_bos else whole.prefixes[0][-19:])


def test_no_option_is_cut(sst2):
    tokenizer = tiny.tokenizer()
    example = Example("It was", (" great", " one of the largest and oldest of all towns"), 0, "train, row 2")
    n_option = max(len(ids) for ids in encode_examples(tokenizer, [example], 500)[0].option_ids)
    assert len(encode_examples(tokenizer, [example], n_option + 1)[0]) == n_option
    message = rf"train, row 2: expected options of fewer than {n_option} tokens \(data.max_length\), received one of"
    with pytest.raises(UserError, match=message):
        encode_examples(tokenizer, [example], n_option)
    with pytest.raises(UserError, match="expected options that add tokens"):
        encode_examples(tokenizer, [Example("It was", ("", " great"), 0)], 500)
    with pytest.raises(UserError, match=r"expected options that differ in more than spaces, received \('Yes', 'Yes '"):
        encode_examples(tokenizer, [Example("It was", ("Yes", "Yes "), 0)], 500)
    with pytest.raises(UserError, match="expected a prompt of at least one token"):
        encode_examples(tiny.tokenizer("gpt2"), [Example("", ("Yes", "No"), 0)], 500)


@pytest.mark.parametrize("end", ["eos_token", "sep_token"])  # BERT's tokenizer has no end of text, and ends with [SEP]
def test_an_end_of_text_that_a_tokenizer_adds_is_no_part_of_an_option(end):
    example = Example("It was", (" great", " one of the largest"), 0)
    plain, ending = tiny.tokenizer(), tiny.tokenizer(eos=True, end=end)
    assert ending("It was")["input_ids"] == [*plain("It was")["input_ids"], 1]
    (expected,), (received,) = (encode_examples(tokenizer, [example], 500) for tokenizer in (plain, ending))
    assert received == expected
    assert encode_texts(ending, ["It was"], 8) == encode_texts(plain, ["It was"], 8)
    told = "It was</s>"  # what the text itself says stays
    assert encode_texts(ending, [told], 8)[0][0]["input_ids"] == plain(told)["input_ids"]
    assert end_tokens(None, ending) == [1]


def test_a_tokenizer_may_have_no_end_of_text():
    endless = tiny.tokenizer(end="sep_token")
    assert encode_texts(endless, ["It was"], 8)[0][0]["input_ids"] == endless("It was")["input_ids"]
    assert end_tokens(None, endless) == []


@pytest.mark.parametrize("test_size", [10, 6])
def test_drawn_rows_are_predicted_in_the_order_of_the_data(sst2, tmp_path, test_size):
    own = write(tmp_path / "own", "train", load_splits(sst2)["train"]())
    template = TemplateDataModule(own, prompt="{sentence}", options=[" bad", " good"], test_size=test_size)
    for data in (PromptDataModule("SST2", sst2, test_size=test_size), template):
        attach(data).setup("test")
        tested = ids(data.test)
        data.setup("predict")
        assert ids(data.test) == sorted(tested, key=lambda prompt: int(prompt.split()[2])) != tested


def test_white_space_around_a_prompt_is_as_in_the_protocol():
    """A blank between prompt and option is the option's; what is before the prompt goes; a line's end stays."""
    tokenizer = tiny.tokenizer()
    rows = [("\n The film was long so ", "I sat. "), ("The mat\n", "Yes")]
    (first,), (second,) = (encode_examples(tokenizer, [Example(prompt, (option,), 0)], 500) for prompt, option in rows)
    assert tokenizer.decode(first.prefixes[0]) == "<s>The film was long so I sat"
    assert tokenizer.decode(first.option_ids[0]) == " I sat."
    assert tokenizer.decode(second.option_ids[0]) == "Yes"
    assert tokenizer.decode(second.prefixes[0][: 1 - len(second.option_ids[0]) or None]) == "<s>The mat\n"
    written = Example(" Who? ", ("Al",), 0, references=("Al",))
    assert tokenizer.decode(encode_examples(tokenizer, [written], 500)[0].prompt_ids) == "<s>Who?"


def test_a_text_becomes_several_rows_or_none_and_their_order_stays(tmp_path):
    rows = [{"text": "It was old. " * 40}, {"text": "A"}, {"text": "A town."}] * 2
    data = attach(TextDataModule(write(tmp_path / "own", "validation", rows)))
    data.setup("test")
    texts = [data.tokenizer.decode(row["input_ids"]) for row in data.test]
    whole = "<s>" + "It was old. " * 40 + "</s>"
    assert "".join(texts) == (whole + "<s>A</s>" + "<s>A town.</s>") * 2


def test_the_models_own_limit_holds_too(sst2):
    data = attach(PromptDataModule("SST2", sst2, train_size=10, val_size=10))
    assert data.max_length == 64
    data.trainer.lightning_module.tokenizer.model_max_length = 10**30
    assert data.max_length == 2048


def test_text_and_instructions_are_read_from_the_splits_that_there_are(tmp_path):
    source = write(tmp_path / "own", "train", [{"prompt": "Is the town old? ", "response": "Yes"}] * 6)
    write(tmp_path / "own", "dev", [{"text": "It was old. " * 40}])
    write(tmp_path / "own", "asked", [{"prompt": "Is it? ", "response": "No"}] * 2)
    data = attach(TextDataModule(source, test_split="asked"))
    for stage in ("fit", "test"):
        data.setup(stage)
    assert len(data.train) == 6
    assert len(data.val) > 1  # one text longer than the model takes: several rows
    assert max(len(row["input_ids"]) for row in data.val) == 64
    assert sum(len(row["input_ids"]) for row in data.val) == len(data.tokenizer("It was old. " * 40)["input_ids"]) + 1
    end = data.tokenizer.eos_token_id
    labels = labels_of(data.train[0])
    assert labels[-3:] == [-100, *data.train[0]["input_ids"][-2:]]
    assert data.train[0]["input_ids"][-1] == end == labels[-1]
    assert len(data.test) == 2
    assert data.tokenizer.decode([label for label in labels if label != -100]) == " Yes</s>"
    assert data.tokenizer.decode(data.train[0]["input_ids"]) == "<s>Is the town old? Yes</s>"
    batch = data.collate(data.train)
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], batch["input_ids"].shape
    )
    drawn = attach(TextDataModule(source, train_size=3, val_size=2, test_split="asked"))
    drawn.setup("fit")
    assert (len(drawn.train), len(drawn.val)) == (3, 2)
    with pytest.raises(UserError, match=r"expected at least 7 rows, received 6"):
        attach(TextDataModule(source, train_size=5, val_size=2, test_split="asked")).setup("fit")
    with pytest.raises(UserError, match="expected a response of fewer than 4 tokens"):
        encode_responses(tiny.tokenizer(), [("Is it? ", "It is one of the oldest.")], 4, ["here"])
    assert encode_texts(tiny.tokenizer("gpt2"), [""], 8) == [[]]


def test_labelled_texts_and_pairs_become_a_classifiers_batch(tmp_path):
    rows = [{"premise": "It was old." * (k + 1), "hypothesis": "It was.", "label": k % 3} for k in range(4)]
    source = write(tmp_path / "pairs", "train", rows)
    write(tmp_path / "pairs", "validation", rows)
    write(tmp_path / "pairs", "test", rows)
    fields = ["premise", "hypothesis"]
    data = attach(TextClassificationDataModule(source, text_fields=fields, max_length=12), num_labels=3)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].sort().values.tolist() == [0, 0, 1, 2]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 12)
    data.tokenizer.truncation_side = "left"
    data.setup("fit")
    assert torch.equal(next(iter(data.train_dataloader()))["input_ids"], batch["input_ids"])
    assert data.tokenizer.truncation_side == "left"
    columns = "expected one or two of the columns premise, hypothesis, label, received sentence"
    for arguments, labels, message in [
        ({"text_fields": fields}, 2, "row 3: expected one of the labels 0, 1 in the field 'label', received '2'"),
        ({"text_fields": "sentence"}, 2, columns),
        ({"text_fields": ["premise", "hypothesis", "label"]}, 2, "expected one or two of the columns"),
        ({"label_field": "gold"}, 2, "expected one of the columns premise, hypothesis, label, received gold"),
    ]:
        with pytest.raises(UserError, match=message):
            attach(TextClassificationDataModule(source, **arguments), num_labels=labels).setup("fit")


def test_evaluation_goes_from_the_longest_row_to_the_shortest_and_training_by_seed_and_epoch():
    data = attach(tiny.reviews(batch_size=10))
    data.setup("fit")
    lengths = [batch["input_ids"].shape[1] for batch in data.val_dataloader()]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 10
    data.eval_batch_size = 1
    lengths = [batch["input_ids"].shape[1] for batch in data.val_dataloader()]
    assert lengths == sorted(lengths, reverse=True) != [data.length(row) for row in data.val]
    order = list(data.train_dataloader().sampler)
    assert order == list(EpochSampler(data.train, "0 3"))
    assert sorted(order) == list(range(400))


@pytest.mark.parametrize(
    ("limits", "n_rows"),
    [
        ({"limit_val_batches": 1, "limit_test_batches": 1}, 10),
        ({"limit_val_batches": 2, "limit_test_batches": 2}, 20),
        ({"limit_val_batches": 0.3, "limit_test_batches": 0.3}, 30),
        ({"fast_dev_run": 2}, 20),
        ({"limit_val_batches": 1.0, "limit_test_batches": 1.0, "num_sanity_val_steps": 2}, 100),
        ({}, 100),
    ],
    ids=str,
)
def test_a_limited_evaluation_takes_the_first_rows_and_not_the_longest(tmp_path, limits, n_rows):
    """All of one label are long, and come last: of ten rows of the split's first, none is."""
    rows = [{"sentence": "old " * (20 if k >= 90 else 1 + k % 3) + str(k), "label": int(k >= 90)} for k in range(100)]
    write(tmp_path / "own", "train", rows)
    write(tmp_path / "own", "validation", rows)
    source = write(tmp_path / "own", "test", rows)
    data = TemplateDataModule(source, prompt="{sentence}", options=[" no", " yes"], eval_batch_size=10)

    class Seen(COLACausalLM):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                seen["val"] += batch["prompt"]

        def test_step(self, batch, batch_idx):
            seen["test"] += batch["prompt"]

    seen = {"val": [], "test": []}
    module = Seen(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0)
    trainer(tmp_path, **{"max_epochs": 1, "limit_train_batches": 1} | limits).fit(module, datamodule=data)
    trainer(tmp_path, **limits).test(module, datamodule=data, verbose=False)
    prompts = [row["sentence"] for row in rows]
    for some in seen.values():
        assert sorted(some) == sorted(prompts[:n_rows])
        lengths = [len(prompt) for prompt in some]
        assert some == prompts[:n_rows] if n_rows < 100 else lengths[0] > 70 > lengths[-1]


def test_reviews_are_prompted_as_sst2_is():
    data = attach(tiny.reviews())
    data.setup("test")
    assert len(data.test) == 100
    assert all(row.example.prompt.endswith(". It was") for row in data.test)
    assert {row.example.options for row in data.test} == {(" terrible", " great")}


def test_a_blank_line_at_the_end_and_a_byte_order_mark_are_nothing_to_stumble_over(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "fine"}\r\n{"text": "good"}\n\n')
    assert [(row["text"], row.place.rpartition(" ")[2]) for row in load_splits(str(tmp_path))["train"]()] == [
        ("fine", "1"),
        ("good", "2"),
    ]


RECORD = {"passage": "Al met Di.", "query": "@placeholder left", "entities": ["Di", "Al"], "answers": ["Al"]}
TWICE = {"entities": ["Al", "Al"]}
LONG = {"query": "@placeholder left " * 40}
SIZES = {"train_size": 200, "val_size": 100}


def drawn(tmp_path, changed, n_rows=400, **arguments):
    """Parts of ReCoRD, of whose rows some are others, and the places of the rows of each part that a data set without has."""
    rows = [RECORD | {"passage": f"Al met Di {k} times."} for k in range(n_rows)]
    source = write(tmp_path / "plain", "train", rows)
    for folder in ("plain", "own"):
        write(tmp_path / folder, "validation", rows[:1])
    data = attach(PromptDataModule("ReCoRD", source, **SIZES | arguments))
    data.setup("fit")
    places = [[int(row.example.place.rpartition(" ")[2]) - 1 for row in part] for part in (data.train, data.val)]
    which = changed(*places, sorted({*range(n_rows)} - {*places[0], *places[1]}))
    source = write(tmp_path / "own", "train", [row | which.get(k, {}) for k, row in enumerate(rows)])
    return attach(PromptDataModule("ReCoRD", source, **SIZES | arguments)), data, places, which


def test_a_row_that_is_not_drawn_is_not_judged(tmp_path, caplog):
    data, plain, *_ = drawn(tmp_path, lambda train, val, rest: dict.fromkeys(rest, TWICE))
    data.setup("fit")
    assert [ids(part) for part in (data.train, data.val)] == [ids(part) for part in (plain.train, plain.val)]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("change", [TWICE, LONG, {"query": None}, {"answers": ["Bo"]}, {"entities": []}, {"query": ""}])
def test_a_drawn_row_that_cannot_be_used_is_left_out_and_counted(tmp_path, caplog, change):
    data, plain, (train, val), which = drawn(
        tmp_path,
        lambda train, val, _: dict.fromkeys((*train[5:7], val[3]), change),
    )
    data.setup("fit")
    for part, others, places in ((data.train, plain.train, train), (data.val, plain.val, val)):
        assert ids(part) == [prompt for prompt, place in zip(ids(others), places, strict=True) if place not in which]
    told = [record.getMessage() for record in caplog.records]
    assert [one.partition(", and are skipped; the first: ")[0] for one in told] == [
        "1 of 100 rows cannot be used",
        "2 of 200 rows cannot be used",
    ]
    assert all("train, row " in one and "\n" not in one for one in told)


def test_more_than_one_in_a_hundred_are_an_error(tmp_path):
    data, *_ = drawn(tmp_path, lambda train, val, _: dict.fromkeys(val[:2], TWICE))
    with pytest.raises(UserError, match=r"row \d+: expected options that differ, .* \(2 of 100 rows cannot be used, more"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passage": ["Al met Di."]}, r"expected text in the field 'passage', received \['Al met Di\.'\]$"),
        ({"entities": "Al"}, r"expected a list of texts in the field 'entities', received 'Al'$"),
    ],
)
def test_a_field_that_holds_something_else_is_an_error_in_one_row(tmp_path, change, message):
    data, *_ = drawn(tmp_path, lambda train, val, _: {train[7]: change})
    with pytest.raises(UserError, match=message):
        data.setup("fit")


def test_a_task_of_ones_own_leaves_out_a_few_rows_too_but_none_that_is_predicted(tmp_path, caplog):
    rows = [{"text": f"It was {k}.", "label": k % 2} for k in range(100)]
    rows[30]["text"] = None
    write(tmp_path / "own", "train", rows)
    source = write(tmp_path / "own", "validation", rows)
    data = attach(TemplateDataModule(source, prompt="{text}", options=[" no", " yes"], test_split="validation"))
    for stage in ("fit", "test"):
        data.setup(stage)
    assert [len(part) for part in (data.train, data.val, data.test)] == [99, 99, 99]
    assert [record.getMessage().partition(" cannot")[0] for record in caplog.records] == ["1 of 100 rows"] * 3
    with pytest.raises(UserError, match=r"validation\, row 31: expected text in the field 'text', received None$"):
        data.setup("predict")


UNLABELLED = {
    "SST2": ({"sentence": "a film"}, {"label": 1}),
    "BoolQ": ({"passage": "Tea.", "question": "is it"}, {"answer": None}),
    "ReCoRD": ({"passage": "Al.", "query": "@placeholder left", "entities": ["Di", "Al"]}, {"answers": ["Al"]}),
    "SQuAD": ({"title": "T", "context": "C", "question": "Q"}, {"answers": {"text": ["A"]}}),
    "DROP": ({"passage": "P", "question": "Q"}, {"answers_spans": {"spans": ["A"]}}),
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_rows_without_a_label_or_an_answer_are_predicted_and_nothing_else(tmp_path, name):
    row, target = UNLABELLED[name]
    source = write(tmp_path / "own", "train", [row] * 20)
    write(tmp_path / "own", "validation", [row | ({} if None in target.values() else target), row])
    data = attach(PromptDataModule(name, source, test_size=2, train_size=9, val_size=2))
    field = next(iter(target))
    for stage, place in (("fit", "train"), ("validate", "train"), ("test", "validation")):
        with pytest.raises(UserError, match=rf"{place}, row \d+: expected .* field '({field}|label)'"):
            data.setup(stage)
    for place, n_rows in ((source, 2), (f"{source}/train.jsonl", 20)):  # of a file, all rows, in order
        data = attach(PromptDataModule(name, place, test_size=2))
        data.setup("predict")
        assert len(data.test) == n_rows
        assert [row.example.answer for row in data.test].count(None) >= n_rows - 1
        assert list(data.collate(data.test)["prompt"]) == ids(data.test)


def test_settings_and_rows_that_contradict_each_other_are_named(tmp_path, monkeypatch):
    both = write(tmp_path / "both", "train", [{"text": "A", "prompt": "B", "response": "C", "completion": "D"}])
    empty = write(tmp_path / "empty", "train", [{"text": ""}])
    silent = write(tmp_path / "silent", "train", [{"prompt": "B", "response": ""}])
    monkeypatch.setenv("COLA_DATA_DIR", str(tmp_path))
    for make, message in [
        (lambda: TextDataModule(both, test_split="train"), "received prompt and completion and response, of which"),
        (lambda: TextDataModule(empty, test_split="train"), "data.source: expected rows of at least two tokens, received none"),
        (lambda: TextDataModule(silent, test_split="train"), "row 1: expected a response that adds tokens to its prompt"),
        (lambda: TextDataModule(both, "sub"), "data.subset: expected null for files on this machine, .*both', received 'sub'"),
        (
            lambda: PromptDataModule("SST2"),
            "data.source: expected a file, a folder or a data set .* received .*sst2",
        ),
        (
            lambda: TextDataModule(f"{both}/train.jsonl", test_split="no"),
            "data.test_split: expected one of the splits .* received 'no'",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            attach(make(), "gpt2").setup("test")
    write(tmp_path / "silent", "validation", [{"prompt": "B", "response": "C"}])
    with pytest.raises(UserError, match=r"data.train_size, of .*: expected at least 5 rows, received 1"):
        attach(TextDataModule(silent, train_size=5, test_split="validation")).setup("fit")


def test_a_text_without_a_token_cannot_be_classified(tmp_path):
    source = write(tmp_path / "own", "validation", [{"sentence": "", "label": 0}])
    with pytest.raises(UserError, match="row 1: expected at least one token of text in sentence, received none"):
        attach(TextClassificationDataModule(source), "gpt2").setup("test")


def test_columns_that_are_not_known_are_named(tmp_path):
    source = write(tmp_path / "own", "train", [{"document": "Is it?", "summary": "Yes."}] * 20)
    message = r"data\.columns: expected .* columns document, summary, received none: .* '{prompt: document, response: summary}'"
    with pytest.raises(UserError, match=message):
        attach(TextDataModule(source)).setup("fit")
    data = attach(TextDataModule(source, columns={"prompt": "document", "response": "summary"}))
    data.setup("fit")
    assert data.tokenizer.decode(data.train[0]["input_ids"]) == "<s>Is it?Yes.</s>"
    for wrong, message in [
        ({"prompt": "no"}, "expected columns of the data, document, summary, received 'no'"),
        ({"x": "y"}, "'x'"),
    ]:
        with pytest.raises(UserError, match=message):
            attach(TextDataModule(source, columns=wrong)).setup("fit")


@pytest.mark.parametrize("source", ["no/such/folder", "./nowhere", "a b", "rows.csv"])
def test_a_source_that_is_neither_folder_nor_hub_id(source):
    with pytest.raises(UserError, match=r"data\.source: expected a file, a folder or a data set on the hub"):
        load_splits(source)["train"]()


def test_a_hub_that_cannot_be_reached_is_not_the_users_mistake(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # as the variable of this name does
    with pytest.raises(HubError, match=r"data\.source: 'nyu-mll/nothing' is not in the local cache"):
        load_splits("nyu-mll/nothing", "sst2")


def test_processes_take_turns_in_one_order():
    def rows(rank, done=0):
        sampler = EpochSampler(range(11), 3, lambda: done, n_processes=2, rank=rank)
        sampler.set_epoch(1)
        assert len(sampler) == 6
        return list(sampler)

    whole = EpochSampler(range(11), 3)
    whole.set_epoch(1)
    order = list(whole)
    assert [rows(0), rows(1)] == [order[::2], [*order[1::2], order[0]]]
    assert [rows(0, 4), rows(1, 4)] == [rows(0)[4:], rows(1)[4:]]


def test_a_part_is_drawn_once():
    first, second = (part.tolist() for part in draw(100, [60, 40], 0, "rows"))
    assert sorted(first + second) == list(range(100))
    assert first != sorted(first)
    assert [part.tolist() for part in draw(100, [60, 40], 0, "rows")] == [first, second]
    before = random.getstate(), torch.get_rng_state()
    draw(100, [10], 0, "rows")
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
