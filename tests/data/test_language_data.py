"""The contract of data modules: each row once, in an order that follows from seeds and the epoch; and unusable rows."""

import pickle
import re

import pytest
import torch

from cola_lightning import PromptDataModule, TemplateDataModule, TextClassificationDataModule, TextDataModule, UserError
from cola_lightning.chat_template import end_tokens
from cola_lightning.data.base import EpochSampler
from cola_lightning.data.batch import labels_of
from cola_lightning.data.examples import Example, encode_examples
from cola_lightning.data.render import encode_texts
from tests.helpers import tiny
from tests.helpers.tiny import attach
from tests.helpers.toy import toy


def prompts_of(part):
    return [row.example.prompt for row in part]


ROWS = [
    {
        "sentence": f"film number {k} is {'old ' * (7 * k % 11)}",
        "label": k % 2,
        "question": f"Who is {k}?",
        "messages": [{"role": "user", "content": f"Who is {k}?"}, {"role": "assistant", "content": "Al " * (1 + k % 5)}],
    }
    for k in range(46)
]
SIZES, FIELDS = {"val_size": 23, "test_size": 23}, ["sentence", "question"]
MODULES = {
    "task": lambda source, **options: PromptDataModule("SST2", source, **SIZES | options),
    "answer": lambda source, **options: TemplateDataModule(source, prompt="{sentence}?", answer="question", **options),
    "conversations": lambda source, **options: TextDataModule(source, columns={"messages": "messages"}, **options),
    "classifier": lambda source, **options: TextClassificationDataModule(source, text_fields=FIELDS, **options),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    tiny.write_rows(folder, ROWS, ["train"])
    return tiny.write_rows(folder, ROWS[:23], ["validation", "test"])


@pytest.fixture(scope="module", params=MODULES)
def make(request, source):
    """Makes a data module that has been set up."""

    def make(*stages, **options):
        data = MODULES[request.param](source, **{"batch_size": 4, "max_length": 130, "train_size": 23} | options)
        return tiny.set_up(data, tiny.chat_tokenizer(tiny.CHAT), *stages)

    return make


def test_each_row_is_in_one_batch_with_its_tokens_and_labels(make):
    data = make("fit", "test")
    for rows, loader in ((list(data.train), data.train_dataloader()), (list(data.val), data.val_dataloader())):
        assert [len(rows), len(loader)] == [23, 6]
        expected = [ids for row in rows for ids in (row.prefixes if hasattr(row, "prefixes") else [row["input_ids"]])]
        has_loss_on_tokens = isinstance(rows[0], dict) and "spans" in rows[0]
        found, labels = [], []
        for batch in loader:
            masks = batch["attention_mask"].bool()
            found += [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
            if has_loss_on_tokens:
                assert (batch["labels"][~masks] == -100).all()
                labels += [some[mask].tolist() for some, mask in zip(batch["labels"], masks, strict=True)]
        assert sorted(found) == sorted(expected)
        assert sorted(labels) == sorted(labels_of(row) for row in rows if has_loss_on_tokens)


def test_a_worker_process_collates_the_same_batches_without_the_trainer(make):
    data = make("fit")
    data.trainer = tiny.process(module=toy())
    rows = [data.val[k] for k in range(4)]
    in_worker = pickle.loads(pickle.dumps(data))  # as for a process that is not forked
    assert in_worker.trainer is None
    assert str(in_worker.collate(rows)) == str(data.collate(rows))


def test_the_order_of_training_follows_from_the_seeds_and_the_epoch_and_goes_on_inside_one(make):
    data = make("fit")

    def order(epoch=0, done=0, n_processes=1, rank=0, seed=3, data=data):
        data.trainer = tiny.process(rank, n_processes, toy(seed=seed))
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(epoch)
        sampler.rows_done = lambda: done * data.batch_size
        return list(sampler)

    whole = order()
    assert order(data=make("fit")) == whole
    assert whole not in (order(epoch=1), order(seed=4), order(data=make("fit", split_seed=1)))
    assert order(done=2) == whole[8:]
    data.batch_size = 2
    halves = [order(n_processes=2, rank=rank) for rank in (0, 1)]
    assert [row for pair in zip(*halves, strict=True) for row in pair] == [*whole, whole[0]]


def test_evaluation_goes_from_the_longest_row_to_the_shortest_and_under_a_limit_takes_the_first(make):
    data = make("fit", "test")
    for name, part in (("val", data.val), ("test", data.test)):
        loader, lengths = getattr(data, f"{name}_dataloader"), list(data.lengths(part))
        data.trainer = tiny.process(**{f"limit_{name}_batches": 1.0})
        assert [lengths[place] for place in loader().sampler] == sorted(lengths, reverse=True) != lengths
        for limit in (1, 0.3):
            data.trainer = tiny.process(**{f"limit_{name}_batches": limit})
            assert list(loader().sampler) == list(range(23))


def test_predictions_are_in_the_order_of_the_data_also_of_rows_that_are_drawn(make):
    def numbers(stage):
        data = make(stage, test_split="test", test_size=9)
        assert len(list(data.predict_dataloader())) == 3
        texts = [str(getattr(getattr(row, "example", row), "prompt", row)) for row in data.test]
        if isinstance(data.test[0], dict):
            texts = [data.tokenizer.decode(row["input_ids"]) for row in data.test]
        return [int(re.search(r"(?:number|Who is) (\d+)", text)[1]) for text in texts]

    drawn = numbers("test")
    assert numbers("predict") == sorted(drawn) != drawn


def test_batches_of_like_length_have_less_padding_and_come_by_chance():
    lengths = torch.randint(1, 300, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(EpochSampler(lengths, 3, lengths=lengths, batch_size=8))
    assert sorted(order) == list(range(1003))
    batches = [[lengths[row] for row in order[start : start + 8]] for start in range(0, 1003, 8)]
    assert sum(lengths) > 0.9 * sum(len(batch) * max(batch) for batch in batches)
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest, reverse=True)


# ---------------------------------------------------------------------- prompts and options as tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # with a beginning of sentence, which stays, and without
def test_a_long_prompt_loses_its_beginning_and_leaves_room_for_an_answer_in_training_too(architecture):
    tokenizer = tiny.tokenizer(architecture)
    prompt, option = "The capital of the country is the largest town. " * 20 + "Answer:", " the town\n"
    requested, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + option))
    bos = [0] if architecture == "llama" else []
    written = Example(prompt, (option,), 0, references=("the town", "a town"))
    for example, is_learned, room in [(Example(prompt, (option,), 0), False, 80), (written, True, 30), (written, False, 30)]:
        short, cut = encode_examples(tokenizer, [Example("It", ("x",), 0), example], 80, is_learned=is_learned)
        assert (short.n_lost, cut.n_lost) == (0, len(whole) - room)
        assert cut.prefixes[0] + cut.option_ids[0][-1:] == bos + whole[len(whole) - room + len(bos) :]
        assert cut.option_ids[0] == whole[len(requested) :]
        is_asked = room == 30 and not is_learned
        assert cut.prompt_ids == (bos + requested[len(requested) - 30 + len(bos) :] if is_asked else [])
        assert short.prefixes[0] + short.option_ids[0][-1:] == tokenizer("Itx")["input_ids"]
    n_option = len(whole) - len(requested)
    (cut,) = encode_examples(tokenizer, [written], 50 + n_option, is_learned=True)  # the answer loses its end
    n_kept = n_option - max(2, n_option // 4)
    assert cut.option_ids == [whole[len(requested) : len(requested) + n_kept]]
    assert len(cut) < n_option
    (reason,) = encode_examples(tokenizer, [written], 50 + n_option, is_learned=True, too_long="skip")
    assert str(reason) == "longer than data.max_length"


def test_no_option_is_cut_and_each_adds_tokens_of_its_own():
    tokenizer = tiny.tokenizer()
    example = Example("It was", (" great", " one of the largest and oldest of all towns"), 0, "train, row 2")
    n_option = max(len(ids) for ids in encode_examples(tokenizer, [example], 500)[0].option_ids)
    assert len(encode_examples(tokenizer, [example], n_option + 1)[0]) == n_option
    for own, requested, length, expected in [
        (tokenizer, example, n_option, "an option is longer than data.max_length"),
        (tokenizer, Example("It was", ("", " great"), 0), 500, "the prompt, or an option, adds no tokens"),
        (tokenizer, Example("It was", ("Yes", "Yes "), 0), 500, "two options are equal, or differ only in spaces"),
        (tiny.tokenizer("gpt2"), Example("", ("Yes", "No"), 0), 500, "the prompt, or an option, adds no tokens"),
    ]:
        (reason,) = encode_examples(own, [requested], length)
        assert str(reason) == expected


@pytest.mark.parametrize("end", ["eos_token", "sep_token"])  # BERT's tokenizer has no end of text, and ends with [SEP]
def test_an_end_of_text_that_a_tokenizer_adds_is_no_part_of_an_option(end):
    example = Example("It was", (" great", " one of the largest"), 0)
    plain, ending = tiny.tokenizer(), tiny.tokenizer(eos=True, end=end)
    assert ending("It was")["input_ids"] == [*plain("It was")["input_ids"], 1]
    assert encode_examples(ending, [example], 500) == encode_examples(plain, [example], 500)
    for text in ("It was", "It was</s>"):  # what the text itself says stays, once
        assert encode_texts(ending, [text], 8)[0][0]["input_ids"] == [*plain("It was")["input_ids"], 1]
    assert end_tokens(None, ending) == [1]
    endless = tiny.tokenizer(end="sep_token")
    assert encode_texts(endless, ["It was"], 8)[0][0]["input_ids"] == endless("It was")["input_ids"]
    assert end_tokens(None, endless) == []


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


def test_train_and_validation_are_drawn_together_from_train_and_test_from_validation(tmp_path):
    rows = [{"sentence": f"film number {k} ", "label": k % 2} for k in range(40)]
    sst2 = tiny.write_rows(tmp_path, rows, ["train"])
    tiny.write_rows(tmp_path, rows[:10], ["validation"])

    def parts(**sizes):
        sizes = {"train_size": 25, "val_size": 12, "test_size": 9} | sizes
        data = attach(PromptDataModule("SST2", sst2, **sizes), "fit", "test")
        return [prompts_of(part) for part in (data.train, data.val, data.test)]

    train, val, test = parts()
    assert [len(train), len(val), len(test), len({*train, *val})] == [25, 12, 9, 37]
    assert parts()[0] == train != parts(split_seed=1)[0]
    assert parts(val_size=5)[0] == train  # validation comes last
    assert set(test) <= {f"film number {k} It was" for k in range(10)}
    with pytest.raises(UserError, match=r"train_size \+ data.val_size, of .*: 42 rows are needed, but there are only 40"):
        parts(train_size=30)


def test_without_a_source_the_task_is_read_from_the_folder_of_the_environment_or_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("COLA_DATA_DIR", str(tmp_path))
    assert PromptDataModule("sst2").source == str(tmp_path / "sst2")
    monkeypatch.delenv("COLA_DATA_DIR")
    data = attach(PromptDataModule("sst2"))
    assert (data.source, data.subset, data.train_size) == ("nyu-mll/glue", "sst2", 1000)
    assert data.max_length == 64  # the model's own limit
    data.tokenizer.model_max_length = 10**30
    assert data.max_length == 2048


# ---------------------------------------------------------------------- unusable rows

RECORD = {"query": "@placeholder left", "entities": ["Di", "Al"], "answers": ["Al"]}
UNUSABLE = [{"entities": ["Al", "Al"]}, {"query": "@placeholder left " * 40}, {"query": None}, {"answers": ["Bo"]}]


@pytest.mark.parametrize("change", UNUSABLE)
def test_a_drawn_row_that_cannot_be_used_is_skipped_and_counted_and_another_is_not_judged(tmp_path, caplog, change):
    caplog.set_level("INFO", "cola_lightning")
    rows = [RECORD | {"passage": f"Al met Di {k} times."} for k in range(200)]
    tiny.write_rows(tmp_path, rows[:1], ["validation"])

    def drawn():
        source = tiny.write_rows(tmp_path, rows, ["train"])
        data = attach(PromptDataModule("ReCoRD", source, train_size=100, val_size=50), "fit")
        return data, [[int(prompt.split()[3]) for prompt in prompts_of(part)] for part in (data.train, data.val)]

    _, (train, val) = drawn()
    unusable = {train[5], *val[3:6]}  # of validation more than data.max_skipped, but not of all
    for k in {*range(200)} - {*train, *val} | unusable:
        rows[k] |= change
    caplog.clear()
    data, found = drawn()
    assert found == [[k for k in part if k not in unusable] for part in (train, val)]
    log_lines = [line for line in caplog.messages if " skipped (" in line]
    assert [line.partition(" skipped")[0] for line in log_lines] == ["validation: 50 rows: 3", "training: 100 rows: 1"]
    assert all("train, row " in line for line in log_lines)
    data.max_skipped = 0.026
    with pytest.raises(UserError, match=r"4 of 150 rows cannot be used, more than data.max_skipped 0.026 allows"):
        data.setup("fit")


UNLABELLED = [
    ("SST2", {"sentence": "a film"}, {"label": 1}),
    ("BoolQ", {"passage": "Tea.", "question": "is it"}, {"answer": None}),
    ("ReCoRD", {"passage": "Al.", "query": "@placeholder left", "entities": ["Di", "Al"]}, {"answers": ["Al"]}),
    ("SQuAD", {"title": "T", "context": "C", "question": "Q"}, {"answers": {"text": ["A"]}}),
]


@pytest.mark.parametrize(("name", "row", "target"), UNLABELLED)
def test_rows_without_a_label_or_an_answer_are_predicted_and_nothing_else(tmp_path, name, row, target):
    source = tiny.write_rows(tmp_path, [row] * 20, ["train"])
    tiny.write_rows(tmp_path, [row | ({} if None in target.values() else target), row, row], ["validation"])
    data = attach(PromptDataModule(name, source, test_size=3, train_size=9, val_size=2))
    field = rf"field '({next(iter(target))}|label)'"
    for stage, place in (("fit", "train"), ("validate", "train"), ("test", "validation")):
        with pytest.raises(UserError, match=rf"{field} is null.*{place}, row \d+|{place}, row \d+.*: .*{field}"):
            data.setup(stage)
    for place, n_rows in ((source, 3), (f"{source}/train.jsonl", 20)):  # of a file, all rows
        data = attach(PromptDataModule(name, place, test_size=3), "predict")
        assert [row.example.answer for row in data.test].count(None) in (n_rows - 1, n_rows)
        assert list(data.collate(data.test)["prompt"]) == prompts_of(data.test)


def test_labelled_texts_are_cut_on_the_right_whatever_the_tokenizers_side_and_none_is_empty(tmp_path):
    rows = [{"premise": "It was old." * (k + 1), "hypothesis": "It was.", "label": k % 2} for k in range(4)]
    source, texts = tiny.write_rows(tmp_path, rows), [[row[name] for row in rows] for name in ("premise", "hypothesis")]
    data = attach(TextClassificationDataModule(source, max_length=12))
    data.tokenizer.truncation_side = "left"
    data.setup("test")
    assert data.tokenizer.truncation_side == "left"
    cut = tiny.tokenizer()(*texts, truncation=True, max_length=12)["input_ids"]
    assert [row["input_ids"] for row in data.test] == cut
    for arguments in ({"text_fields": "sentence"}, {"label_field": "gold"}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(arguments))}: .* the columns premise, hypothesis, label"):
            attach(TextClassificationDataModule(source, **arguments), "fit")
    empty = TextClassificationDataModule(tiny.write_rows(tmp_path, [{"sentence": "", "label": 0}]))
    with pytest.raises(UserError, match=r"no text: .*, row 0"):
        attach(empty, "test", architecture="gpt2")
