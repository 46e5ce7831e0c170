"""What a row of text is: the columns with the conversation, the prompt and its response, or the text, and what they hold."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from cola_lightning.data.rows import Row
from cola_lightning.errors import UserError
from cola_lightning.turns import Conversation, Message, assistant_turn, text_of, user_turn

Kind = Literal["messages", "prompt", "text"]
Columns = dict[str, str]  # by part of a row

SYSTEM = {"system": ["system"]}


# By part of a row, the names of columns that people use together; in order: those of one list have the same rank.
CONVENTIONS: list[list[tuple[Kind, dict[str, list[str]]]]] = [
    [
        ("messages", {"messages": ["messages"], "tools": ["tools"]}),
        ("messages", {"messages": ["conversations"], "tools": ["tools"]}),
        ("messages", {"prompt": ["prompt"], "completion": ["completion"], "tools": ["tools"]}),
    ],
    [
        ("prompt", {"prompt": ["instruction"], "input": ["input", "context"], "response": ["output", "response"], **SYSTEM}),
        ("prompt", {"prompt": ["prompt"], "response": ["completion", "response"], **SYSTEM}),
        ("prompt", {"prompt": ["question"], "response": ["answer"], **SYSTEM}),
    ],
    [("text", {"text": ["text"]})],
]
OPTIONAL = {"tools", "input", "system"}  # and the response in rows to be predicted
PARTS = ("messages", "tools", "prompt", "input", "response", "system", "text")


def find_columns(
    names: Sequence[str], lists: Collection[str], given: Mapping[str, str] | None, *, has_response: bool = True
) -> tuple[Kind, Columns]:
    """The kind of a data set's rows, and the column of each part of a row.

    Args:
        names: the data set's columns.
        lists: those that hold lists.
        given: ``data.columns``: the column of each part; None: found by their names.
        has_response: whether a prompt needs a column with its response.

    Raises:
        UserError: if no convention fits, or two of the same rank; it lists the columns.

    Example:
        >>> find_columns(["instruction", "input", "output", "text"], [], None)
        ('prompt', {'prompt': 'instruction', 'input': 'input', 'response': 'output'})
    """
    if given is not None:
        return _given_columns(names, given, has_response=has_response)
    if not has_response:  # the same columns as in training, if there are those
        with contextlib.suppress(UserError):
            return find_columns(names, lists, None)
    for rank in CONVENTIONS:
        fits = [(kind, found) for kind, parts in rank if (found := _fit(kind, parts, names, lists, has_response))]
        if len(fits) == 1 and not any(len(columns) > 1 for columns in fits[0][1].values()):
            return fits[0][0], {part: columns[0] for part, columns in fits[0][1].items()}
        if fits:
            both = " and ".join(dict.fromkeys(name for _, found in fits for columns in found.values() for name in columns))
            raise _unclear(names, f"{both}, of which each could be meant")
    raise _unclear(names, "none")


def _fit(
    kind: Kind, parts: Mapping[str, Sequence[str]], names: Sequence[str], lists: Collection[str], has_response: bool
) -> dict[str, list[str]] | None:
    """The columns of each part; None if one that is needed is not there."""
    found = {}
    for part, wanted in parts.items():
        is_either = part == "tools"  # or their JSON
        if some := [name for name in wanted if name in names and (is_either or (name in lists) is (kind == "messages"))]:
            found[part] = some
    needed = parts.keys() - OPTIONAL - (set() if has_response else {"response"})
    return found if needed <= found.keys() else None


def _given_columns(names: Sequence[str], given: Mapping[str, str], *, has_response: bool) -> tuple[Kind, Columns]:
    if unknown := [part for part in given if part not in PARTS]:
        raise UserError(f"data.columns: expected parts of a row, {', '.join(PARTS)}, received {unknown[0]!r}")
    if missing := [name for name in given.values() if name not in names]:
        raise UserError(f"data.columns: expected columns of the data, {', '.join(names)}, received {missing[0]!r}")
    kinds = [kind for kind in get_args(Kind) if kind in given]
    if len(kinds) != 1 or (kinds == ["prompt"] and has_response and "response" not in given):
        raise UserError(
            f"data.columns: expected one of messages, prompt with its response, and text, received {', '.join(given) or 'none'}"
        )
    return kinds[0], dict(given)


def _unclear(names: Sequence[str], received: str) -> UserError:
    return UserError(
        "data.columns: expected a conversation (messages), a prompt with its response, or text among the columns "
        f"{', '.join(names)}, received {received}: name them by --data.columns '{{prompt: {names[0]}, response: {names[-1]}}}'"
    )


# ---------------------------------------------------------------------- what they hold


def prompt_text(row: Row, columns: Columns) -> str:
    """An instruction as text: the system prompt, the instruction and its input, with an empty line between."""
    before, after = ([text] * bool(text) for text in (_optional(row, columns, part) for part in ("system", "input")))
    return "\n\n".join([*before, row.text(columns["prompt"]), *after])


def response(row: Row, columns: Columns) -> str:
    """The response to an instruction."""
    if not (text := row.text(columns["response"])):
        raise UserError(f"{row.place}: expected a response that adds tokens to its prompt, received {text!r}")
    return text


def conversation(row: Row, columns: Columns) -> Conversation:
    """A conversation, in one column or in two, of which the first is given; or an instruction with its response."""
    if "messages" not in columns and "completion" not in columns:
        return Conversation([*_turns(row, columns), assistant_turn(response(row, columns))])
    tools = row.tools(columns.get("tools", ""))
    if "messages" in columns:
        return Conversation(row.messages(columns["messages"]), tools)
    given = row.messages(columns["prompt"])
    return Conversation([*given, *row.messages(columns["completion"])], tools, len(given))


def asked(row: Row, kind: Kind, columns: Columns) -> tuple[Any, Conversation, str | None]:
    """What is to be answered, as the data has it and as turns; and the answer that the row has, if any."""
    if kind == "text":
        return row.text(columns["text"]), Conversation(()), None
    if kind == "prompt":
        field = columns.get("response", "")
        target = None if row.get(field) is None else row.text(field).strip()
        return prompt_text(row, columns), Conversation(_turns(row, columns)), target
    whole = conversation(row, columns)
    n_asked = whole.n_prompt or len(whole.messages) - (whole.messages[-1]["role"] == "assistant")
    if not n_asked:
        raise UserError(f"{row.place}: expected a turn for the assistant to answer, received the assistant's alone")
    target = text_of(whole.messages[n_asked]["content"]).strip() if n_asked < len(whole.messages) else None
    return whole.messages[:n_asked], Conversation(whole.messages[:n_asked], whole.tools), target


def _turns(row: Row, columns: Columns) -> list[Message]:
    """An instruction as a user's turn, after the system's if there is one."""
    turns = user_turn(prompt_text(row, {part: name for part, name in columns.items() if part != "system"}))
    system = _optional(row, columns, "system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _optional(row: Row, columns: Columns, part: str) -> str:
    """A text that a row may lack; empty if it is blank."""
    field = columns.get(part, "")
    text = "" if row.get(field) is None else row.text(field)
    return text if text.strip() else ""
