"""A task without code: what becomes of a row, and the runs that it is fitted, tested and predicted in."""

import contextlib
import re

import datasets
import pytest

from cola_lightning import TemplateDataModule, UserError
from tests.helpers import tiny


def examples(rows, folder, own=None, stage="test", **arguments):
    """The rows as the data module encodes them, and the data module."""
    data = TemplateDataModule(tiny.write_rows(folder, rows), **arguments)
    tiny.set_up(data, own or tiny.chat_tokenizer(None), stage)
    return data.train if stage == "fit" else data.test, data


ROW = {"text": "It was {old}.", "size": 3, "share": 0.5, "label": 1, "by": {"name": "Al", "town": {"name": "Oslo"}}}
ROW |= {"all": ["red", "blue"], "answers": {"text": ["blue", "navy"]}, "gold": "blue", "empty": ""}
ROW |= {"q.text": "Who?", "a": {"c.d": "Di"}}
FIXED = {"options": [" no", " yes"]}

MADE = [
    ({"prompt": "{text} Is it?", **FIXED}, "It was {old}. Is it?", (" no", " yes"), 1, ()),
    ({"prompt": "Is it?", "options": [" red", " blue "], "label": "gold"}, "Is it?", (" red", " blue "), 1, ()),
    ({"prompt": "Is it?\n", "options": "all", "label": "gold"}, "Is it?\n", ("red", "blue"), 1, ()),
    ({"prompt": "Is it?", "options": ["no", " yes"]}, "Is it?", (" no", " yes"), 1, ()),
    ({"prompt": "Is it?", "options": "all", "label": "gold", "delimiter": ""}, "Is it?", ("red", "blue"), 1, ()),
    ({"prompt": "Is it?", "options": "all", "label": "gold", "delimiter": ": "}, "Is it?", (": red", ": blue"), 1, ()),
    ({"prompt": "Which?", "answer": "gold", "delimiter": "\n"}, "Which?", ("\nblue\n",), 0, ("blue",)),
    ({"prompt": "Is it?", "options": [" {by.name}", " {gold} {{}}"]}, "Is it?", (" Al", " blue {}"), 1, ()),
    ({"prompt": "{q.text} {a.c.d}", **FIXED}, "Who? Di", (" no", " yes"), 1, ()),
    ({"prompt": "Is it?", "options": "answers.text"}, "Is it?", (" blue", " navy"), 1, ()),
    ({"prompt": "{by.town.name}, {{{size}}} {share}{empty}:", **FIXED}, "Oslo, {3} 0.5:", (" no", " yes"), 1, ()),
    ({"prompt": "Which?", "answer": "gold"}, "Which?", (" blue\n",), 0, ("blue",)),
    ({"prompt": "Which?", "answer": "answers.text"}, "Which?", (" blue\n",), 0, ("blue", "navy")),
    ({"prompt": "Which?", "answer": "empty"}, "Which?", (" \n",), 0, ("",)),
]


@pytest.mark.parametrize(("arguments", "prompt", "options", "answer", "references"), MADE)
def test_a_row_becomes_a_prompt_with_options_or_an_answer(tmp_path, arguments, prompt, options, answer, references):
    (row,), data = examples([ROW], tmp_path, **arguments)
    made = row.example
    assert (made.prompt, made.options, made.answer, made.references) == (prompt, options, answer, references)
    assert data.loss == data.collate([row])["loss"] == ("answer" if references else "options")


# Labels, and the places of the options that they mean; None: they are refused.
LABELS = [
    (0, [" 1", " 2"], 0),
    (True, [" no", " yes"], 1),
    (1.0, [" no", " yes"], 1),  # a column of pandas with missing values
    ("2", [" 1", " 2", " 3"], 1),
    ("2", [" no", " maybe", " yes"], 2),
    (3, [" 0", " 1", " 2", " 3"], 3),  # the index of its text
    (2, [" 1", " 2", " 3"], None),
    (2.0, [" 1", " 2", " 3"], None),
    (True, [" True", " False"], None),
    ("0", [" 1", " 2"], None),  # in a CSV file
    (-1, [" -1", " 0", " 1"], 0),  # which elsewhere is no label
]
MEANS_TWO = r"the label .* write it as text: .*row 0|the field 'label' is .*, not one of.*row 0"


@pytest.mark.parametrize(("label", "options", "place"), LABELS)
def test_a_number_is_an_index_unless_it_is_the_text_of_another_option(tmp_path, label, options, place):
    """A CSV file, whose values are text, would else mean another option."""
    with pytest.raises(UserError, match=MEANS_TWO) if place is None else contextlib.nullcontext():
        ((row,), _) = examples([{"label": label}], tmp_path, prompt="Is it?", options=options)
        assert row.example.answer == place


def test_a_class_index_is_an_index_whatever_the_options(tmp_path):
    kind = datasets.ClassLabel(names=["1 star", "2 stars", "3 stars"])
    rows = datasets.Dataset.from_list([{"label": k % 3} for k in range(3)])
    rows.cast_column("label", kind).to_parquet(tmp_path / "own.parquet")
    made, _ = examples([{"label": 0}], tmp_path, prompt="Is it?", options=[" 1", " 2", " 3"], test_split="own")
    assert [row.example.answer for row in made] == [0, 1, 2]


def test_the_loss_of_an_answer_needs_the_right_option_alone_in_training(tmp_path):
    for requested, trained, validated in [
        ({"loss": "answer", **FIXED}, (" yes",), (" no", " yes")),
        ({"loss": "options", **FIXED}, (" no", " yes"), (" no", " yes")),
        ({"answer": "gold"}, (" blue\n",), (" blue\n",)),
    ]:
        (row,), data = examples([ROW], tmp_path, stage="fit", prompt="Is it?", **requested)
        assert (row.example.options, data.val[0].example.options) == (trained, validated)
        assert data.collate([row])["loss"] == requested.get("loss", "answer")


def test_a_chat_template_is_around_the_prompt_and_the_option_is_what_the_assistant_says(tmp_path):
    own = tiny.chat_tokenizer(tiny.CHAT)
    requested = {"apply_chat_template": True, "max_length": 80}
    ((row,), _) = examples([ROW], tmp_path, own, prompt="{text} Is it?", options=["no", "yes it is"], **requested)
    before = "<s>[user]\nIt was {old}. Is it?</s>\n[assistant]\n"
    n_before = len(own(before, add_special_tokens=False)["input_ids"])
    prefixes = [row.prefixes[place] for place in row.prefix_of]
    for option, prefix, ids in zip(row.example.options, prefixes, row.option_ids, strict=True):
        whole = own(before + option, add_special_tokens=False)["input_ids"]
        assert (prefix, ids) == (whole[:-1], whole[n_before:])
    assert row.example.prompt == "It was {old}. Is it?"
    ((row,), _) = examples([ROW], tmp_path, own, prompt="Which?", answer="gold", **requested)
    assert own.decode(row.prompt_ids) == "<s>[user]\nWhich?</s>\n[assistant]\n"
    assert own.decode(row.prefixes[0] + row.option_ids[0][-1:]) == "<s>[user]\nWhich?</s>\n[assistant]\nblue\n"
    long = {"text": "The river is long. " * 50, "label": 0}
    ((row,), _) = examples([long], tmp_path, own, prompt="{text}Is it?", options=["a", "b"], **requested)
    assert 70 < len(row) < 80
    assert re.fullmatch(r"<s>\[user\]\n.*long\. Is it\?</s>\n\[assistant\]\n", own.decode(row.prefixes[0]), re.DOTALL)
