"""What a row's fields hold: conversations as people store them, prompts with their responses, and pairs of responses.

Each becomes one form, a :class:`~cola_lightning.chat_template.Conversation`. Until it is made, a turn is a message with the key
``train``: whether it may have a loss.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cola_lightning.chat_template import MARKS, Conversation, Message, PreferencePair, assistant_turn, text_of, user_turn
from cola_lightning.data.columns import Columns, Kind
from cola_lightning.data.render import n_common
from cola_lightning.data.rows import Row, without_null
from cola_lightning.errors import UnusableRow

ROLES = {"human": "user", "observation": "tool", "function": "tool"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")
CALLS = ("function_call", "tool_call")  # roles of turns in which the assistant calls functions, as JSON
LOSSES = ("weight", "train", "training", "loss")  # fields of a turn: 0 or false means no loss
CONTENT_TEXTS = ("text", "value", "content")  # fields that may hold the text, in an item of a content that is a list
SIDES = ("chosen", "rejected")
MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):")  # before each turn of a conversation that is one text
MARKED_ROLES = {"Human": "user", "Assistant": "assistant"}
# JSON, or how Python prints it. A response may well be a list of objects, but hardly one whose first object has a role.
TURNS_AS_TEXT = re.compile(r"""\s*\[\s*\{[^{}]*["'](?:role|from)["']\s*:""")


# ---------------------------------------------------------------------- conversations


def conversation(row: Row, columns: Columns, loss: str = "all") -> Conversation:
    """A conversation to train on, from one column or from two, of which the first has no loss; or a prompt and its response.

    Args:
        row: the row.
        columns: the column in each slot.
        loss: on ``all`` turns of the assistant, or on the ``last`` one alone.

    Raises:
        UnusableRow: if no turn of the assistant has a loss, or a turn cannot be read.
    """
    turns, is_marked = _turns(row, columns)
    trained = [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and turn["train"]]
    if not trained:
        raise UnusableRow("no assistant turn to train")
    messages = _messages(turns[: trained[-1] + 1])
    return Conversation(messages, _tools(row, columns), tuple(trained[-1:] if loss == "last" else trained), is_marked)


def question(row: Row, kind: Kind, columns: Columns) -> tuple[Conversation, str | None]:
    """The turns that are to be answered, and the answer that the row has; None if it has none."""
    if "chosen" in columns:
        pair = preference(row, kind, columns)
        return pair.prompt, text_of(pair.chosen[0]["content"]).strip()
    if kind == "text":
        return Conversation(user_turn(row.text(columns["text"]))), None
    if kind == "prompt":
        turns, is_marked = _asked(row, columns)
        field = columns.get("response", "")
        target = None if row.get(field) is None else _text(row, field).strip()
        return Conversation(_messages(turns), _tools(row, columns), (), is_marked), target
    turns, _ = _turns(row, columns)
    last = len(turns) - bool(turns and turns[-1]["role"] == "assistant")
    if "completion" in columns:
        last = next((place for place, turn in enumerate(turns) if turn["train"]), len(turns))
    if not last:
        raise UnusableRow("no turn to answer")
    target = text_of(turns[last]["content"]).strip() if last < len(turns) else None
    return Conversation(_messages(turns[:last]), _tools(row, columns)), target


def _messages(turns: Iterable[Message]) -> list[Message]:
    return [{name: value for name, value in turn.items() if name != "train"} for turn in turns]


def _untrained(turns: Iterable[Message]) -> list[Message]:
    return [turn | {"train": False} for turn in turns]


def _turns(row: Row, columns: Columns) -> tuple[list[Message], bool]:
    """A row's turns, cleaned, and whether a text marks them.

    None is empty, and no two neighbours are the user's, the system's or the assistant's.
    """
    if "messages" not in columns and "completion" not in columns:
        turns, is_marked = _asked(row, columns)
        return [*turns, _answer(row, columns) | {"train": True}], is_marked
    if "messages" in columns:
        turns = [*_stored_turns(row, columns["messages"])]
    else:
        turns = [*_untrained(_stored_turns(row, columns["prompt"])), *_stored_turns(row, columns["completion"])]
    return _cleaned(_with_system(row, columns, turns)), False


def _with_system(row: Row, columns: Columns, turns: list[Message]) -> list[Message]:
    """The turns after the row's system prompt, if it has one that is not their first turn already."""
    system = _optional(row, columns, "system")
    if system and (not turns or text_of(turns[0]["content"]).strip() != system.strip()):
        return [{"role": "system", "content": system, "train": False}, *turns]
    return turns


def _cleaned(turns: Iterable[Message]) -> list[Message]:
    """The turns that have words, of which neighbours of one role are joined."""
    cleaned: list[Message] = []
    for turn in filter(_has_words, turns):
        # What the assistant says before the user's first turn is context.
        turn = turn | {"train": turn["train"] and any(before["role"] == "user" for before in cleaned)}
        if cleaned and _can_join(cleaned[-1], turn):
            before = cleaned.pop()
            turn = before | turn | {"content": "\n\n".join(text_of(some["content"]) for some in (before, turn))}
        cleaned.append(turn)
    return cleaned


def _has_words(turn: Message) -> bool:
    is_silent = turn["role"] == "tool" or turn.get("tool_calls") or turn.get("reasoning_content")
    return bool(is_silent or text_of(turn["content"]).strip())


def _can_join(first: Message, second: Message) -> bool:
    role = first["role"]
    is_plain = not any(turn.get(name) for turn in (first, second) for name in ("tool_calls", "reasoning_content"))
    is_same_role = role == second["role"] != "tool"
    return is_same_role and is_plain and (first["train"] == second["train"] or role != "assistant")


def _stored_turns(row: Row, field: str) -> Iterator[Message]:
    """The turns in a field: ``role`` and ``content``, ``from`` and ``value``, or pairs of ``input`` and ``output``.

    A turn's other fields stay, except for null: Arrow gives each turn the fields of all.
    """
    turns = [row[field]] if isinstance(row[field], dict) else row[field]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.refused(field, "a list of turns")
    for turn in map(without_null, turns):
        if {"input", "output"} <= turn.keys():
            yield from (message | {"train": True} for message in [*user_turn(turn["input"]), assistant_turn(turn["output"])])
            continue
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str):
            raise UnusableRow("a turn without a role")
        calls = turn.get("tool_calls") or turn.get("function_call")  # the latter as OpenAI's API had it
        others = {name: value for name, value in turn.items() if name not in ("from", "value", "function_call", *LOSSES)}
        message = {**others, "role": ROLES.get(role, role), "content": _content(content)}
        if role in CALLS:
            calls = _json(text_of(message["content"]), "function call")
            message |= {"role": "assistant", "content": None}
        if calls:
            message["tool_calls"] = _calls(calls)
        yield message | {"train": all(turn.get(name, True) for name in LOSSES)}


def _content(content: Any) -> Any:
    """A turn's content: text, a list of text parts, or None."""
    if content is None or isinstance(content, str):
        return content
    items = content if isinstance(content, list) else [content]
    texts = [
        item if isinstance(item, str) else next((item[name] for name in CONTENT_TEXTS if isinstance(item.get(name), str)), None)
        for item in items
        if isinstance(item, str) or (isinstance(item, dict) and ("type" in item or len(item) == 1))  # else a tool's result
    ]
    if len(texts) < len(items) or None in texts:
        raise UnusableRow("a turn that is not text")
    return [{"type": "text", "text": text} for text in texts]


def _calls(found: Any) -> list[dict[str, Any]]:
    """Function calls: one or a list, each with ``name`` and ``arguments``, or with these in ``function``.

    Arguments that are JSON, as OpenAI's API has them, become an object: most templates write it as JSON themselves.
    """
    calls = list[dict[str, Any]]()
    for call in found if isinstance(found, list) else [found]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRow("an unreadable function call")
        if isinstance(function.get("arguments"), str):
            function = function | {"arguments": _json(function["arguments"], "function call")}
        calls.append({"type": "function", **(call if "function" in call else {}), "function": function})
    return calls


def _tools(row: Row, columns: Columns) -> list[Any] | None:
    """Schemas of the functions that the assistant may call: a list, or its JSON."""
    tools = row.get(columns.get("tools", ""))
    tools = _json(tools, "list of tools") if isinstance(tools, str) and tools.strip() else without_null(tools)
    if tools and not isinstance(tools, list):
        raise UnusableRow("an unreadable list of tools")
    return tools or None


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UnusableRow(f"an unreadable {what}") from error


# ---------------------------------------------------------------------- prompts and responses


def _asked(row: Row, columns: Columns) -> tuple[list[Message], bool]:
    """The turns of a prompt after the system prompt, and whether a text marks them."""
    turns, is_marked = _asked_turns(_question(row, columns))
    system = _optional(row, columns, "system")
    return _untrained([*[{"role": "system", "content": system}] * bool(system), *turns]), is_marked


def _asked_turns(text: str) -> tuple[list[Message], bool]:
    """A prompt as turns: those that it marks if its last mark asks for the assistant's turn, else one of the user's."""
    is_marked = bool(MARK.match(text)) and text.rstrip().endswith(MARKS["assistant"])
    return (_cleaned(_marked_turns(text)) if is_marked else user_turn(text)), is_marked


def _question(row: Row, columns: Columns) -> str:
    """The instruction and its input, with an empty line between."""
    after = _optional(row, columns, "input")
    return _text(row, columns["prompt"]) + (f"\n\n{after}" if after else "")


def _answer(row: Row, columns: Columns) -> Message:
    """A response as the assistant's turn; where the data has tools and the response is JSON of calls, the calls."""
    if not (text := _text(row, columns["response"])).strip():
        raise UnusableRow("no response")
    if "tools" in columns and text.lstrip().startswith(("[", "{")):
        try:
            return assistant_turn("") | {"tool_calls": _calls(_json(text, "function call"))}
        except UnusableRow:  # an answer that happens to be JSON
            pass
    return assistant_turn(text)


def _text(row: Row, field: str) -> str:
    """A text, or a number as text."""
    value = row[field]
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else row.text(field)
    if TURNS_AS_TEXT.match(text):
        raise UnusableRow("turns stored as text, not as a list")
    return text


def _optional(row: Row, columns: Columns, slot: str) -> str:
    """A text that a row may lack; empty if it is blank."""
    field = columns.get(slot, "")
    text = "" if row.get(field) is None else row.text(field)
    return text if text.strip() else ""


# ---------------------------------------------------------------------- preferences


def preference(row: Row, kind: Kind, columns: Columns) -> PreferencePair:
    """A row's two responses as turns: the prompt is what both conversations begin with.

    Raises:
        UnusableRow: if a response is empty, both are equal, or their prompts differ.
    """
    (chosen, is_marked), (rejected, _) = (_answered(row, kind, columns, side) for side in SIDES)
    for turns in (chosen, rejected):
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
    n = _n_shared(chosen, rejected)
    if n == len(chosen) == len(rejected) > 0:
        raise UnusableRow("the two responses are equal")
    if n in (len(chosen), len(rejected)):
        raise UnusableRow("no response")
    if not chosen[n]["role"] == rejected[n]["role"] == "assistant":
        raise UnusableRow("the prompts of the two responses differ")
    if not any(turn["role"] == "user" for turn in chosen[:n]):
        raise UnusableRow("no prompt")
    return PreferencePair(Conversation(chosen[:n], _tools(row, columns), (), is_marked), chosen[n:], rejected[n:])


def _answered(row: Row, kind: Kind, columns: Columns, side: str) -> tuple[list[Message], bool]:
    """The prompt and one of the two responses, as turns, and whether a text marks them."""
    field = columns[side]
    if kind == "prompt" and "prompt" in columns:
        turns, is_marked = _turns(row, columns | {"response": field})
    elif kind == "prompt":
        turns, is_marked = _cleaned(_marked_turns(row[field] and row.text(field))), True
    else:
        is_text = isinstance(row[field] or "", str)
        answer = _text(row, field) if row[field] and is_text else row[field]
        turns = [assistant_turn(answer) | {"train": True}] if is_text else [*_stored_turns(row, field)]
        if "prompt" in columns and all(turn["role"] == "assistant" for turn in turns[:1]):
            is_asked = isinstance(row[columns["prompt"]], str)
            asked = _asked_turns(_question(row, columns))[0] if is_asked else _stored_turns(row, columns["prompt"])
            turns = [*_untrained(asked), *turns]
        turns, is_marked = _cleaned(_with_system(row, columns, turns)), False
    return _messages(turns), is_marked


def _n_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many turns both begin with; white space at the ends of a turn does not matter."""
    first, second = ([turn | {"content": text_of(turn["content"]).strip()} for turn in turns] for turns in (chosen, rejected))
    return n_common(first, second)


def _marked_turns(text: str | None) -> Iterator[Message]:
    """The turns of a text in which each begins with ``Human:`` or ``Assistant:``, after an empty line."""
    before, *parts = MARK.split(text or "")
    if before.strip():
        raise UnusableRow("no prompt: neither in a column (data.columns) nor a text that begins with 'Human:'")
    for mark, content in zip(parts[::2], parts[1::2], strict=True):
        yield {"role": MARKED_ROLES[mark], "content": content.strip(), "train": True}
