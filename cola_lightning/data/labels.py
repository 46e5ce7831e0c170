"""Labels of a classifier's rows, names or whole numbers, as text: finding them, and mapping each to its index."""

from collections.abc import Mapping, Sequence

from cola_lightning.conventions import WHOLE_NUMBER
from cola_lightning.data.row import Row, plain_label
from cola_lightning.errors import UnusableRow, UserError, shortened_text

MOST_LISTED = 20  # labels in a message


def name_of_label(row: Row, field: str) -> str | None:
    """A row's label as text: a name without surrounding white space, a whole number, or a class name; None if there is none.

    Raises:
        UserError: if the field is missing, or holds something else.

    Example:
        >>> [name_of_label(Row({"label": value}, "here"), "label") for value in (" good ", 3, 1.0, True, "", None, -1)]
        ['good', '3', '1', '1', None, None, None]
    """
    value = plain_label(row[field])
    if value in (None, -1, ""):
        return None
    if not isinstance(value, int | str):
        received = shortened_text(repr(value))
        raise UserError(f"{row.place}: expected a label, text or a whole number, in the field {field!r}, received {received}")
    names = row.class_names.get(field, [])
    return names[value] if isinstance(value, int) and value in range(len(names)) else str(value)


def find_labels(rows: Sequence[Row], field: str) -> list[str]:
    """The labels of the rows: in the order of the data's class names if it has them, else sorted, numbers by value.

    Args:
        rows: rows that have a label, unless they may lack it.
        field: the field with the label.

    Raises:
        UserError: for the first row without a label, and if some labels are numbers and others are text.

    Example:
        >>> find_labels([Row({"label": value}, "here") for value in ("10", "9", "9")], "label")
        ['9', '10']
    """
    first: dict[type, Row] = {}
    found = set()
    for row in rows:
        if not row.has_target(field):
            continue
        found.add(_present(row, field))
        first.setdefault(type(plain_label(row[field])), row)
    if len(first) > 1:
        one, other = first.values()
        raise UserError(
            f"{other.place}: expected labels that are all text or all numbers in the field {field!r}, received "
            f"{other[field]!r}, and {one[field]!r} in {one.place}"
        )
    if found and (names := rows[0].class_names.get(field)):
        return names
    are_numbers = all(WHOLE_NUMBER.fullmatch(name) for name in found)
    return sorted(found, key=int) if are_numbers else sorted(found)


def _present(row: Row, field: str) -> str:
    if (name := name_of_label(row, field)) is None:
        raise UnusableRow(f"{row.place}: expected a label in the field {field!r}, received {row[field]!r}")
    return name


def place_of_label(row: Row, field: str, places: Mapping[str, int], *, are_given: bool = True) -> int:
    """The index of a row's label among the known labels.

    Args:
        row: the row.
        field: the field with the label.
        places: the labels' indices, by name.
        are_given: whether the user gave the names and thus their order: any other number is an index.

    Raises:
        UserError: if the label is not known, or missing.
    """
    name = _present(row, field)
    if name in places:
        return places[name]
    value = plain_label(row[field])
    is_number = isinstance(value, int) or WHOLE_NUMBER.fullmatch(value)
    is_index = is_number and int(value) in range(len(places)) and not all(map(WHOLE_NUMBER.fullmatch, places))
    if is_index and are_given:
        return int(value)
    names = [*places]
    listed = ", ".join(names[:MOST_LISTED]) + (f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else "")
    hint = " (an index needs model.label_names)" if is_index else ""
    raise UserError(f"{row.place}: expected one of the labels {listed} in the field {field!r}, received {name!r}{hint}")
