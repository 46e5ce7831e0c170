"""What a row's fields hold: conversations as people store them, prompts with their responses, and pairs of responses."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cola_lightning.chat_template import Conversation, Message, assistant_turn, text_of, user_turn
from cola_lightning.data.columns import Columns, Kind
from cola_lightning.data.encoding import Pair, n_common
from cola_lightning.data.rows import Row, without_null
from cola_lightning.errors import UnusableRow

ROLES = {"human": "user", "observation": "tool"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")
CALLS = ("function_call", "tool_call")  # roles of turns in which the assistant calls functions, as JSON
LOSSES = ("weight", "train", "training")  # fields of a turn: 0 or false means no loss
CONTENT_TEXTS = ("text", "value", "content")  # fields that may hold the text, in an item of a content that is a list
SIDES = ("chosen", "rejected")
MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):")  # before each turn of a conversation that is one text
MARKED_ROLES = {"Human": "user", "Assistant": "assistant"}
# JSON, or how Python prints it. A response may well be a list of objects, but hardly one whose first object has a role.
TURNS_AS_TEXT = re.compile(r"""\s*\[\s*\{[^{}]*["'](?:role|from)["']\s*:""")


class Turn(NamedTuple):
    """A message, and whether it may have a loss, which only the assistant's have."""

    message: Message
    may_train: bool


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
    turns = _turns(row, columns)
    trained = [place for place, turn in enumerate(turns) if turn.message["role"] == "assistant" and turn.may_train]
    if not trained:
        raise UnusableRow("no assistant turn to train")
    messages = [turn.message for turn in turns[: trained[-1] + 1]]
    return Conversation(messages, _tools(row, columns), tuple(trained[-1:] if loss == "last" else trained))


class Question(NamedTuple):
    """A prompt to be answered.

    Attributes:
        prompt: as the data has it: a text, or turns.
        turns: the same as turns; none for a text.
        target: the answer that the row has; None if it has none.
        head: the beginning of a prompt that it does not lose if it is too long.
    """

    prompt: Any
    turns: Conversation
    target: str | None
    head: str = ""


def question(row: Row, kind: Kind, columns: Columns) -> Question:
    """The prompt of a row."""
    if "chosen" in columns:
        return _preference_question(row, kind, columns)
    if kind == "text":
        return Question(row.text(columns["text"]), Conversation(()), None)
    if kind == "prompt":
        field, (prompt, n_head) = columns.get("response", ""), _prompt(row, columns)
        target = None if row.get(field) is None else _text(row, field).strip()
        return Question(prompt, Conversation(_prompt_turns(row, columns), _tools(row, columns)), target, prompt[:n_head])
    turns = _turns(row, columns)
    last = len(turns) - bool(turns and turns[-1].message["role"] == "assistant")
    if "completion" in columns:
        last = next((place for place, turn in enumerate(turns) if turn.may_train), len(turns))
    messages = [turn.message for turn in turns]
    if not last:
        raise UnusableRow("no turn to answer")
    target = text_of(messages[last]["content"]).strip() if last < len(messages) else None
    return Question(messages[:last], Conversation(messages[:last], _tools(row, columns)), target)


def _turns(row: Row, columns: Columns) -> list[Turn]:
    """A row's turns, cleaned: none is empty, and no two neighbours are the user's, the system's or the assistant's."""
    if "messages" not in columns and "completion" not in columns:
        asked = [Turn(message, may_train=False) for message in _prompt_turns(row, columns)]
        return [*asked, Turn(_answer(row, columns), may_train=True)]
    if "messages" in columns:
        turns = [*_stored_turns(row, columns["messages"])]
    else:
        turns = [turn._replace(may_train=False) for turn in _stored_turns(row, columns["prompt"])]
        turns += _stored_turns(row, columns["completion"])
    return _cleaned(_with_system(row, columns, turns))


def _with_system(row: Row, columns: Columns, turns: list[Turn]) -> list[Turn]:
    """The turns after the row's system prompt, if it has one that is not their first turn already."""
    system = _optional(row, columns, "system")
    if system and (not turns or text_of(turns[0].message["content"]) != system):
        return [Turn({"role": "system", "content": system}, may_train=False), *turns]
    return turns


def _cleaned(turns: Iterable[Turn]) -> list[Turn]:
    """The turns that have words, of which neighbours of one role are joined."""
    cleaned: list[Turn] = []
    for turn in filter(_has_words, turns):
        # What the assistant says before the user's first turn is context.
        turn = turn._replace(may_train=turn.may_train and any(before.message["role"] == "user" for before in cleaned))
        if cleaned and _can_join(cleaned[-1], turn):
            before = cleaned.pop()
            both = "\n\n".join(text_of(some.message["content"]) for some in (before, turn))
            turn = turn._replace(message=before.message | turn.message | {"content": both})
        cleaned.append(turn)
    return cleaned


def _has_words(turn: Turn) -> bool:
    message = turn.message
    is_silent = message["role"] == "tool" or message.get("tool_calls") or message.get("reasoning_content")
    return bool(is_silent or text_of(message["content"]).strip())


def _can_join(first: Turn, second: Turn) -> bool:
    messages, role = (first.message, second.message), first.message["role"]
    is_plain = not any(message.get(name) for message in messages for name in ("tool_calls", "reasoning_content"))
    is_same_role = role == second.message["role"] != "tool"
    return is_same_role and is_plain and (first.may_train == second.may_train or role != "assistant")


def _stored_turns(row: Row, field: str) -> Iterator[Turn]:
    """The turns in a field: ``role`` and ``content``, ``from`` and ``value``, or pairs of ``input`` and ``output``.

    A turn's other fields stay, except for null: Arrow gives each turn the fields of all.
    """
    turns = [row[field]] if isinstance(row[field], dict) else row[field]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.refused(field, "a list of turns")
    for turn in map(without_null, turns):
        if {"input", "output"} <= turn.keys():
            yield from (Turn(message, True) for message in [*user_turn(turn["input"]), assistant_turn(turn["output"])])
            continue
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str):
            raise UnusableRow("a turn without a role")
        others = {name: value for name, value in turn.items() if name not in ("from", "value", *LOSSES)}
        message = {**others, "role": ROLES.get(role, role), "content": _content(content)}
        if role in CALLS:
            message |= {"role": "assistant", "content": None, "tool_calls": _calls(text_of(message["content"]))}
        yield Turn(message, all(turn.get(name, True) for name in LOSSES))


def _content(content: Any) -> Any:
    """A turn's content: text, a list of text parts, or None."""
    if content is None or isinstance(content, str):
        return content
    items = content if isinstance(content, list) else [content]
    texts = [
        item if isinstance(item, str) else next((item[name] for name in CONTENT_TEXTS if isinstance(item.get(name), str)), None)
        for item in items
        if isinstance(item, dict | str)
    ]
    if len(texts) < len(items) or None in texts:
        raise UnusableRow("a turn that is not text")
    return [{"type": "text", "text": text} for text in texts]


def _calls(text: str) -> list[dict[str, Any]]:
    """The function calls in a turn's text: JSON of one call or of a list, each with ``name`` and ``arguments``."""
    found = _json(text, "function call")
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UnusableRow("an unreadable function call")
        if isinstance(call.get("arguments"), str):  # JSON in JSON
            call["arguments"] = _json(call["arguments"], "function call")
    return [{"type": "function", "function": call} for call in calls]


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


def pair(row: Row, columns: Columns) -> Pair:
    """A prompt as text, the system prompt first, and its response."""
    return Pair(*_prompt(row, columns), _response(row, columns))


def _prompt(row: Row, columns: Columns) -> tuple[str, int]:
    """The system prompt and the question, with an empty line between; and the length of the system prompt with that line."""
    system = _optional(row, columns, "system")
    before = f"{system}\n\n" if system else ""
    return before + _question(row, columns), len(before)


def _question(row: Row, columns: Columns) -> str:
    """The instruction and its input, with an empty line between."""
    after = _optional(row, columns, "input")
    return _text(row, columns["prompt"]) + (f"\n\n{after}" if after else "")


def _response(row: Row, columns: Columns) -> str:
    if not (text := _text(row, columns["response"])).strip():
        raise UnusableRow("no response")
    return text


def _prompt_turns(row: Row, columns: Columns) -> list[Message]:
    """A prompt as a user's turn, or as the turns that it marks, after the system's if there is one."""
    turns, system = _asked_turns(_question(row, columns)), _optional(row, columns, "system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _answer(row: Row, columns: Columns) -> Message:
    """A response as the assistant's turn; where the data has tools and the response is JSON of calls, the calls."""
    text = _response(row, columns)
    if "tools" in columns and text.lstrip().startswith(("[", "{")):
        try:
            return assistant_turn("") | {"tool_calls": _calls(text)}
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


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt.

    Attributes:
        prompt: the turns that both have in common.
        chosen: the turns of the preferred response, of which the first is the assistant's.
        rejected: those of the other response.
    """

    prompt: Conversation
    chosen: Sequence[Message]
    rejected: Sequence[Message]

    def conversations(self) -> list[Conversation]:
        """The prompt with each response, whose assistant turns have a loss."""
        n = len(self.prompt.messages)
        wholes = [[*self.prompt.messages, *response] for response in (self.chosen, self.rejected)]
        trained = [tuple(k for k, turn in enumerate(whole) if k >= n and turn["role"] == "assistant") for whole in wholes]
        return [replace(self.prompt, messages=whole, trained=k) for whole, k in zip(wholes, trained, strict=True)]


def preference(row: Row, kind: Kind, columns: Columns) -> PreferencePair:
    """A row's two responses as turns: the prompt is what both conversations begin with.

    Raises:
        UnusableRow: if a response is empty, both are equal, or their prompts differ.
    """
    row, columns = _without_nesting(row, columns)
    chosen, rejected = (_answered(row, kind, columns, side) for side in SIDES)
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
    return PreferencePair(Conversation(chosen[:n], _tools(row, columns)), chosen[n:], rejected[n:])


def preference_texts(row: Row, columns: Columns) -> tuple[Pair, Pair]:
    """A row's two responses as texts that follow their prompt, for a model without a chat template."""
    if "prompt" not in columns:  # the prompt with its marks
        found = preference(row, "prompt", columns)
        chosen, rejected = (_marked_pair(found.prompt.messages, response) for response in (found.chosen, found.rejected))
    else:
        chosen, rejected = (pair(row, columns | {"response": columns[side]}) for side in SIDES)
    if chosen.response.strip() == rejected.response.strip():
        raise UnusableRow("the two responses are equal")
    return chosen, rejected


def _preference_question(row: Row, kind: Kind, columns: Columns) -> Question:
    """The prompt of a row of pairs, whose responses may be missing; the target is the preferred one."""
    if kind == "prompt" and "prompt" in columns:
        return question(row, kind, {"response" if slot == "chosen" else slot: name for slot, name in columns.items()})
    row, columns = _without_nesting(row, columns)
    chosen, rejected = (_answered(row, kind, columns, side) for side in SIDES)
    n = _n_shared(chosen, rejected)
    if not n or n == len(chosen) or chosen[n]["role"] != "assistant":
        n = len(chosen) - bool(chosen and chosen[-1]["role"] == "assistant")
    if not n:
        raise UnusableRow("no turn to answer")
    prompt = chosen[:n] if kind == "messages" else _marked_pair(chosen[:n], ()).prompt
    target = text_of(chosen[n]["content"]).strip() if n < len(chosen) else None
    return Question(prompt, Conversation(chosen[:n], _tools(row, columns)), target)


def _without_nesting(row: Row, columns: Columns) -> tuple[Row, Columns]:
    """The row with the fields of its prompt, if that is an object with ``messages`` and ``tools``."""
    prompt = row[columns["prompt"]] if "prompt" in columns else None
    if not isinstance(prompt, dict) or "messages" not in prompt:
        return row, columns
    return Row({**row, **prompt}, row.place), columns | {"prompt": "messages", "tools": "tools"}


def _answered(row: Row, kind: Kind, columns: Columns, side: str) -> list[Message]:
    """The prompt and one of the two responses, as turns."""
    field = columns[side]
    if kind == "prompt" and "prompt" in columns:
        turns = _turns(row, columns | {"response": field})
    elif kind == "prompt":
        turns = _cleaned(_marked_turns(row[field] and row.text(field)))
    else:
        is_text = isinstance(row[field] or "", str)
        answer = _text(row, field) if row[field] and is_text else row[field]
        turns = [Turn(assistant_turn(answer), may_train=True)] if is_text else [*_stored_turns(row, field)]
        if "prompt" in columns and all(turn.message["role"] == "assistant" for turn in turns[:1]):
            turns = [*_asked(row, columns), *turns]
        turns = _cleaned(_with_system(row, columns, turns))
    return [turn.message for turn in turns]


def _asked(row: Row, columns: Columns) -> Iterator[Turn]:
    """A prompt that is stored as turns or as text, as turns without a loss."""
    if isinstance(row[columns["prompt"]], str):
        return (Turn(message, may_train=False) for message in _asked_turns(_question(row, columns)))
    return (turn._replace(may_train=False) for turn in _stored_turns(row, columns["prompt"]))


def _n_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many turns both begin with; white space at the ends of a turn does not matter."""
    first, second = ([turn | {"content": text_of(turn["content"]).strip()} for turn in turns] for turns in (chosen, rejected))
    return n_common(first, second)


def _marked_turns(text: str | None) -> Iterator[Turn]:
    """The turns of a text in which each begins with ``Human:`` or ``Assistant:``, after an empty line."""
    before, *parts = MARK.split(text or "")
    if before.strip():
        raise UnusableRow("no prompt: neither in a column (data.columns) nor a text that begins with 'Human:'")
    for mark, content in zip(parts[::2], parts[1::2], strict=True):
        yield Turn({"role": MARKED_ROLES[mark], "content": content.strip()}, may_train=True)


def _asked_turns(text: str) -> list[Message]:
    """A prompt as turns: those that it marks if its last mark asks for the assistant's turn, else one of the user's."""
    if MARK.match(text) and text.rstrip().endswith("\n\nAssistant:"):
        return [turn.message for turn in _cleaned(_marked_turns(text))]
    return user_turn(text)


def _marked_pair(prompt: Sequence[Message], response: Sequence[Message]) -> Pair:
    """Turns as text with marks: the prompt up to the mark of the response, and the response."""
    marks = {role: mark for mark, role in MARKED_ROLES.items()}
    texts = [f"\n\n{marks[turn['role']]}: {turn['content']}" for turn in (*prompt, *response)]
    n, answer = len(prompt), "\n\nAssistant:"
    return Pair("".join(texts[:n]) + answer, 0, "".join(texts[n:]).removeprefix(answer))
