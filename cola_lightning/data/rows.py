"""Rows of a data set: their fields by name and type, and the split that they are in."""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from cola_lightning.errors import UnusableRow, UserError, shortened_text

S = TypeVar("S")
T = TypeVar("T")


class Row(dict[str, Any]):
    """A row's fields by name. Access to a field that the data does not have raises a UserError.

    Access to a field that has no value in this row, or one of another type, raises an
    :class:`~cola_lightning.errors.UnusableRow`.

    Attributes:
        place: its file, or data set and split, and its index in it, counted from 0 like the ``index`` of predictions.
        class_names: for each field that holds a class index, the class names, if the data has them.
        may_lack_target: whether its label or answer may be missing, as in rows to be predicted.

    Example:
        >>> Row({"text": "Fine."}, "train.jsonl, row 0 (counted from 0)").text("text")
        'Fine.'
    """

    may_lack_target = False

    def __init__(self, fields: Mapping[str, Any], place: str, class_names: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(fields)
        self.place, self.class_names = place, class_names or {}

    def __missing__(self, field: str) -> Any:
        fields = ", ".join(repr(shortened_text(name)) for name in self) or "no field"
        raise UserError(f"{self.place}: there is no field {field!r} among {fields}")

    def refused(self, field: str, expected: str) -> UnusableRow:
        """The error for a field's value in this row."""
        value = "null" if self[field] is None else repr(shortened_text(str(self[field])))
        return UnusableRow(f"the field {field!r} is {value}, not {expected}")

    def _typed(self, field: str, kind: type[T], expected: str) -> T:
        if not isinstance(value := self[field], kind) or value == []:
            raise self.refused(field, expected)
        return value

    def text(self, field: str) -> str:
        """A field that holds text."""
        return self._typed(field, str, "text")

    def texts(self, field: str) -> tuple[str, ...]:
        """A field that holds a list of at least one text."""
        return tuple(Row({field: value}, self.place).text(field) for value in self._typed(field, list, "a list of texts"))

    def inner(self, field: str) -> "Row":
        """A field that holds an object."""
        return Row(self._typed(field, dict, "an object"), self.place)

    def at(self, path: str) -> tuple["Row", str]:
        """The object with a field, and the field's name: one of the row, or one inside another (``answers.text``)."""
        outer, dot, inner = path.partition(".")
        return self.inner(outer).at(inner) if dot and path not in self else (self, path)


def without_null(value: Any) -> Any:
    """A nested value without the fields that are null.

    Example:
        >>> without_null({"role": "user", "content": "Hi", "tool_calls": None})
        {'role': 'user', 'content': 'Hi'}
    """
    if isinstance(value, dict):
        return {name: without_null(part) for name, part in value.items() if part is not None}
    return [without_null(part) for part in value] if isinstance(value, list) else value


class Rows:
    """Rows of a split.

    Args:
        data: the rows, a ``datasets.Dataset``.
        place: names the split in messages.
        contents: computes the hash of each of the split's files, in order.

    Attributes:
        split: all rows of the split.
        numbers: the rows' positions in it, which ``datasets`` does not tell of rows that are selected.
        may_lack_targets: whether their labels or answers may be missing, as in rows to be predicted.
        source_columns: the columns that the user has named for their source alone; None: those of the data module.
    """

    may_lack_targets = False
    source_columns: Mapping[str, str] | None = None

    def __init__(self, data: Any, place: str, contents: Callable[[], list[str]]) -> None:
        self.data = self.split = data
        self.place, self.contents, self.numbers = place, contents, np.arange(len(data))

    @property
    def columns(self) -> list[str]:
        """The names of the fields."""
        return list(self.data.column_names)

    @property
    def lists(self) -> list[str]:
        """The names of the fields that hold lists."""
        import datasets

        kinds = (list, datasets.List, datasets.LargeList)
        return [name for name, feature in self.data.features.items() if isinstance(feature, kinds)]

    def is_boolean(self, field: str) -> bool:
        """Whether there is such a field, and it holds true or false, which a CSV file has as texts."""
        kind = getattr(self.data.features.get(field), "dtype", None)
        texts = {value.lower() for value in self.data.unique(field) if value} if kind == "string" else set()
        return kind == "bool" or (bool(texts) and texts <= {"true", "false"})

    @functools.cached_property
    def class_names(self) -> dict[str, list[str]]:
        """For each field that holds a class index, the class names, if the data has them."""
        return {name: feature.names for name, feature in self.data.features.items() if hasattr(feature, "names")}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        """Some of the rows, as Rows; or one, as a Row."""
        places = range(len(self))[index]
        return self.select(places) if isinstance(places, range) else self.row(self.data[places], places)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, self.data, range(len(self)))

    def place_of(self, place: int) -> str:
        """The row at a place, for messages."""
        return f"{self.place}, row {self.numbers[place]} (counted from 0)"

    def row(self, fields: Mapping[str, Any], place: int) -> Row:
        """The row at a place, of its fields."""
        row = Row(fields, self.place_of(place), self.class_names)
        row.may_lack_target = self.may_lack_targets
        return row

    def select(self, places: Any) -> "Rows":
        """The rows at some places."""
        other = copy.copy(self)
        other.data, other.numbers = self.data.select(places), self.numbers[places]
        return other

    def at(self, numbers: Sequence[int]) -> "Rows":
        """Those of the rows that are at these positions in the split."""
        places = np.full(len(self.split), -1)
        places[self.numbers] = np.arange(len(self))
        found = places[np.asarray(numbers, dtype=int)]
        return self.select(found[found >= 0])

    def hashes(self, numbers: Sequence[int] | None = None) -> list[str]:
        """A hash of the fields of each row at these positions in the split; None: of all."""
        data = self.split if numbers is None else self.split.select(numbers)
        return [hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in data]

    @functools.cached_property
    def positions(self) -> dict[str, list[int]]:
        """The positions in the split of all rows with the same hash."""
        positions = dict[str, list[int]]()
        for number, row_hash in enumerate(self.hashes()):
            positions.setdefault(row_hash, []).append(number)
        return positions

    def lacking_targets(self) -> "Rows":
        """The same rows in their order in the split; their labels or answers may be missing."""
        other = self.select(np.argsort(self.numbers))
        other.may_lack_targets = True
        return other


def each(make: Callable[[S], T], items: Iterable[S | UnusableRow]) -> list[T | UnusableRow]:
    """The result of a function for each item, or the reason why an item cannot be used.

    Args:
        make: the function; it may raise an UnusableRow.
        items: the items; a reason among them stays in its place.
    """
    outcomes = list[T | UnusableRow]()
    for item in items:
        try:
            outcomes.append(item if isinstance(item, UnusableRow) else make(item))
        except UnusableRow as reason:
            outcomes.append(reason)
    return outcomes


def together(make: Callable[[list[S]], Iterable[T]], items: Sequence[S | UnusableRow]) -> list[T | UnusableRow]:
    """The results of a function that takes all usable items at once; the reasons among the items stay in their places."""
    results = iter(make([item for item in items if not isinstance(item, UnusableRow)]))
    return [item if isinstance(item, UnusableRow) else next(results) for item in items]
