"""Texts, instructions and conversations: what a row is follows from its columns, and it is asked as it was learned."""

import json

import pytest

from cola_lightning import TextDataModule, UserError
from cola_lightning.data.batch import labels_of
from cola_lightning.data.columns import find_columns
from tests.helpers import tiny

TURNS = [("system", "Be kind."), ("user", "Is it?"), ("assistant", "Yes."), ("user", "Old?"), ("assistant", "No.")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]

# Columns, those of them that hold lists, and what a row is.
FOUND = [
    ("prompt messages prompt_id", "messages", ("messages", {"messages": "messages"})),
    ("id conversations tools", "conversations", ("messages", {"messages": "conversations", "tools": "tools"})),
    ("prompt completion", "prompt completion", ("messages", {"prompt": "prompt", "completion": "completion"})),
    ("prompt completion", "", ("prompt", {"prompt": "prompt", "response": "completion"})),
    ("question answer system", "", ("prompt", {"prompt": "question", "response": "answer", "system": "system"})),
    ("instruction input output", "", ("prompt", {"prompt": "instruction", "input": "input", "response": "output"})),
    ("instruction context response", "", ("prompt", {"prompt": "instruction", "input": "context", "response": "response"})),
    ("system_prompt query response", "", ("prompt", {"prompt": "query", "response": "response", "system": "system_prompt"})),
    ("prompt question answer", "", ("prompt", {"prompt": "question", "response": "answer"})),
    ("text prompt", "", ("text", {"text": "text"})),  # a prompt alone is not trained on
]
# Columns that are refused, and why.
REFUSED = [
    ("messages conversations", "messages conversations", "two columns fit, messages and conversations"),
    ("question solution answer", "", "two columns fit, (answer and solution|solution and answer),"),
    ("prompt response question answer", "", "two columns fit, (response and answer|answer and response),"),
    ("instruction input response output", "", "two columns fit, (response and output|output and response),"),
    ("messages", "", "among the columns messages"),  # as JSON
    ("system chat", "", "among the columns system, chat"),  # glaive-function-calling-v2: a conversation as one text
    ("message_id parent_id text role", "", "among the columns message_id, parent_id, text"),  # oasst1: a row is a turn
    ("ask good bad", "", "among the columns ask, good, bad"),
]


def test_columns_are_found_by_what_people_call_them_or_are_listed():
    for names, lists, found in FOUND:
        reading = find_columns(names.split(), lists.split(), None)
        assert (reading.kind, reading.columns) == found
    for names, lists, message in REFUSED:
        with pytest.raises(UserError, match=rf"data\.columns: .*{message}.*--data\.columns '{{"):
            find_columns(names.split(), lists.split(), None)
    for rejected in ("rejected_response", "Rejected", "response_rejected", "worse"):
        for names in (["ask", "say", rejected], ["ask", rejected], [rejected, "say"]):
            with pytest.raises(UserError, match=r"^data\.columns: "):
                find_columns(names, [], None)


def test_columns_are_named_where_their_names_say_nothing():
    names, given = ["document", "summary"], {"prompt": "document", "response": "summary"}
    assert find_columns(names, [], given).columns == given
    prompt = {"prompt": "document"}  # is enough to be answered, and not to be trained on
    assert find_columns(names, [], prompt, has_response=False).columns == prompt
    assert find_columns(["prompt", "id"], [], None, has_response=False).columns == {"prompt": "prompt"}
    for wrong, message in [
        ({"prompt": "no"}, "the data has no column 'no'; its columns are document, summary"),
        ({"x": "summary"}, "'x' is not one of messages"),
        (prompt, "name messages, prompt and response"),
    ]:
        with pytest.raises(UserError, match=rf"data\.columns: .*{message}"):
            find_columns(names, [], wrong)


def encoded(rows, folder, own, stage="test", **arguments):
    """The rows as the data module encodes them, and the data module."""
    data = tiny.set_up(TextDataModule(tiny.write_rows(folder, rows), **arguments), own, stage)
    return list(data.train if stage == "fit" else data.test), data


def test_the_turns_of_a_prompt_have_no_loss(tmp_path):
    own, row = tiny.chat_tokenizer(tiny.CHAT), {"prompt": MESSAGES[1:4], "completion": MESSAGES[4:]}
    ((whole,), _) = encoded([row], tmp_path, own)
    assert own.decode([label for label in labels_of(whole) if label != -100]) == "No.</s>"
    ((requested,), _) = encoded([row], tmp_path, own, "predict")
    assert own.decode(whole["input_ids"]) == f"{own.decode(requested.prompt_ids)}No.</s>\n"
    assert requested.target == "No."


def test_a_text_becomes_several_rows_or_none_and_their_order_stays(tmp_path):
    texts, own = ["It was old. " * 40, "A", "A town.", "", " ", "\n\t \n", None, " a"], tiny.chat_tokenizer(None)
    rows, data = encoded([{"text": text} for text in texts], tmp_path, own, max_length=64, max_skipped=1.0)
    assert max(len(row["input_ids"]) for row in rows) == 64
    found = "".join(own.decode(row["input_ids"]) for row in rows)
    assert found == "".join(f"<s>{text}</s>" for text in texts if text and text.strip())
    assert data._report.skipped["no text"][0] == 3


ASKED = [("Is it old? ", "It is."), ("Is it old?", " It is."), ("2 + 2 = ", "4"), ("Old?\n", "No, נו 🏠"), ("A\n  ", "  b")]
PAIRS = [{"prompt": prompt, "response": response} for prompt, response in ASKED]
AS_TURNS = [
    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}
    for prompt, response in ASKED
]


@pytest.mark.parametrize("store", [json.dumps, repr])
def test_turns_that_are_stored_as_text_are_skipped_and_told_and_other_json_is_a_response(tmp_path, store):
    text, lists = store(MESSAGES[2:3]), ['[{"value": 3, "unit": "m"}]', '[{"content": "old"}]', "[1, 2]", '{"role": "admin"}']
    pairs = [("Old?", text), (text, "No."), *(("How old?", response) for response in lists)]
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    rows, data = encoded(rows, tmp_path, tiny.chat_tokenizer(tiny.CHAT), max_skipped=1.0)
    assert len(rows) == len(lists)
    assert [(reason, n) for reason, (n, _) in data._report.skipped.items()] == [("turns stored as text, not as a list", 2)]


@pytest.mark.parametrize("chat", [tiny.CHAT, None])
def test_a_prompt_with_marks_is_the_turns_that_it_marks(tmp_path, chat):
    prompt = "\n\nHuman: Is it old?\n\nAssistant: Yes.\n\nHuman: And red?\n\nAssistant:"
    (row,), data = encoded([{"prompt": prompt, "response": " No."}], tmp_path, tiny.chat_tokenizer(chat))
    text = data.tokenizer.decode(row["input_ids"])
    turns = "<s>[user]\nIs it old?</s>\n[assistant]\nYes.</s>\n[user]\nAnd red?</s>\n[assistant]\n"
    assert text == (f"{turns} No.</s>\n" if chat else f"<s>{prompt} No.</s>")
    assert data.tokenizer.decode([label for label in labels_of(row) if label != -100]).strip() == "No.</s>"


def test_instructions_are_in_the_chat_template_where_the_tokenizer_has_one(tmp_path, caplog):
    caplog.set_level("INFO", "cola_lightning")
    chat, plain = tiny.chat_tokenizer(tiny.CHAT), tiny.chat_tokenizer(None)
    turns, _ = encoded(AS_TURNS, tmp_path, chat, "fit")
    following, _ = encoded(PAIRS, tmp_path, plain, "fit")
    assert turns != following
    for own, requested, is_chat in [(chat, None, True), (chat, False, False), (plain, None, False)]:
        caplog.clear()
        rows, data = encoded(PAIRS, tmp_path, own, "fit", chat_template=requested)
        assert rows == (turns if is_chat else following)
        assert data.prompt_format == {"kind": "response", "chat_template": is_chat}
        assert len([line for line in caplog.messages if line.endswith("(data.chat_template)")]) == 1  # once, of both parts
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        encoded(PAIRS, tmp_path, plain, "fit", chat_template=True)
    with pytest.raises(UserError, match=r"data\.chat_template: conversations need a chat template"):
        encoded(AS_TURNS, tmp_path, chat, "fit", chat_template=False)
    _, data = encoded([{"text": "It is old."}] * 4, tmp_path, chat, "fit")
    assert data.prompt_format == {"kind": "text", "chat_template": False}


@pytest.mark.parametrize("chat", [tiny.CHAT, None])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_a_response_is_generated_from_is_what_it_was_learned_after(tmp_path, chat, architecture):
    """Token by token: a blank at a prompt's end would else be read in one way and learned in another."""
    own = tiny.chat_tokenizer(chat, architecture=architecture)
    rows, _ = encoded(PAIRS, tmp_path, own)
    requested, data = encoded(PAIRS, tmp_path, own, "predict", stop="END")
    for row, prompt, (text, response) in zip(rows, requested, ASKED, strict=True):
        n_before = row["spans"][0]
        assert prompt.prompt_ids == row["input_ids"][:n_before]
        assert own.decode(row["input_ids"][n_before:], skip_special_tokens=True).strip() == response.strip()
        assert (prompt.prompt, prompt.target) == (text, response.strip())
    batch = data.collate(requested)
    assert batch["end_tokens"] == [own.eos_token_id]
    assert (batch["decoding"]["max_new_tokens"], batch["decoding"]["stop"]) == (256, ("END",))
    assert batch["prompt_mask"].sum(-1).tolist() == [len(row.prompt_ids) for row in requested]


def test_rows_without_a_response_are_predicted_and_not_learned(tmp_path):
    own = tiny.chat_tokenizer(tiny.CHAT)
    rows = [{"prompt": "Old?"}, {"prompt": "Old?", "response": None}, {"messages": MESSAGES[:4]}, {"messages": MESSAGES}]
    rows += [{"text": "It was "}]
    predicted = [row for one in rows for row in encoded([one], tmp_path, own, "predict")[0]]
    prompts = ["Old?", "Old?", MESSAGES[:4], MESSAGES[:4], "It was "]
    assert [row.prompt for row in predicted] == prompts
    assert [row.target for row in predicted] == [None, None, None, "No.", None]
    assert own.decode(predicted[2].prompt_ids).endswith("Yes.</s>\n[user]\nOld?</s>\n[assistant]\n")
    assert own.decode(predicted[4].prompt_ids) == "<s>It was"
    for row, message in [
        (rows[0], r"data\.columns: found no .* among the columns prompt"),
        (rows[1], "the field 'response' is null, not text: .*row 0"),
        ({"messages": MESSAGES[:2]}, "no assistant turn to train: .*row 0"),
    ]:
        with pytest.raises(UserError, match=message):
            encoded([row] * 4, tmp_path, own, "fit")


@pytest.mark.parametrize("chat", [tiny.CHAT, None])
def test_a_long_prompt_loses_its_beginning_and_a_response_nothing(tmp_path, chat):
    own = tiny.chat_tokenizer(chat)
    own.model_max_length = 64
    long = "The capital of the country is the largest town. " * 9
    rows = [{"prompt": long, "response": "It is."}]
    rooms = [({"max_length": 40, "max_new_tokens": 8}, 40), ({"max_new_tokens": 30}, 34), ({"max_new_tokens": 64}, 32)]
    for requested, room in rooms:
        ((row,), _) = encoded(rows, tmp_path, own, "predict", **requested)
        assert room - 3 <= len(row.prompt_ids) <= room
        assert own.decode(row.prompt_ids).startswith("<s>[user]\n" if chat else "<s>")
        assert long.rstrip()[-20:] in own.decode(row.prompt_ids)
    ((row,), _) = encoded(rows, tmp_path, own, max_length=30)
    assert 27 <= len(row["input_ids"]) <= 30
    assert own.decode([label for label in labels_of(row) if label != -100]).strip() == "It is.</s>"


def test_a_model_without_a_template_is_trained_on_the_prompt_as_it_is_and_the_response_with_its_end(tmp_path):
    own, long = tiny.chat_tokenizer(None), "The river is long. " * 30
    rows = [
        {"prompt": "Old? ", "response": "No."},
        {"prompt": "Old?", "response": "No.</s>"},  # with an end of its own
        {"system": "Be brief.", "prompt": "Old?", "response": " No."},
        {"system": long, "prompt": "Old?", "response": " No."},  # of which the system prompt fills max_length
        {"prompt": "\n\nHuman: Old?\n\nAssistant:", "response": "No."},
    ]
    rows, _ = encoded(rows, tmp_path, own, max_length=60)
    texts = ["<s>Old? No.</s>", "<s>Old?No.</s>", "<s>Be brief.\n\nOld? No.</s>", "<s>Old? No.</s>"]
    assert [own.decode(row["input_ids"]) for row in rows] == [*texts, "<s>\n\nHuman: Old?\n\nAssistant: No.</s>"]
    trained = [own.decode([label for label in labels_of(row) if label != -100]) for row in rows]
    assert [text.strip() for text in trained] == ["No.</s>"] * 5
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        encoded(AS_TURNS, tmp_path, own)


@pytest.mark.parametrize("row", [{"text": "It was old."}, {"prompt": "Is it old?", "response": " Yes."}])
def test_a_length_that_leaves_nothing_to_train_ends_a_fit(tmp_path, row):
    source = tiny.write_file(tmp_path / "rows.jsonl", [row] * 8)
    with pytest.raises(UserError, match="max_length"):
        tiny.attach(TextDataModule(source, max_length=1, chat_template=False), "fit")
