"""A row of a data set, with its file and number."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cola_lightning.conventions import WHOLE_NUMBER
from cola_lightning.errors import UnusableRow, UserError, shortened_text

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}


class Row(dict[str, Any]):
    """A row's fields by name. Access to a missing field, or one of another type, raises a UserError.

    Access to a field that is empty in this row raises an :class:`~cola_lightning.errors.UnusableRow`.

    Attributes:
        place: its file, or data set and split, and its number in it, from 1.
        class_names: for each field that holds a class index, the class names, if the data has them.
        may_lack_target: whether its label or answer may be missing, as in rows to be predicted.

    Example:
        >>> Row({"text": "Fine."}, "train.jsonl, row 1").text("text")
        'Fine.'
    """

    may_lack_target = False

    def __init__(self, fields: dict[str, Any], place: str, class_names: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(fields)
        self.place, self.class_names = place, class_names or {}

    def __missing__(self, field: str) -> Any:
        fields = ", ".join(repr(shortened_text(name)) for name in self) or "no field"
        raise UserError(f"{self.place}: expected the field {field!r}, received {fields}")

    def text(self, field: str) -> str:
        """A field that holds text."""
        if not isinstance(value := self[field], str):
            kind = UnusableRow if value is None else UserError
            raise kind(f"{self.place}: expected text in the field {field!r}, received {value!r}")
        return value

    def answer(self, field: str) -> str:
        """A field that holds an answer as text."""
        if field in self and self.is_missing(field):
            raise UnusableRow(f"{self.place}: expected text in the field {field!r}, received {self[field]!r}")
        return self.text(field)

    def is_missing(self, field: str) -> bool:
        """Whether an answer is missing: without its field, or null, as an empty cell of a CSV file is."""
        return self.get(field) is None

    def texts(self, field: str) -> tuple[str, ...]:
        """A field that holds a list of at least one text."""
        values = self[field]
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            kind = UnusableRow if values is None or values == [] else UserError
            raise kind(f"{self.place}: expected a list of texts in the field {field!r}, received {values!r}")
        return tuple(Row({field: value}, self.place).text(field) for value in values)

    def inner(self, field: str) -> "Row":
        """A field that holds an object."""
        if not isinstance(value := self[field], dict):
            kind = UnusableRow if value is None else UserError
            raise kind(f"{self.place}: expected an object in the field {field!r}, received {value!r}")
        return Row(value, self.place)

    def messages(self, field: str) -> list[dict[str, Any]]:
        """A field that holds a conversation: turns with ``role`` and ``content``, or ``from`` and ``value``.

        A turn's other fields stay, but for null: Arrow gives each turn the fields of all. A content is a text, a list of text
        parts or, where tools are called, None.
        """
        turns = self[field]
        if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, dict) for turn in turns):
            kind = UnusableRow if turns is None or turns == [] else UserError
            raise kind(f"{self.place}: expected a list of turns with role and content in {field!r}, received {turns!r}")
        return [self._turn(without_null(turn)) for turn in turns]

    def _turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        if "role" not in turn and "from" in turn:
            others = {name: value for name, value in turn.items() if name not in ("from", "value")}
            turn = {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **others}
        row = Row(turn, self.place)
        return turn | {"role": row.text("role"), "content": _content(row)}

    def tools(self, field: str = "tools") -> list[Any] | None:
        """A field that holds a list or its JSON: schemas of the functions that a conversation's assistant may call."""
        tools = self.get(field)
        return (json.loads(tools) if isinstance(tools, str) else without_null(tools)) or None

    def has_target(self, path: str, labels: Collection[str] | None = None) -> bool:
        """Whether the row has a label or an answer; true if it may not be missing: reading it then raises the error.

        Args:
            path: a field, or one inside another (``answers.text``). Null, an empty text or list, and -1 count as missing.
            labels: the known labels; the text ``-1``, as a CSV file has it, then counts as missing unless it is one of them.
                None: the target is an answer, and that text may be one.
        """
        if not self.may_lack_target:
            return True
        value: Any = self
        for field in path.split("."):
            value = value.get(field) if isinstance(value, dict) else None
        value = value.strip() if isinstance(value, str) else value
        is_nan = isinstance(value, float) and math.isnan(value)  # pandas' missing value
        if labels is not None and value == "-1" and value not in labels:
            return False
        return not is_nan and value not in (None, "", [], -1)

    def label(self, field: str, n_labels: int) -> int | None:
        """A field that holds a label from 0 to ``n_labels - 1``; true and 1.0 are 1. Null, NaN and -1 mean no label.

        Returns:
            The label; None if it is missing and the row may lack it.
        """
        if not self.has_target(field, labels=()):
            return None
        value = plain_label(self[field])
        if isinstance(value, str) and WHOLE_NUMBER.fullmatch(value):  # all values of a CSV file are text
            value = int(value)
        if not isinstance(value, int) or not 0 <= value < n_labels:
            kind = UnusableRow if value in (None, -1, "") else UserError
            received = f"received {self[field]!r}"
            raise kind(f"{self.place}: expected a label from 0 to {n_labels - 1} in the field {field!r}, {received}")
        return value


def _content(turn: Row) -> Any:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return [{"type": "text", "text": Row(part, turn.place).text("text")} for part in content]
    return turn.text("content")


def plain_label(value: Any) -> Any:
    """A label without surrounding white space, or as a whole number if it equals one; None for NaN.

    Example:
        >>> [plain_label(value) for value in (" good ", 3, 1.0, True, float("nan"), 0.5)]
        ['good', 3, 1, 1, None, 0.5]
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):  # pandas columns with missing values
        return None if math.isnan(value) else int(value)
    return value


def without_null(value: Any) -> Any:
    """A nested value without the fields that are null.

    Example:
        >>> without_null({"role": "user", "content": "Hi", "tool_calls": None})
        {'role': 'user', 'content': 'Hi'}
    """
    if isinstance(value, dict):
        return {name: without_null(part) for name, part in value.items() if part is not None}
    return [without_null(part) for part in value] if isinstance(value, list) else value
