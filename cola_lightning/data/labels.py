"""Labels of a classifier's rows, names or whole numbers, as text: finding them, and mapping each to its index."""

from collections.abc import Mapping

from cola_lightning.conventions import WHOLE_NUMBER
from cola_lightning.data.row import Row, plain_label
from cola_lightning.data.rows import Rows
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


def find_labels(rows: Rows, field: str) -> list[str]:
    """The labels of the rows: in the order of the data's class names if it has them, else sorted, numbers by value.

    Args:
        rows: rows that have a label, unless they may lack it.
        field: the field with the label.

    Raises:
        UserError: for a row without a label.
    """
    if names := rows.class_names.get(field):
        return list(names)
    found = {name_of_label(Row({field: value}, rows.place), field) for value in rows.values(field)}
    if None in found and not rows.may_lack_targets:
        for row in rows:
            _present(row, field)  # raises, for the first without
    labels = sorted(name for name in found if name is not None)
    return sorted(labels, key=int) if all(map(WHOLE_NUMBER.fullmatch, labels)) else labels


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
