"""Rows as people have them: what can be trained is trained, as a server would show it, and the rest is counted."""

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cola_lightning import TextDataModule, UserError
from cola_lightning.chat_template import Conversation, PlainTemplate
from cola_lightning.data import reading
from cola_lightning.data.batch import labels_of
from cola_lightning.data.forms import conversation
from cola_lightning.data.render import TurnEncoder, n_common
from cola_lightning.data.rows import Row
from cola_lightning.data.text import Texts
from cola_lightning.errors import UnusableRow
from tests.helpers import tiny

REAL = Path(os.environ.get("COLA_DATA_DIR", "none"), "real")
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs COLA_DATA_DIR with real")


def cleaned(turns, columns=None, loss="all", **fields):
    """A conversation as it is trained: the first letter of a role, with a star if the turn has a loss, and the text."""
    row = Row({"messages": turns, **fields}, "rows, row 1")
    made = conversation(row, {"messages": "messages"} | (columns or {}), loss)
    return [(turn["role"][0] + "*" * (k in made.trained), turn["content"]) for k, turn in enumerate(made.messages)]


def turns(*pairs):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[role], "content": content} for role, content in pairs]


WEIGHTED = [
    {"from": "human", "value": "Old?", "weight": None},
    {"from": "gpt", "value": "No.", "weight": 0},
    {"from": "human", "value": "Red?"},
    {"from": "gpt", "value": "Yes.", "weight": 1},
]
FOUND = {
    "the assistant begins": (turns(("a", "Hi!"), ("u", "Old?"), ("a", "No.")), [("a", "Hi!"), ("u", "Old?"), ("a*", "No.")]),
    "the user ends": (turns(("u", "Old?"), ("a", "No."), ("u", "Ok")), [("u", "Old?"), ("a*", "No.")]),
    "a role comes twice": (
        turns(("u", "Old?"), ("u", "Red?"), ("a", "No."), ("a", "Yes.")),
        [("u", "Old?\n\nRed?"), ("a*", "No.\n\nYes.")],
    ),
    "empty turns": (
        turns(("s", ""), ("u", "Old?"), ("a", " "), ("u", "Red?"), ("a", "No.")),
        [("u", "Old?\n\nRed?"), ("a*", "No.")],
    ),
    "no weight": (WEIGHTED, [("u", "Old?"), ("a", "No."), ("u", "Red?"), ("a*", "Yes.")]),
    "no loss": (
        [turn | ({"loss": False} if k == 1 else {}) for k, turn in enumerate(turns(*zip("uaua", "abcd", strict=True)))],
        [("u", "a"), ("a", "b"), ("u", "c"), ("a*", "d")],
    ),
    "pairs": ([{"input": "Old?", "output": "No."}] * 2, [("u", "Old?"), ("a*", "No.")] * 2),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_conversation_is_trained_as_it_is_found(name):
    given_turns, expected = FOUND[name]
    assert cleaned(given_turns) == expected


def test_a_system_column_and_the_last_turn_alone():
    talk, columns = turns(("u", "Old?"), ("a", "No."), ("u", "Red?"), ("a", "Yes.")), {"system": "system_prompt"}
    made = cleaned(talk, columns, "last", system_prompt="Be brief.")
    assert made == [("s", "Be brief."), ("u", "Old?"), ("a", "No."), ("u", "Red?"), ("a*", "Yes.")]
    assert cleaned(talk, columns, system_prompt=None)[0] == ("u", "Old?")
    own = [*turns(("s", "Be kind.")), *talk]
    for same in ("Be kind.", " Be kind.\n"):
        assert cleaned(own, columns, system_prompt=same)[0] == ("s", "Be kind.")
    assert cleaned(own, columns, system_prompt="Be brief.")[0] == ("s", "Be brief.\n\nBe kind.")


def test_a_function_call_is_the_assistants_and_what_it_returns_the_tools():
    call = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    said = [("human", "Warm?"), ("function_call", call), ("observation", "9"), ("gpt", "No.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said], "tools": '[{"name": "weather"}]'}
    made = conversation(Row(row, "rows, row 1"), {"messages": "conversations", "tools": "tools"})
    assert [turn["role"] for turn in made.messages] == ["user", "assistant", "tool", "assistant"]
    assert (made.trained, made.tools) == ((1, 3), [{"name": "weather"}])
    old = [("user", "Warm?"), ("assistant", None), ("function", "9"), ("assistant", "No.")]  # as OpenAI's API had it
    turns_of_api = [{"role": role, "content": text, "function_call": None} for role, text in old]
    turns_of_api[1]["function_call"] = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    of_api = conversation(Row({"messages": turns_of_api}, "rows, row 1"), {"messages": "messages"})
    assert [turn["role"] for turn in of_api.messages] == ["user", "assistant", "tool", "assistant"]
    requested = Row({"query": "Warm?", "answers": f"[{call}]", "tools": "[]"}, "rows, row 1")
    asked = conversation(requested, {"prompt": "query", "response": "answers", "tools": "tools"})
    for one in (made, of_api, asked):
        assert one.messages[1]["tool_calls"] == [{"type": "function", "function": json.loads(call)}]


REASONS = [
    ({"messages": []}, "no assistant turn to train"),
    ({"messages": None}, "the field 'messages' is null, not a list of turns"),
    ({"messages": turns(("u", "Old?"), ("a", ""))}, "no assistant turn to train"),
    ({"messages": [{"content": "Old?"}]}, "a turn without a role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}, "a turn that is not text"),
    ({"messages": [{"role": "tool", "content": {"value": "9", "unit": "C"}}]}, "a turn that is not text"),
    ({"messages": [{"from": "function_call", "value": "weather(Oslo)"}]}, "an unreadable function call"),
    ({"messages": turns(("u", "Old?"), ("a", "No.")), "tools": "[{"}, "an unreadable list of tools"),
]


def test_why_a_conversation_cannot_be_trained():
    for row, reason in REASONS:
        with pytest.raises(UnusableRow, match=f"^{reason}$"):
            conversation(Row(row, "rows, row 1"), {"messages": "messages", "tools": "tools"})


words = st.sampled_from(["", " ", None, "No.", "The town is old", "the river is long and the mat is old " * 4, "🏠é" * 40])
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": words},
    optional={"weight": st.sampled_from([0, 1, None])},
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talks=st.lists(st.none() | st.lists(turn, max_size=6), min_size=1, max_size=6))
def test_whatever_rows_are_a_run_trains_what_can_be_trained_after_what_a_server_shows(tmp_path, talks):
    own, talks = tiny.chat_tokenizer(tiny.CHAT), [turns(("u", "Old?"), ("a", "No.")), *talks]  # one without dirt
    folder = tiny.write_rows(tmp_path, [{"messages": talk} for talk in talks])
    data = tiny.set_up(TextDataModule(folder, max_length=60, max_skipped=1), own, "fit")
    usable = []
    for talk in talks:
        with contextlib.suppress(UnusableRow):
            usable.append(conversation(Row({"messages": talk}, ""), {"messages": "messages"}))
    assert 1 <= len(data.train) <= len(usable)
    known = set()
    for made in usable:
        for first in range(len(made.messages)):  # from any exchange on, after the system prompt
            head = [one for one in made.messages[:first] if one["role"] == "system"]
            prompts = [[*head, *made.messages[first:last]] for last in made.trained]
            shown = [own.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in prompts if one]
            known.update(shown)
    for row in data.train:
        assert len(row["input_ids"]) <= 60
        for start in row["spans"][::2]:
            shown = own.decode(row["input_ids"][:start])
            # As a server shows it, or with a question that has lost its beginning.
            shortened = [text for text in known if len(shown) < len(text) and text.endswith(shown[n_common(shown, text) :])]
            assert shown in known or shortened, shown


@pytest.mark.parametrize("chat", [tiny.CHAT, None])
def test_rows_are_skipped_by_their_reasons_and_the_second_start_says_the_same(tmp_path, caplog, chat):
    caplog.set_level("INFO", "cola_lightning")
    rows = [{"instruction": f"Is {k} old?", "input": "", "output": "No. " * (1 + 40 * (k == 7))} for k in range(60)]
    rows[3]["output"], rows[5]["output"], rows[9]["instruction"] = "", " ", None
    folder = tiny.write_rows(tmp_path, rows)

    def prepared(**options):
        return tiny.set_up(TextDataModule(folder, max_length=64, **options), tiny.chat_tokenizer(chat), "test").test

    prepared()
    test = prepared()
    first, second = [line for line in caplog.messages if "skipped" in line]
    assert first == second
    reasons = f"2 no response: {folder}, test, row 3 (counted from 0); 1 the field 'instruction' is null"
    assert first.startswith(f"test: 60 rows: 3 skipped ({reasons}")
    assert "1 shortened by " in first
    n_tokens = sum(len(row["input_ids"]) for row in test)
    n_trained = sum(label != -100 for row in test for label in labels_of(row))
    assert first.endswith(f"; {n_tokens:,} tokens, {n_trained:,} of them trained")
    prepared(max_skipped=0.05)
    with pytest.raises(UserError, match=r"3 of 60 rows .*, more than data\.max_skipped 0\.04 allows \(2 no response"):
        prepared(max_skipped=0.04)
    assert len(prepared(too_long="skip", max_skipped=0.1)) == 56


def test_a_prompt_keeps_its_system_prompt_and_a_response_too_long_has_no_stop_token():
    own = tiny.chat_tokenizer(None)
    system, long = "Be brief.", "the river is long " * 19

    def row_of(asked, answer, max_length):
        talk = Conversation([*turns(("s", system), ("u", asked), ("a", answer))], trained=(2,))
        ((row,),) = TurnEncoder(PlainTemplate(own), max_length, set(), shortens_response=True).conversations([talk])
        return row, own.decode(row["input_ids"])

    row, text = row_of(f"{long}Old?", " No.", 40)
    assert (len(row["input_ids"]) in range(37, 41), row["lost"] > 0) == (True, True)
    assert re.fullmatch(r"<s>Be brief\..*Old\? No\.</s>", text, re.DOTALL)
    row, text = row_of("Old?", f" {long}", 70)
    assert (len(row["input_ids"]), row["spans"][1]) == (70, 70)
    assert f"<s>{system}\n\nOld? {long}".startswith(text)


@needs_real
def test_function_calls_of_a_real_file_are_trained(tmp_path):
    source = (REAL.parent / "chat_templates" / "qwen2_5.jinja").read_text()
    own = tiny.chat_tokenizer(source, "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
    (tmp_path / "rows.json").write_text(json.dumps(json.loads((REAL / "glaive_toolcall.json").read_text())[:40]))
    data = tiny.set_up(TextDataModule(str(tmp_path / "rows.json"), max_length=8000, val_size=0), own, "fit")
    trained = [own.decode([label for label in labels_of(row) if label != -100]) for row in data.train]
    assert sum("<tool_call>\n{" in text for text in trained) > 10
    assert not any("function_call" in text or "<tool_response>" in text for text in trained)


@dataclass(frozen=True)
class OwnTexts(Texts):
    """A preprocessor whose code may change without being seen."""


class Own(TextDataModule):
    def trained(self, **known):
        return OwnTexts(**known)


def cached(folder, kind=TextDataModule):
    """The file of the training examples."""
    (file,) = tiny.set_up(kind(folder), tiny.chat_tokenizer(None), "fit").train.cache_files
    return Path(file["filename"])


def test_examples_that_other_code_has_made_are_made_again(tmp_path, monkeypatch):
    folder = tiny.write_rows(tmp_path / "rows", [{"text": f"It was {k}."} for k in range(20)])
    first = cached(folder)
    monkeypatch.setattr(reading, "PACKAGE", shutil.copytree(reading.PACKAGE, tmp_path / "package"))
    assert cached(folder) == first
    with (tmp_path / "package" / "data" / "forms.py").open("a") as code:
        code.write("# other code")
    assert cached(folder) != first


def test_rows_of_a_preprocessor_of_ones_own_are_not_left_in_the_cache(tmp_path):
    folder = tiny.write_rows(tmp_path / "rows", [{"text": f"It was {k}."} for k in range(20)])
    first = cached(folder)
    assert cached(folder) == first
    left = {*first.parent.iterdir()}
    one, other = cached(folder, Own), cached(folder, Own)
    assert one != other
    assert one.parent not in (first.parent, tmp_path)
    assert {*first.parent.iterdir()} == left
