"""What a row is follows from its columns; nothing is guessed where two could be meant."""

import json
from types import SimpleNamespace

import pytest

from cola_lightning import TextDataModule, UserError
from cola_lightning.data.classification import find_texts_and_label
from cola_lightning.data.encoding import labels_of
from cola_lightning.data.text import find_columns
from tests import tiny

USER, ASSISTANT = {"role": "user", "content": "Old?"}, {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    ("names", "lists", "found"),
    [
        (["prompt", "messages", "prompt_id"], ["messages"], ("messages", {"messages": "messages"})),
        (["id", "conversations", "tools"], ["conversations"], ("messages", {"messages": "conversations", "tools": "tools"})),
        (["prompt", "completion"], ["prompt", "completion"], ("messages", {"prompt": "prompt", "completion": "completion"})),
        (["prompt", "completion"], [], ("prompt", {"prompt": "prompt", "response": "completion"})),
        (["question", "answer", "system"], [], ("prompt", {"prompt": "question", "response": "answer", "system": "system"})),
        (["instruction", "input", "output"], [], ("prompt", {"prompt": "instruction", "input": "input", "response": "output"})),
        (["text", "label"], [], ("text", {"text": "text"})),
        (["text", "prompt"], [], ("text", {"text": "text"})),  # a prompt alone is not trained on
    ],
)
def test_columns_are_found_by_what_people_call_them(names, lists, found):
    kind, columns = find_columns(names, lists, None)
    assert (kind, dict(sorted(columns.items()))) == (found[0], dict(sorted(found[1].items())))


@pytest.mark.parametrize(
    ("names", "lists"),
    [
        (["messages", "conversations"], ["messages", "conversations"]),
        (["prompt", "response", "completion"], []),
        (["prompt", "response", "question", "answer"], []),
        (["instruction", "input", "context", "output"], []),
        (["messages"], []),  # as JSON
        (["document", "summary"], []),
    ],
)
def test_where_two_could_be_meant_or_none_the_columns_are_listed(names, lists):
    with pytest.raises(UserError, match=rf"data\.columns: .* columns {', '.join(names)}, received .*--data\.columns"):
        find_columns(names, lists, None)


def test_a_prompt_alone_is_enough_to_be_answered():
    assert find_columns(["prompt", "id"], [], None, has_response=False) == ("prompt", {"prompt": "prompt"})


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["idx", "label", "sentence"], (["sentence"], "label")),
        (["text", "labels"], (["text"], "labels")),
        (["premise", "hypothesis", "label", "text"], (["premise", "hypothesis"], "label")),
    ],
)
def test_a_text_or_a_pair_and_its_label_are_found(names, found):
    assert find_texts_and_label(names, None, None) == found


def trained(tmp_path, row, stage="test", chat=tiny.CHAT, **arguments):
    """The text of a row, and the parts with a loss."""
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    data, own = TextDataModule(str(tmp_path), **arguments), tiny.tokenizer()
    own.chat_template = chat
    module = SimpleNamespace(tokenizer=own, seed=3)
    data.trainer = SimpleNamespace(lightning_module=module, training=False, world_size=1, global_rank=0)
    data.setup(stage)
    if stage == "predict":
        return own.decode(data.test[0].prompt_ids), data.test[0].target
    row = data.test[0]
    return own.decode(row["input_ids"]), own.decode([label for label in labels_of(row) if label != -100])


def test_the_turns_of_a_prompt_have_no_loss(tmp_path):
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [{"role": "assistant", "content": "Yes."}]}
    text, said = trained(tmp_path, row)
    assert "No." in text
    assert said.replace("</s>", "") == "Yes."
    prompt, target = trained(tmp_path, row, "predict")
    assert (prompt.count("Old?"), "Yes." in prompt, target) == (2, False, "Yes.")


def test_a_system_column_is_the_system_prompt_where_it_is_not_empty(tmp_path):
    row = {"system": "Be brief.", "question": "Old?", "answer": "No."}
    assert "Be brief." in trained(tmp_path, row)[0]
    assert "[system]" not in trained(tmp_path, row | {"system": " "})[0]
    assert trained(tmp_path, row, chat=None)[0] == "<s>Be brief.\n\nOld?No.</s>"


def test_an_instruction_is_followed_by_its_input_if_it_has_one(tmp_path):
    row = {"instruction": "Is it old?", "input": "A town.", "output": " No."}
    assert trained(tmp_path, row, chat=None) == ("<s>Is it old?\n\nA town. No.</s>", " No.</s>")
    assert trained(tmp_path, row | {"input": ""}, chat=None) == ("<s>Is it old? No.</s>", " No.</s>")


def test_roles_and_values_of_sharegpt_are_roles_and_contents(tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Old?"}, {"from": "gpt", "value": "No."}]
    as_roles = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]
    assert trained(tmp_path, {"conversations": turns}) == trained(tmp_path, {"messages": as_roles})


def test_a_prompt_that_is_named_without_its_response_is_predicted_and_not_trained():
    given, names = {"prompt": "document"}, ["document", "summary"]
    assert find_columns(names, [], given, has_response=False) == ("prompt", given)
    with pytest.raises(UserError, match=r"data\.columns: expected messages, prompt and response"):
        find_columns(names, [], given)
