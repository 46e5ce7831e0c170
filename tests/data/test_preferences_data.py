"""Preference pairs: what their columns mean, their tokens and batches, and rows that people really have."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from cola_lightning import PreferenceDataModule, TextDataModule, UserError
from cola_lightning.chat_template import ChatTemplate, Conversation, PreferencePair
from cola_lightning.data.batch import labels_of
from cola_lightning.data.columns import find_pairs
from cola_lightning.data.render import TurnEncoder
from tests.helpers import tiny

FILES = Path(__file__).parents[1] / "fixtures" / "rows_of_pairs"
TEMPLATES = sorted(Path(os.environ.get("COLA_DATA_DIR", "none"), "chat_templates").glob("*.jinja"))
REWRITING = tiny.CHAT.replace(  # as templates that drop the thoughts of earlier turns
    "{{ eos_token }}", "{% if not loop.last and turn['role'] == 'assistant' %} (earlier){% endif %}{{ eos_token }}"
)
THINKING = (  # as Qwen3: the mode without thoughts opens and closes one
    tiny.CHAT[: -len("{% endif %}")]
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n</think>\n{% endif %}{% endif %}"
)


USER, ASSISTANT = {"role": "user", "content": "Old?"}, {"role": "assistant", "content": "No."}


def chat_text(*contents, system=None):
    """Turns in the tests' chat template, the user's first, with the generation prompt where the user has the last one."""
    turns = [("system", system)] * bool(system) + [(("user", "assistant")[k % 2], text) for k, text in enumerate(contents)]
    opened = "[assistant]\n" * (len(contents) % 2)
    return "<s>" + "".join(f"[{role}]\n{text}</s>\n" for role, text in turns) + opened


# Of each file: the prompt and both responses of the rows that are used, and why others are skipped.
EQUAL, EMPTY, DIFFERENT = "the two responses are equal", "no response", "the prompts of the two responses differ"
NO_PROMPT = "no prompt: neither in a column (data.columns) nor a text that begins with 'Human:'"
EXPECTED = {
    "trl": (
        [(chat_text("Is the bridge open?"), "Yes, until six.", "Who knows.")] * 2,
        {EQUAL: 1, EMPTY: 1, "the field 'chosen' is null, not text": 1},
    ),
    "trl_turns": (
        [
            (chat_text("Is the town old?", system="Be kind."), "Yes, very.", "So what?"),
            (chat_text("Old?", "No.", "New?"), "Yes.", "No idea."),
        ],
        {EQUAL: 1, EMPTY: 1},
    ),
    "ultrafeedback": (
        [
            (chat_text("Name a fish."), "A trout.", "A cow."),
            (chat_text("Name a bird.", "A crow.", "And one more."), "A wren.", "No."),
            (chat_text("Sing."), "La.</s>La la.", "No.</s>Never."),
        ],
        {EQUAL: 1, DIFFERENT: 1},
    ),
    "hh_rlhf": (
        [
            (chat_text("Is it cold?"), "A little.", "Go outside."),
            (chat_text("Hello", "Hi!", "Is it late?\n\nIt is dark."), "It is nine.", "Sleep."),
        ],
        {EMPTY: 1, DIFFERENT: 1, NO_PROMPT: 1},
    ),
    "llama_factory": (
        [
            (chat_text("Two plus two?", "Four.", "Times two?"), "Eight.", "Nine."),
            (chat_text("Three plus one?", system="Count."), "Four.", "Five, I think."),
        ],
        {EQUAL: 1, EMPTY: 1},
    ),
    "llama_factory_instructions": (
        [
            (chat_text("Translate to French.\n\nGood day"), "Bonjour", "Guten Tag"),
            (chat_text("Say a colour."), "Green.", "Loud."),
        ],
        {EMPTY: 1},
    ),
    "orca": (
        [
            (chat_text("Is milk white?", system="You are brief."), "Yes.", "Milk is a liquid that one may call white, or not."),
            (chat_text("Is snow white?"), "Yes.", "No."),
        ],
        {EQUAL: 1},
    ),
}


def set_up(source, own, *stages, **arguments):
    """A data module of pairs whose tests are all rows of a file or folder, or of a list of rows."""
    return tiny.set_up(PreferenceDataModule(str(source), **{"max_skipped": 1.0} | arguments), own, *stages)


def encoded(rows, folder, own, stage="test", **arguments):
    data = set_up(tiny.write_rows(folder, rows), own, stage, **arguments)
    return list(data.train if stage == "fit" else data.test), data


class Side(NamedTuple):
    """One of the two responses: all tokens, those with a loss, and those before them."""

    ids: list[int]
    learned: list[int]
    prompt: list[int]


def sides(data, rows):
    """Of each pair, both responses in the batch."""
    batch = data.collate(rows)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    found = []
    for ids, mask, labels in zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        n_padded = int((mask == 0).sum())
        assert not mask[:n_padded].any()
        first = int((labels != -100).nonzero()[0])
        found.append(Side(ids[n_padded:].tolist(), labels[labels != -100].tolist(), ids[n_padded:first].tolist()))
    assert batch["input_ids"].shape == (2 * len(rows), max(len(side.ids) for side in found))
    return [*zip(found[: len(rows)], found[len(rows) :], strict=True)]


@pytest.mark.parametrize("name", EXPECTED)
def test_pairs_of_each_format_are_found_by_their_columns(tmp_path, name):
    expected, reasons = EXPECTED[name]
    own = tiny.chat_tokenizer(tiny.CHAT)
    rows, data = encoded(tiny.read_rows(FILES / f"{name}.jsonl"), tmp_path, own)
    assert {reason: n for reason, (n, _) in data._report.skipped.items()} == reasons
    assert len(rows) == len(expected)
    for pair, (prompt, *responses) in zip(sides(data, rows), expected, strict=True):
        for side, response in zip(pair, responses, strict=True):
            assert own.decode(side.prompt) == prompt
            assert own.decode(side.learned) == f"{response}</s>"
    assert data._report.n_trained == sum(len(side.learned) for pair in sides(data, rows) for side in pair)
    requested, data = encoded(tiny.read_rows(FILES / f"{name}.jsonl")[:1], tmp_path / "asked", own, "predict")
    batch = data.collate(requested)
    assert own.decode(batch["prompt_ids"][0]) == expected[0][0]
    assert batch["target"] == [expected[0][1]]
    assert {*batch} == {"prompt_ids", "prompt_mask", "prompt", "target", "decoding", "end_tokens"}


def test_without_a_chat_template_a_response_follows_its_prompt_as_text(tmp_path):
    own = tiny.chat_tokenizer(None)
    for name, prompt, chosen in [
        ("trl", "Is the bridge open?", "Yes, until six."),
        ("llama_factory_instructions", "Translate to French.\n\nGood day", "Bonjour"),
        ("orca", "You are brief.\n\nIs milk white?", "Yes."),
        ("hh_rlhf", "\n\nHuman: Is it cold?\n\nAssistant:", " A little."),
    ]:
        source = tiny.read_rows(FILES / f"{name}.jsonl")
        rows, data = encoded(source, tmp_path / name, own)
        assert len(rows) == len(EXPECTED[name][0])
        assert data.prompt_format == {"kind": "response", "chat_template": False}
        side, _ = sides(data, rows[:1])[0]
        assert (own.decode(side.prompt), own.decode(side.learned)) == (f"<s>{prompt}", f"{chosen}</s>")
        requested, _ = encoded(source[:1], tmp_path / "asked", own, "predict")
        assert (own.decode(requested[0].prompt_ids), requested[0].target) == (f"<s>{prompt}", chosen.strip())


@pytest.mark.parametrize("chat", [tiny.CHAT, None])
def test_a_response_has_the_tokens_that_supervised_training_gives_it(tmp_path, chat):
    own = tiny.chat_tokenizer(chat)
    rows, data = encoded(tiny.read_rows(FILES / "orca.jsonl")[:1], tmp_path, own)
    for side, pair in zip(("chosen", "rejected"), sides(data, rows)[0], strict=True):
        columns = {"prompt": "question", "system": "system", "response": side}
        (row,) = tiny.set_up(TextDataModule(data.source, columns=columns, loss="last"), own, "test").test
        assert pair[:2] == (row["input_ids"], [label for label in labels_of(row) if label != -100])


def test_a_batch_has_the_chosen_responses_and_then_the_rejected_ones_and_counts_pairs(tmp_path):
    own = tiny.chat_tokenizer(tiny.CHAT)
    source = [{"prompt": f"Is it {k}?", "chosen": f"Yes {k}." * k, "rejected": f"No {k}."} for k in range(1, 8)]
    _, data = encoded(source, tmp_path, own, "fit", batch_size=3)
    batches = [*data.train_dataloader()]
    assert sorted(len(batch["input_ids"]) for batch in batches) == [2, 6, 6]
    for batch in batches:
        n = len(batch["input_ids"]) // 2
        texts = [own.decode(row[row != -100]) for row in batch["labels"]]
        numbers = [re.findall(r"\d", text)[0] for text in texts]
        assert numbers[:n] == numbers[n:]
        assert all(text.startswith("Yes") for text in texts[:n])
        assert all(text.startswith("No") for text in texts[n:])
        assert (batch["attention_mask"][:, -1] == 1).all()  # padded on the left


@pytest.mark.parametrize("chat", [tiny.CHAT, None])
def test_both_responses_keep_the_same_shortened_prompt_and_then_lose_their_ends(tmp_path, chat):
    own, long = tiny.chat_tokenizer(chat), "The capital of the country is the largest town. "
    end = own.eos_token_id
    for n_prompt, n_chosen, n_rejected in [(40, 0, 1), (1, 0, 40), (40, 20, 30), (40, 30, 0), (1, 0, 0)]:
        row = {"system": "Be kind.", "question": long * n_prompt}
        row |= {"chosen": "Yes. " + long * n_chosen, "rejected": "No. " + long * n_rejected}
        ((stored,), data) = encoded([row], tmp_path, own, max_length=160)
        pair = sides(data, [stored])[0]
        assert pair[0].prompt == pair[1].prompt
        assert "Be kind." in own.decode(pair[0].prompt)
        assert 150 < max(len(side.ids) for side in pair) <= 160 or n_prompt == 1
        for side, first in zip(pair, ("Yes. ", "No. "), strict=True):
            assert own.decode(side.learned).lstrip().startswith(first)
        assert [side.learned[-1] == end for side in pair] == [n_chosen < 20, n_rejected < 20]
        if n_prompt > 1 and max(n_chosen, n_rejected) > 20:  # the prompt has become short before a response loses its end
            assert len(pair[0].prompt) <= 40
    with pytest.raises(UserError, match=r"longer than data\.max_length"):
        encoded([row], tmp_path / "skip", own, max_length=20, too_long="skip")
    row |= {"chosen": f"{long * 40}Yes.", "rejected": f"{long * 40}No."}
    used, data = encoded([row, {"question": "A", "chosen": "b", "rejected": "c"}], tmp_path, own, max_length=160)
    assert len(used) == 1
    assert [*data._report.skipped] == ["the two responses are equal up to data.max_length"]


@pytest.mark.parametrize("prompt", ["Old?", [USER]])
def test_turns_that_are_stored_as_text_are_skipped_and_told(tmp_path, prompt):
    texts = {"chosen": json.dumps([ASSISTANT]), "rejected": json.dumps([ASSISTANT | {"content": "Yes."}])}
    pairs = [{"prompt": prompt, "chosen": "No.", "rejected": "Yes."}, {"prompt": prompt, **texts}]
    rows, data = encoded(pairs, tmp_path, tiny.chat_tokenizer(tiny.CHAT))
    assert len(rows) == 1
    assert [*data._report.skipped] == ["turns stored as text, not as a list"]


@pytest.mark.skipif(not TEMPLATES, reason="needs COLA_DATA_DIR with chat_templates")
def test_in_the_templates_of_well_known_models_a_response_has_the_tokens_of_supervised_training_and_the_prompt_is_one():
    assert len(TEMPLATES) == 25
    answers = ([{"role": "assistant", "content": text}] for text in ("Because. It is.", "It is not. " * 20))
    pair = PreferencePair(Conversation([USER, ASSISTANT, {"role": "user", "content": "Why? " * 400}]), *answers)
    for path in TEMPLATES:
        own = tiny.chat_tokenizer(path.read_text(), "<|im_end|>", "<|im_start|>", "<|end|>", "<|return|>", "<|eot_id|>")
        template = ChatTemplate(own)
        encoders = [TurnEncoder(template, n, set(), shortens_response=True) for n in (8000, 2000)]
        (whole,), (shortened,) = (encoder.preferences([pair]) for encoder in encoders)
        same = TurnEncoder(template, 8000, set()).conversations(pair.conversations())
        assert [[row] for row in whole] == same, path.stem
        starts = [row["spans"][0] for row in shortened]
        prompts = [row["input_ids"][:start] for row, start in zip(shortened, starts, strict=True)]
        assert prompts[0] == prompts[1], path.stem
        assert max(len(row["input_ids"]) for row in shortened) in range(1980, 2001), path.stem
        for long, short in zip(whole, shortened, strict=True):  # the prompt alone is shorter
            assert long["input_ids"][long["spans"][0] :] == short["input_ids"][short["spans"][0] :], path.stem


def test_a_response_of_several_turns_that_the_template_rewrites_is_skipped(tmp_path):
    own = tiny.chat_tokenizer(REWRITING)
    rows, data = encoded(tiny.read_rows(FILES / "ultrafeedback.jsonl"), tmp_path, own)
    assert len(rows) == 2
    assert data._report.skipped["a response of several turns, of which the chat template rewrites earlier ones"][0] == 1


@pytest.mark.parametrize("max_length", [8000, 80])
def test_such_a_response_is_skipped_also_if_its_prompt_is_shortened(max_length):
    thought = ASSISTANT | {"content": "<think>Hm.</think>No."}
    pair = PreferencePair(Conversation([USER | {"content": "Why? " * 100}]), [thought, USER, ASSISTANT], [ASSISTANT])
    encoder = TurnEncoder(ChatTemplate(tiny.chat_tokenizer(REWRITING)), max_length, set(), shortens_response=True)
    (reason,) = encoder.preferences([pair])
    assert "of which the chat template rewrites" in str(reason)


def test_where_a_template_opens_a_thought_for_one_response_alone_both_follow_the_same_prompt(tmp_path):
    own = tiny.chat_tokenizer(THINKING)
    row = {"prompt": "Old?", "chosen": "<think>\nHm.</think>\nYes.", "rejected": "<think>\n</think>\nNo."}
    ((stored,), data) = encoded([row], tmp_path, own)
    chosen, rejected = sides(data, [stored])[0]
    assert own.decode(chosen.learned).endswith("Hm.</think>\nYes.</s>")
    assert own.decode(rejected.learned).endswith("</think>\nNo.</s>")
    assert chosen.prompt == rejected.prompt


def test_prompts_alone_are_predicted(tmp_path):
    own = tiny.chat_tokenizer(tiny.CHAT)
    for row, target in [
        ({"prompt": "Old?"}, None),
        ({"prompt": "Old?", "chosen": "No.", "rejected": "Yes."}, "No."),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": "Yes."}]}, "No."),
        ({"chosen": "\n\nHuman: Old?\n\nAssistant: No.", "rejected": "\n\nHuman: Old?\n\nAssistant: Yes."}, "No."),
    ]:
        requested, _ = encoded([row], tmp_path, own, "predict")
        assert (own.decode(requested[0].prompt_ids), requested[0].target) == (chat_text("Old?"), target)


def test_columns_can_be_named_and_are_listed_where_there_are_no_pairs(tmp_path):
    own, columns = tiny.chat_tokenizer(tiny.CHAT), {"prompt": "ask", "chosen": "a", "rejected": "b"}
    rows, data = encoded([{"ask": "Old?", "a": "Yes.", "b": "No."}], tmp_path, own, columns=columns)
    assert own.decode(sides(data, rows)[0][0].prompt) == chat_text("Old?")
    names = ["ask", "a", "b", "prompt", "chosen", "rejected"]
    assert find_pairs(names, [], columns).columns == columns
    assert find_pairs(names, [], None).columns == {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    for wrong, message in [
        ({"prompt": "ask"}, "name chosen and rejected"),
        (columns | {"prompt": "no"}, "the data has no column 'no'"),
        (columns | {"response": "a"}, "'response' is not one of prompt, input, chosen"),
    ]:
        with pytest.raises(UserError, match=rf"^data\.columns: {message}"):
            find_pairs(names, [], wrong)
    with pytest.raises(UserError, match="found no preference pairs among the columns prompt, response"):
        find_pairs(["prompt", "response"], [], None)


def test_pairs_for_supervised_training_get_one_line_whose_option_works(tmp_path):
    own = tiny.chat_tokenizer(tiny.CHAT)
    for name, option in [
        ("trl", "{prompt: prompt, response: chosen}"),
        ("trl_turns", "{prompt: prompt, response: chosen}"),
        ("llama_factory", "{prompt: conversations, response: chosen}"),
        ("llama_factory_instructions", "{prompt: instruction, input: input, response: chosen}"),
        ("orca", "{prompt: question, system: system, response: chosen}"),
        ("ultrafeedback", "{messages: chosen}"),
        ("hh_rlhf", "{text: chosen}"),
    ]:
        folder = tiny.write_rows(tmp_path / name, tiny.read_rows(FILES / f"{name}.jsonl"))
        with pytest.raises(UserError, match=r"found no .* COLAPreferenceLM with PreferenceDataModule") as caught:
            tiny.set_up(TextDataModule(folder), own, "test")
        assert "--data.columns '{" in str(caught.value)
        data = TextDataModule(folder, columns=yaml.safe_load(option), loss="last", max_skipped=1.0)
        row, answer = tiny.set_up(data, own, "test").test[0], EXPECTED[name][0][0][1]
        learned = own.decode([label for label in labels_of(row) if label != -100])
        assert learned == f"{answer}</s>" or (name == "hh_rlhf" and learned.endswith(f"{answer}</s>"))


@pytest.mark.parametrize("row", [{"prompt": "Old?", "completion": "Yes."}, {"prompt": [USER], "completion": [ASSISTANT]}])
def test_unpaired_labels_are_refused_until_columns_are_named(tmp_path, row):
    own, columns = tiny.chat_tokenizer(tiny.CHAT), {"prompt": "prompt", "response": "completion"}
    folder = tiny.write_rows(tmp_path, [row | {"label": False}] * 4)
    with pytest.raises(UserError, match=r"^data\.columns: label says .*KTO.*prompt -> completion"):
        tiny.set_up(TextDataModule(folder), own, "fit")
    assert len(tiny.set_up(TextDataModule(folder, columns=columns), own, "fit").train) == 4
    assert len(tiny.set_up(TextDataModule(folder), own, "predict").test) == 4
    labelled = tiny.write_rows(tmp_path / "class", [row | {"label": 1}] * 4)  # not true or false: a class
    assert len(tiny.set_up(TextDataModule(labelled), own, "fit").train) == 4


def test_unpaired_labels_of_a_csv_file_are_refused_too(tmp_path):
    rows = [{"prompt": "Old?", "completion": "Yes.", "label": k % 2 == 0} for k in range(4)]
    for name, some in (("some", [*rows, rows[0] | {"label": ""}]), ("bad", rows[1::2])):
        data = TextDataModule(tiny.write_file(tmp_path / f"{name}.csv", some))
        with pytest.raises(UserError, match=r"^data\.columns: label says .*KTO"):
            tiny.set_up(data, tiny.tokenizer(pad=True), "fit")
    classes = TextDataModule(tiny.write_file(tmp_path / "classes.csv", [row | {"label": "x"} for row in rows]))
    assert len(tiny.set_up(classes, tiny.tokenizer(pad=True), "fit").train) == 3


def test_a_module_that_would_train_on_rejected_responses_refuses_pairs(tmp_path):
    data = PreferenceDataModule(tiny.write_rows(tmp_path, [{"prompt": "Old?", "chosen": "No.", "rejected": "Yes."}]))
    data.trainer = tiny.process(module=tiny.stub(tiny.chat_tokenizer(None)))
    data.setup("predict")
    with pytest.raises(UserError, match=r"rejected responses.* COLAPreferenceLM"):
        data.setup("fit")
