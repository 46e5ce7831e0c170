"""Labels of rows: from what a data set has in a column to the name or the index of a class, or the index of an option."""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cola_lightning.constants import IGNORE_INDEX, WHOLE_NUMBER
from cola_lightning.data.rows import Row, Rows, each
from cola_lightning.errors import UnusableRow, UserError, shortened_text

T = TypeVar("T")


def optional_in_predict(read: Callable[..., T]) -> Callable[..., T | None]:
    """The function, but it returns None if a row to be predicted has no label that can be used: predicting needs none."""

    @functools.wraps(read)
    def read_if_usable(row: Row, /, *args: Any, **kwargs: Any) -> T | None:
        try:
            return read(row, *args, **kwargs)
        except UserError:
            if row.may_lack_target:
                return None
            raise

    return read_if_usable


def plain_label(value: Any) -> Any:
    """A label without surrounding white space, or as a whole number if it equals one.

    Example:
        >>> [plain_label(value) for value in (" good ", 3, 1.0, True, 0.5)]
        ['good', 3, 1, 1, 0.5]
    """
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value.strip() if isinstance(value, str) else value


def read_label(row: Row, path: str, names: Collection[str] = (), expected: str = "a label") -> int | str:
    """A row's label. Null, an empty text and -1 mean that the row has no label.

    Args:
        row: the row.
        path: the field, or one inside another.
        names: the known labels; -1 is a label if it is one of them.
        expected: what the field should hold, for messages.

    Returns:
        Text or a whole number.

    Raises:
        UnusableRow: if the row has no label, or the field holds something else.

    Example:
        >>> [read_label(Row({"label": value}, "here"), "label", ["-1", "1"]) for value in (" good ", 1.0, True, "-1")]
        ['good', 1, 1, '-1']
    """
    holder, field = row.at(path)
    value = plain_label(holder[field])
    if value in (None, "") or (value in (-1, "-1") and "-1" not in names):
        raise holder.refused(field, expected)
    if not isinstance(value, int | str):
        raise holder.refused(field, f"{expected} as text or as a whole number")
    return value


def whole_number(label: int | str) -> int | None:
    """The number that a label is, also as text; None for a name."""
    return int(label) if isinstance(label, int) or WHOLE_NUMBER.fullmatch(label) else None


@optional_in_predict
def read_answers(row: Row, path: str) -> tuple[str, ...]:
    """The answers in a field: a text, or a list of texts. An empty text is no answer of a row to be predicted."""
    holder, field = row.at(path)
    answers = (holder.text(field),) if isinstance(holder[field], str) else holder.texts(field)
    if row.may_lack_target and not any(map(str.strip, answers)):
        raise holder.refused(field, "an answer")
    return answers


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all names are whole numbers."""
    return all(map(WHOLE_NUMBER.fullmatch, names))


@optional_in_predict
def label_index(row: Row, path: str, n_labels: int) -> int:
    """A label from 0 to ``n_labels - 1``, also as text, as a CSV file has it."""
    expected = f"a label from 0 to {n_labels - 1}"
    label = read_label(row, path, expected=expected)
    if whole_number(label) in range(n_labels):
        return int(label)
    holder, field = row.at(path)
    raise holder.refused(field, expected)


# ---------------------------------------------------------------------- one of several options


@optional_in_predict
def option_index(row: Row, path: str, options: Sequence[str]) -> int | None:
    """The index of the right option: the label is the option's text or its index.

    Raises:
        UnusableRow: if the label is missing or no option, or the text of one option and the index of another.

    Example:
        >>> [option_index(Row({"label": label}, "here"), "label", [" no", " yes"]) for label in ("yes", 1, "1", True)]
        [1, 1, 1, 1]
    """
    texts = [option.strip() for option in options]
    label = read_label(row, path, texts)
    if label in (*texts, -1):  # -1 is no index, and here it is an option's text
        return texts.index(str(label))
    holder, field = row.at(path)
    if isinstance(label, str) and (whole_number(label) is None or are_numbers(texts)):
        raise holder.refused(field, f"one of the options {', '.join(texts)}")
    # A CSV file has a number as text: it must not mean another option.
    written = str(holder[field] if isinstance(holder[field], bool) else label).lower()
    lower = [text.lower() for text in texts]
    if isinstance(label, int) and field not in holder.class_names and written in lower and lower.index(written) != label:
        place = lower.index(written)
        raise UnusableRow(f"the label {label!r} is the text of option {place} and the index of another; write it as text")
    return label_index(row, path, len(options))


# ---------------------------------------------------------------------- the classes of a classifier


def class_name(row: Row, field: str, names: Collection[str] = ()) -> str:
    """A row's class as text: a name, a whole number, or the name that the data has for it; see :func:`read_label`."""
    hint = " (for a class -1, list it in model.label_names)" if row.get(field) in (-1, "-1") else ""
    label = read_label(row, field, names, f"a label{hint}")
    class_names = row.class_names.get(field, [])
    is_index = isinstance(label, int) and label in range(len(class_names))
    return class_names[int(label)] if is_index else str(label)


@optional_in_predict
def _class_index(row: Row, reader: "ClassReader") -> int:
    """The index of a row's class, see :class:`ClassReader`."""
    if (name := class_name(row, reader.field, reader.indices)) in reader.indices:
        return reader.indices[name]
    number = whole_number(plain_label(row[reader.field]))
    is_index = number in range(len(reader.names)) and not are_numbers(reader.names)
    if number is not None and is_index and reader.are_names_given:
        return number
    listed = shortened_text(", ".join(reader.names), 200)
    hint = " (an index needs model.label_names)" if is_index else ""
    raise UnusableRow(f"{name!r} in the field {reader.field!r} is none of the labels {listed}{hint}")


@dataclass(frozen=True)
class ClassReader:
    """Reads the index of a row's class, or -100 for none.

    Attributes:
        field: the field with the label.
        names: the classes' names; none: no row has a label.
        are_names_given: whether the user gave the names and thus their order: any other number is an index.
        may_lack: whether a label may be missing, as in rows to be predicted.
    """

    field: str
    names: tuple[str, ...]
    are_names_given: bool
    may_lack: bool

    @functools.cached_property
    def indices(self) -> dict[str, int]:
        """The classes' indices, by name."""
        return {name: index for index, name in enumerate(self.names)}

    def __call__(self, row: Row) -> int:
        """The index.

        Raises:
            UnusableRow: if the label is not known, or missing where it must not be.
        """
        index = _class_index(row, self)
        return IGNORE_INDEX if index is None else index


def find_classes(rows: Rows, field: str) -> list[str]:
    """The names of the classes: in the data's order if it has class names, else sorted, numbers by value.

    ``class_encode_column`` of ``datasets`` would also make classes of null, of a blank text and of -1.

    Args:
        rows: the rows. A row whose label cannot be used has no class; it is skipped when it is encoded.
        field: the field with the label.
    """
    import datasets

    if names := rows.class_names.get(field):
        return list(names)
    if isinstance(rows.data.features[field], datasets.Json):  # of mixed types, which Arrow cannot compare
        values = [*{repr(value): value for value in rows.data[field]}.values()]
    else:
        values = rows.data.unique(field)
    found = each(lambda value: class_name(Row({field: value}, rows.place), field), values)
    return sorted_labels({name for name in found if isinstance(name, str)})


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Labels in sorted order, numbers by value."""
    labels = sorted(labels)
    return sorted(labels, key=int) if are_numbers(labels) else labels
