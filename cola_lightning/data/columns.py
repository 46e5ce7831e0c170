"""Which columns of a data set hold the conversation, the prompt and its response, or the text."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cola_lightning.errors import UserError

Kind = Literal["messages", "prompt", "text"]


@dataclass(frozen=True)
class Convention:
    """Columns that people use together.

    Attributes:
        kind: what a row is: a conversation, a prompt with its response, or a text.
        needed: by part of a row, the names that a column with it has.
        optional: the same for columns that a data set may lack; a response may be missing in rows to be predicted.
    """

    kind: Kind
    needed: Mapping[str, Sequence[str]]
    optional: Mapping[str, Sequence[str]]


TOOLS: dict[str, Sequence[str]] = {"tools": ["tools"]}
SYSTEM: dict[str, Sequence[str]] = {"system": ["system"]}
# In order: those of one list have the same rank.
CONVENTIONS = [
    [
        Convention("messages", {"messages": ["messages"]}, TOOLS),
        Convention("messages", {"messages": ["conversations"]}, TOOLS),
        Convention("messages", {"prompt": ["prompt"], "completion": ["completion"]}, TOOLS),
    ],
    [
        Convention(
            "prompt", {"prompt": ["instruction"]}, {"input": ["input", "context"], "response": ["output", "response"]} | SYSTEM
        ),
        Convention("prompt", {"prompt": ["prompt"]}, {"response": ["completion", "response"]} | SYSTEM),
        Convention("prompt", {"prompt": ["question"]}, {"response": ["answer"]} | SYSTEM),
    ],
    [Convention("text", {"text": ["text"]}, {})],
]
PARTS = ("messages", "tools", "prompt", "input", "response", "system", "text")


def find_columns(
    names: Sequence[str], lists: Collection[str], given: Mapping[str, str] | None, *, has_response: bool = True
) -> tuple[Kind, dict[str, str]]:
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
        return _given_columns(names, given)
    if not has_response:  # the same columns as in training, if there are those
        with contextlib.suppress(UserError):
            return find_columns(names, lists, None)
    for rank in CONVENTIONS:
        fits = [found for one in rank if (found := _fit(one, names, lists, has_response)) is not None]
        if len(fits) == 1 and not any(len(columns) > 1 for columns in fits[0][1].values()):
            return fits[0][0], {part: columns[0] for part, columns in fits[0][1].items()}
        if fits:
            both = " and ".join(dict.fromkeys(name for _, found in fits for columns in found.values() for name in columns))
            raise _unclear(names, f"{both}, of which each could be meant")
    raise _unclear(names, "none")


def _fit(
    convention: Convention, names: Sequence[str], lists: Collection[str], has_response: bool
) -> tuple[Kind, dict[str, list[str]]] | None:
    wants_lists = convention.kind == "messages"
    found: dict[str, list[str]] = {}
    for part, wanted in [*convention.needed.items(), *convention.optional.items()]:
        is_either = part == "tools"  # or their JSON
        if some := [name for name in wanted if name in names and (is_either or (name in lists) is wants_lists)]:
            found[part] = some
    needed = {*convention.needed} | ({"response"} & {*convention.optional} if has_response else set())
    return (convention.kind, found) if needed <= found.keys() else None


def _given_columns(names: Sequence[str], given: Mapping[str, str]) -> tuple[Kind, dict[str, str]]:
    if unknown := [part for part in given if part not in PARTS]:
        raise UserError(f"data.columns: expected parts of a row, {', '.join(PARTS)}, received {unknown[0]!r}")
    if missing := [name for name in given.values() if name not in names]:
        raise UserError(f"data.columns: expected columns of the data, {', '.join(names)}, received {missing[0]!r}")
    kinds = [kind for kind in get_args(Kind) if kind in given]
    if len(kinds) != 1:
        raise UserError(f"data.columns: expected one of messages, prompt and text, received {', '.join(given) or 'none'}")
    return kinds[0], dict(given)


def _unclear(names: Sequence[str], received: str) -> UserError:
    return UserError(
        "data.columns: expected a conversation (messages), a prompt with its response, or text among the columns "
        f"{', '.join(names)}, received {received}: name them by --data.columns '{{prompt: {names[0]}, response: {names[-1]}}}'"
    )


TEXTS = [["premise", "hypothesis"], ["sentence1", "sentence2"], ["question1", "question2"], ["question", "sentence"]]
TEXTS += [["text"], ["sentence"], ["content"], ["review"]]
LABELS = ["label", "labels"]


def find_texts_and_label(
    names: Sequence[str], texts: Sequence[str] | None, label: str | None, *, has_label: bool = True
) -> tuple[list[str], str]:
    """The columns with a classifier's text, or pair of texts, and label.

    Args:
        names: the data set's columns.
        texts: ``data.text_fields``; None: found by their names.
        label: ``data.label_field``; None: found by its name.
        has_label: whether there must be one.

    Raises:
        UserError: if none is there; it lists the columns.

    Example:
        >>> find_texts_and_label(["idx", "sentence1", "sentence2", "label"], None, None)
        (['sentence1', 'sentence2'], 'label')
    """
    listed = ", ".join(names)
    found = texts or next((pair for pair in TEXTS if {*pair} <= {*names}), None)
    if found is None or not {*found} <= {*names}:
        received = "none" if found is None else ", ".join(found)
        raise UserError(f"data.text_fields: expected one or two of the columns {listed}, received {received}")
    label = label or next((name for name in LABELS if name in names), None if has_label else LABELS[0])
    if label is None or (has_label and label not in names):
        raise UserError(f"data.label_field: expected one of the columns {listed}, received {label or 'none'}")
    return list(found), label
