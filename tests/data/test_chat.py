"""Each assistant turn is trained once, in the context in which a server will ask for it, on what it must then generate."""

import functools
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_lightning import TextDataModule
from cola_lightning.chat_template import ChatTemplate, Conversation
from cola_lightning.data.render import TurnEncoder
from cola_lightning.errors import UnusableRow
from tests.helpers import tiny

TEMPLATES = sorted(Path(os.environ.get("COLA_DATA_DIR", "none"), "chat_templates").glob("*.jinja"))
needs_templates = pytest.mark.skipif(not TEMPLATES, reason="needs COLA_DATA_DIR with chat_templates")


def turns(*contents, system=None):
    """A conversation of the user and the assistant, in turn."""
    messages = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def encoded(own, messages, max_length=4000, *, tools=None, notes=None, **options):
    """The rows of a conversation; the reason is raised if there is one."""
    trained = tuple(k for k, turn in enumerate(messages) if turn["role"] == "assistant")
    conversation = Conversation(messages, tools, trained)
    encoder = TurnEncoder(ChatTemplate(own), max_length, set() if notes is None else notes, **options)
    (rows,) = encoder.conversations([conversation])
    if isinstance(rows, UnusableRow):
        raise rows
    return [row for row in rows if row.pop("lost") >= 0]


def pieces(own, rows):
    """Each row's text in pieces: what has no loss, what has one, and so on in turn."""
    edges = [[0, *row["spans"], len(row["input_ids"])] for row in rows]
    ids = [[row["input_ids"][a:b] for a, b in itertools.pairwise(some)] for row, some in zip(rows, edges, strict=True)]
    return [[own.decode(piece) for piece in some if piece] for some in ids]


# ---------------------------------------------------------------------- templates of well-known models

CHATML, EOT, TURN = "{}<|im_end|>", "{}<|eot_id|>", "{}<end_of_turn>"
TRAINED = {
    "cohere": "{}<|END_OF_TURN_TOKEN|>",
    "cohere2": "{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseekv3": "{}<\uff5cend▁of▁sentence\uff5c>",
    "gemma": TURN,
    "gemma3": TURN,
    "glm4moe": "\n<think></think>\n{}<|user|>",
    "gptoss": "<|channel|>final<|message|>{}<|return|>",
    **dict.fromkeys(["lfm2", "lfm2_2_5"], CHATML),
    **dict.fromkeys(["llama3", "llama3_1", "llama3_2"], EOT),
    **dict.fromkeys(["nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"], CHATML),
    **dict.fromkeys(["phi3", "phi3_5"], "{}<|end|>"),
    **dict.fromkeys(["qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "qwen3_5_nothink"], CHATML),
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
    **dict.fromkeys(["qwen3_5_think", "qwen3_6"], "\n</think>\n\n{}<|im_end|>"),
}
REWRITE = {"gptoss", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
WITHOUT_SYSTEM = {"gemma"}
CLOSED = {"nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"}  # rendered with enable_thinking false
OPENED = {"deepseekv3": "<think>\n"}  # by the generation prompt, and not by the turn
QUESTIONS = turns("2 + 2?", "It is 4.", "3 + 3?", "It is 6.", system="Be brief.")


@needs_templates
@pytest.mark.parametrize("name", TRAINED)
def test_each_turn_of_a_known_template_is_trained_once_after_its_generation_prompt(name):
    own, messages = own_of(name), QUESTIONS
    if name in WITHOUT_SYSTEM:
        with pytest.raises(UnusableRow, match="System role not supported"):
            encoded(own, messages)
        messages = messages[1:]
    rows = encoded(own, messages)
    expected = []
    for k, turn in enumerate(messages):
        if turn["role"] == "assistant":
            options = {"enable_thinking": False} if name in CLOSED else {}
            prompt = own.apply_chat_template(messages[:k], tokenize=False, add_generation_prompt=True, **options)
            texts = prompt.removesuffix(OPENED.get(name, "")), TRAINED[name].format(turn["content"])
            expected.append(tuple(own(text, add_special_tokens=False)["input_ids"] for text in texts))
    spans = [(row["input_ids"], *span) for row in rows for span in zip(row["spans"][::2], row["spans"][1::2], strict=True)]
    assert [(ids[:start], ids[start:end]) for ids, start, end in spans] == expected
    assert len(rows) == (len(expected) if name in REWRITE else 1)


@functools.cache
def own_of(name):
    """A tokenizer with a known template, and with what looks like a special token in it."""
    (source,) = [path.read_text() for path in TEMPLATES if path.stem == name]
    special = re.findall(r"<[|\uff5c][^|\uff5c<>]+[|\uff5c]>|</?[a-z_]+>|\[/?[A-Za-z_]+\]", source)
    return tiny.chat_tokenizer(source, *sorted({*special} - {"<s>", "</s>"}))


# ---------------------------------------------------------------------- what templates do, one by one

SAID = "{{ turn.content }}"
TALK = turns("Old?", "No", "Red?", "Yes")
APPENDED = [["[user]Old?</s>[assistant]", "No</s>", "[user]Red?</s>[assistant]", "Yes</s>"]]


def template(content, opened="[assistant]", role="[{{ turn.role }}]"):
    """A template of what a turn is rendered as, and of the generation prompt."""
    loop = f"{{% for turn in messages %}}{role}{content}{{% endfor %}}"
    return f"{loop}{{% if add_generation_prompt %}}{opened}{{% endif %}}"


@dataclass
class Behaviour:
    """What a chat template makes of a conversation: rows in pieces, its stop token, and a word of the log."""

    chat: str
    rows: list
    special: tuple = ()
    messages: tuple = tuple(TALK)
    stop: str | None = "</s>"
    output: str | None = None


IF_ASSISTANT = "{% if turn.role == 'assistant' "
THOUGHT = ("<think>", "</think>")
OPENING = template(SAID + "</s>", "[assistant]<think>")
OPENED_OR_CLOSED = template(
    IF_ASSISTANT + "and '<think>' not in turn.content %}{{ '<think>\n\n</think>' }}{% endif %}" + SAID + "</s>",
    "[assistant]{{ '<think>\n' }}{% if enable_thinking is false %}{{ '\n</think>' }}{% endif %}",
)
DROPPED = template(IF_ASSISTANT + "and loop.last %}<think></think>{% endif %}" + SAID + "</s>")
RETURNED = template(SAID + "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}")
ENDED = template(SAID + "<|end|>{% if loop.last and not add_generation_prompt %}</s>{% endif %}")
SYSTEM = """{% set system = messages[0].content if messages[0].role == 'system' %}
{%- for turn in messages if turn.role != 'system' %}{% if turn.role == 'user' %}[INST] \
{% if system and loop.last %}{{ system }} {% endif %}{{ turn.content }}[/INST]{% else %} {{ turn.content }}</s>{% endif %}
{%- endfor %}"""
MOVED = [["[INST] Be brief. Old?[/INST]", " No</s>"], ["[INST] Old?[/INST] No</s>[INST] Be brief. Red?[/INST]", " Yes</s>"]]
BRIEF = (("[INST]", "[/INST]"), turns("Old?", "No", "Red?", "Yes", system="Be brief."))
UNENDED, ROLES = template(SAID, "<|assistant|>", "<|{{ turn.role }}|>"), ("<|user|>", "<|assistant|>", "<|tool|>")
COUNTED = "{% for turn in messages %}{{ messages | length if messages[-1].role == 'assistant' }}{{ turn.content }}{% endfor %}"
BEHAVIOURS = {
    "drops earlier thoughts": Behaviour(
        DROPPED,
        [
            ["[user]Old?</s>[assistant]", "<think></think>No</s>"],
            ["[user]Old?</s>[assistant]No</s>[user]Red?</s>[assistant]", "<think></think>Yes</s>"],
        ],
        THOUGHT,
    ),
    "opens a thought that the turn has not": Behaviour(OPENING, APPENDED, THOUGHT, output="opens a thought"),
    "opens the thought that the turn has": Behaviour(
        OPENING, [["[user]Old?</s>[assistant]<think>", "Hm.</think>No</s>"]], THOUGHT, turns("Old?", "<think>Hm.</think>No")
    ),
    "has a mode that closes the thought": Behaviour(  # where the prompt parts from the turn inside a token
        OPENED_OR_CLOSED,
        [["[user]Old?</s>[assistant]<think>\n\n</think>", "No</s>"]],
        THOUGHT,
        turns("Old?", "No"),
        output="enable_thinking: false",
    ),
    "ends the last turn with another token": Behaviour(
        RETURNED,
        [
            ["[user]Old?<|end|>[assistant]", "No<|return|>"],
            ["[user]Old?<|end|>[assistant]No<|end|>[user]Red?<|end|>[assistant]", "Yes<|return|>"],
        ],
        ("<|return|>", "<|end|>"),
        stop="<|return|>",
    ),
    "has an end of text after the last turn": Behaviour(
        ENDED,
        [["[user]Old?<|end|>[assistant]", "No<|end|>", "[user]Red?<|end|>[assistant]", "Yes<|end|>", "</s>"]],
        ("<|end|>",),
        stop="<|end|>",
    ),
    # Which is in the generation prompt's rendering, and no longer in that with the answer.
    "moves the system prompt to the last turn": Behaviour(SYSTEM, MOVED, *BRIEF),
    "ends a turn with the next one's token": Behaviour(
        UNENDED, [["<|user|>Old?<|assistant|>", "No<|user|>", "Red?<|assistant|>", "Yes<|user|>"]], ROLES, stop="<|user|>"
    ),
    "has no tokens of its own": Behaviour(
        template(": " + SAID, "assistant:", "{{ turn.role }}"),
        [["user: Old?assistant:", " No", "user: Red?assistant:", " Yes</s>"]],
        stop="</s>",
    ),
    "has no generation prompt": Behaviour(COUNTED, [["Old?", "2No</s>"]], messages=turns("Old?", "No")),
}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_turn_is_trained_after_its_context_whatever_a_template_does(name):
    expected = BEHAVIOURS[name]
    own = tiny.chat_tokenizer(expected.chat, *expected.special)
    own.add_tokens(["\n\n"])
    notes = set()
    assert pieces(own, encoded(own, expected.messages, notes=notes)) == expected.rows
    assert [expected.output in note for note in notes] == [True] * (expected.output is not None)
    assert own.convert_ids_to_tokens(ChatTemplate(own).stop_tokens) == [expected.stop] * (expected.stop is not None)


@settings(max_examples=30)
@given(output=st.text(" \nxé(", min_size=1, max_size=8))
def test_white_space_of_a_turn_is_trained_and_a_token_over_the_prompts_end_is_the_turns(output):
    own = tiny.chat_tokenizer(tiny.CHAT)
    own.add_tokens(["\n\n"])
    ((before, text, after),) = pieces(own, encoded(own, turns("Write.", output)))
    assert before + text + after == f"<s>[user]\nWrite.</s>\n[assistant]\n{output}</s>\n"
    assert text == ("\n" if output[0] == "\n" else "") + f"{output}</s>"


PARTS = template("{% for part in turn.content if part.type == 'text' %}{{ part.text }}{% endfor %}</s>")


@pytest.mark.parametrize("chat", [template(SAID + "</s>"), PARTS])
def test_contents_as_text_and_as_parts_are_rendered_alike(chat):
    own = tiny.chat_tokenizer(chat)
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]
    for messages in (TALK, parts, [*parts[:3], TALK[3]], [*TALK[:3], parts[3]]):
        assert pieces(own, encoded(own, messages)) == APPENDED
        assert ChatTemplate(own).prompt(Conversation(messages[:1])) == "[user]Old?</s>[assistant]"


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_a_template_that_loses_what_the_assistant_says_is_refused():
    silent = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    for words, chat, messages in [
        ("does not begin the assistant's turn", COUNTED + template("", "[assistant]", ""), TALK[:2]),
        ("does not render what the", template("{{ turn.content if turn.content != 'No' }}</s>"), turns("No or yes?", "No")),
        ("does not render function calls", template(SAID + "</s>"), [TALK[0], silent]),
        ("refuses the turns", template("{{ 1 // 0 }}"), TALK),
    ]:
        with pytest.raises(UnusableRow, match=words):
            encoded(tiny.chat_tokenizer(chat), messages)


TOOL = {"type": "function", "function": {"name": "weather", "description": "It is.", "parameters": {}}}
ALL = "{% for tool in tools or () %}[tool]{{ tool.function.name }}{% endfor %}" + template(
    "{% if turn.reasoning_content %}({{ turn.reasoning_content }}){% endif %}{{ turn.content }}"
    "{% for call in turn.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}</s>"
)
TIME = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
CALLED = [
    {"role": "user", "content": "Is it?", "reasoning_content": None, "tool_calls": None},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL, TIME]},  # null in each other's
    {"role": "tool", "content": "It is old.", "name": "weather"},
    {"role": "assistant", "content": "Old."},
]


def as_json(call):
    """A call whose arguments are JSON, as OpenAI's API gives it."""
    return {"id": "7", "type": "function", "function": call | {"arguments": json.dumps(call["arguments"])}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("calls", [[CALL, TIME], [as_json(one["function"]) for one in (CALL, TIME)]])
def test_tools_their_calls_and_thoughts_reach_the_template_without_nulls(tmp_path, tools, calls):
    own = tiny.chat_tokenizer(ALL)
    rows = [{"messages": [CALLED[0], CALLED[1] | {"tool_calls": calls}, *CALLED[2:]], "tools": tools}]
    data = TextDataModule(tiny.write_rows(tmp_path, rows))
    tiny.set_up(data, own, "test")
    first, call = "[tool]weather[user]Is it?</s>[assistant]", '(Hm.)weather{"city": "Oslo"}time{"zone": "CET"}</s>'
    assert pieces(own, list(data.test)) == [[first, call, "[tool]It is old.</s>[assistant]", "Old.</s>"]]
    rows[0]["messages"].pop()
    data = TextDataModule(tiny.write_rows(tmp_path, rows))
    (prompt,) = tiny.set_up(data, own, "predict").test
    assert own.decode(prompt.prompt_ids) == f"{first}{call}[tool]It is old.</s>[assistant]"


def test_a_long_conversation_loses_its_oldest_exchanges_and_keeps_its_system_prompt():
    own = tiny.chat_tokenizer(tiny.CHAT)
    talk = turns(*(f"{word} {k}" * (3 if k == 0 else 1) for k in range(4) for word in ("Is it", "No")), system="Be brief.")
    for start in range(3, len(talk), 2):  # of each exchange that may be the first one
        expected = encoded(own, [talk[0], *talk[start:]])
        assert encoded(own, talk, len(expected[0]["input_ids"])) == expected != encoded(own, talk)


def test_a_chat_whose_tools_result_fills_the_length_is_skipped_and_not_trained_without_its_answer():
    own = tiny.chat_tokenizer(tiny.CHAT)
    talk = [*turns("the river is long " * 5, "look"), {"role": "tool", "content": "it is old " * 8}]
    with pytest.raises(UnusableRow, match=r"data\.max_length"):
        encoded(own, [*talk, {"role": "assistant", "content": "Old."}], 60)


@pytest.mark.parametrize("shortens_response", [False, True])
def test_what_is_asked_last_loses_its_beginning_and_only_a_response_its_end(shortens_response):
    own = tiny.chat_tokenizer(tiny.CHAT)
    question, answer = "the river is long " * 8, "the town is old " * 8
    before, after = ("<s>[system]\nBe brief.</s>\n[user]\n", "</s>\n[assistant]\n")
    options = {"shortens_response": shortens_response}
    n_kept = len(own(f"{before}{after}{answer}</s>", add_special_tokens=False)["input_ids"])
    rows = encoded(own, turns(question, answer, system="Be brief."), n_kept + 9, **options)
    ((requested, output, *_),) = pieces(own, rows)
    assert output == f"{answer}</s>"
    assert requested.startswith(before)
    assert requested.endswith(f"is long {after}")
    assert len(requested) < len(before + question + after)
    long = turns("Old?", answer * 9, system="Be brief.")
    if shortens_response:
        (row,) = encoded(own, long, 80, **options)
        ((requested, output),) = pieces(own, [row])
        assert (len(row["input_ids"]), requested) == (80, f"{before}Old?{after}")
        assert (answer * 9).startswith(output)  # without a stop token: it does not stop there
        return
    for messages, too_long in [(long, "shorten"), (turns(question, answer), "skip")]:
        with pytest.raises(UnusableRow, match=r"data\.max_length"):
            encoded(own, messages, 80, too_long=too_long)
