"""Rows of a data set: their fields by name and type, and the split they are in, in Arrow and memory-mapped by ``datasets``."""

import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from cola_lightning.data.drawing import as_count, draw
from cola_lightning.data.report import RowReport
from cola_lightning.errors import UnusableRow, UserError, shortened_text

S = TypeVar("S")
T = TypeVar("T")
# Encodes each row as one or more rows of tokens, or returns why it cannot be used. It adds lines for the log to the set.
Encode = Callable[["list[Row]", set[str]], "Sequence[list[dict[str, Any]] | UnusableRow]"]

ENCODED_TOGETHER = 1_000  # rows
WORTH_A_BAR = 20_000  # rows, whose preparation takes seconds
VALIDATION_SHARE, MOST_VALIDATION_ROWS = 0.1, 1_000  # of the training rows, if there is no validation split


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
        data: the split, a ``datasets.Dataset``.
        place: names it in messages.
        numbers: the positions of these rows in the split; None: all.

    Attributes:
        columns: the names of the fields.
        lists: the names of the fields that hold lists.
        booleans: the names of the fields that hold true or false.
        class_names: for each field that holds a class index, the class names, if the data has them.
        may_lack_targets: whether their labels or answers may be missing, as in rows to be predicted.
        source_columns: the columns that the user has named for their source alone; None: those of the data module.
        drawing: how parts are drawn from these rows, for the log.
    """

    may_lack_targets = False
    source_columns: Mapping[str, str] | None = None
    drawing = "by data.split_seed"

    def __init__(self, data: Any, place: str, numbers: Any = None) -> None:
        import datasets

        self.data, self.place = data, place
        self.numbers = np.arange(len(data)) if numbers is None else np.asarray(numbers, dtype=np.int64)
        self.columns = list(data.column_names)
        self.class_names = {name: feature.names for name, feature in data.features.items() if hasattr(feature, "names")}
        kinds = (list, datasets.List, datasets.LargeList)
        self.lists = [name for name, feature in data.features.items() if isinstance(feature, kinds)]
        self.booleans = [name for name, feature in data.features.items() if getattr(feature, "dtype", None) == "bool"]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        """Some of the rows, as Rows; or one, as a Row."""
        if isinstance(index, slice):
            return self.at_numbers(self.numbers[index])
        return self._row(self.data[int(self.numbers[index])], int(self.numbers[index]))

    def __iter__(self) -> Iterator[Row]:
        for number, fields in zip(self.numbers, self._selected(), strict=True):
            yield self._row(fields, int(number))

    def _row(self, fields: Mapping[str, Any], number: int) -> Row:
        row = Row(fields, f"{self.place}, row {number} (counted from 0)", self.class_names)
        row.may_lack_target = self.may_lack_targets
        return row

    def _selected(self) -> Any:
        is_all = np.array_equal(self.numbers, np.arange(len(self.data)))
        return self.data if is_all else self.data.select(self.numbers)

    def at_numbers(self, numbers: Any) -> "Rows":
        """Other rows of the same split, by their positions in it."""
        other = copy.copy(self)
        other.numbers = np.asarray(numbers, dtype=np.int64)
        return other

    @property
    def default_val_size(self) -> int:
        """How many of these rows are drawn for validation if there is no validation split."""
        return min(as_count(VALIDATION_SHARE, len(self)), MOST_VALIDATION_ROWS)

    def drawn(self, sizes: Mapping[str, float | None], seed: int, groups: Sequence[object] | None = None) -> dict[str, "Rows"]:
        """Disjoint parts of the rows, see :func:`~cola_lightning.data.drawing.draw`; in their order if one part takes all.

        Args:
            sizes: the size of each part, ``train``, ``val`` or ``test``; None: the rest.
            seed: the permutation's seed.
            groups: each row's group.

        Raises:
            UserError: if there are fewer rows than the parts need.
        """
        if [*sizes.values()] == [None]:
            return dict.fromkeys(sizes, self)
        counts = {part: None if size is None else as_count(size, len(self)) for part, size in sizes.items()}
        rest = max(len(self) - sum(count or 0 for count in counts.values()), 1)
        needed = [rest if count is None else count for count in counts.values()]
        what = f"{' + '.join(f'data.{part}_size' for part in counts)}, of {self.place}"
        drawn = draw(len(self), needed, seed, what, groups)
        return {part: self.at_numbers(self.numbers[places]) for part, places in zip(counts, drawn, strict=True)}

    def lacking_targets(self) -> "Rows":
        """The same rows in their order in the split; their labels or answers may be missing."""
        other = self.at_numbers(np.sort(self.numbers))
        other.may_lack_targets = True
        return other

    def values(self, field: str) -> list[Any]:
        """The different values of a field."""
        return list(self._selected().unique(field))

    def encoded(self, encode: Callable[[list[Row]], Iterable[T | UnusableRow]]) -> tuple[list[T], RowReport]:
        """A list of the rows that can be used, encoded, and a report on all rows.

        Args:
            encode: encodes each row, or returns the reason why it cannot be used; called with a thousand rows at a time.
        """
        encoded, report = list[T](), RowReport(len(self))
        for start in range(0, len(self), ENCODED_TOGETHER):
            rows = list(self[start : start + ENCODED_TOGETHER])
            for index, (row, outcome) in enumerate(zip(rows, encode(rows), strict=True), start):
                if isinstance(outcome, UnusableRow):
                    report.skip(str(outcome), row.place)
                    report.unusable[index] = str(outcome)
                else:
                    encoded.append(outcome)
        return encoded, report

    def mapped(
        self, encode: Encode, features: Mapping[str, Any], identity: str | None, num_proc: int | None = None
    ) -> tuple[Any, RowReport]:
        """Encodes the rows, a thousand at a time, into a data set that is memory-mapped, too, and cached by ``datasets``.

        Args:
            encode: makes rows of the result, with ``input_ids``, or else with a ``length`` above 0.
            features: the types of their columns: ``int32``, say, or ``[int32]`` for a list.
            identity: of ``encode``: what it depends on besides the rows. None: it cannot be known, and nothing is cached.
            num_proc: processes that encode; None: this one.

        Returns:
            The data set, with a column ``length``, and a report on the rows. The report is stored with the rows, so that a
            start from the cache says the same.
        """
        import datasets
        from datasets.fingerprint import get_temporary_cache_files_directory

        stored = {**features, "length": "int32", "lost": "int32", "skipped": ["string"], "notes": ["string"]}

        def batch(columns: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
            fields = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            rows = [self._row(values, int(self.numbers[place])) for values, place in zip(fields, places, strict=True)]
            notes, encoded = set[str](), list[dict[str, Any]]()
            for row, outcome in zip(rows, encode(rows, notes), strict=True):
                # A row that is skipped leaves one without tokens, which holds the reason.
                encoded += [{"skipped": [str(outcome), row.place]}] if isinstance(outcome, UnusableRow) else outcome
            for line in encoded:
                line.setdefault("length", len(line.get("input_ids", ())))
            encoded[0]["notes"] = sorted(notes)  # each row becomes at least one line
            empty: dict[str, Any] = {name: [] if isinstance(kind, list) else 0 for name, kind in stored.items()}
            return {name: [line.get(name, value) for line in encoded] for name, value in empty.items()}

        paths = [file["filename"] for file in self.data.cache_files]
        files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
        known = repr((identity or os.urandom(16), sorted(stored.items()), files)).encode()
        fingerprint = hashlib.sha256(known + self.numbers.tobytes()).hexdigest()[:32]
        values = {
            name: datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
            for name, kind in stored.items()
        }
        file = None if identity else f"{get_temporary_cache_files_directory()}/{fingerprint}.arrow"  # deleted at the end
        with progress_bar_if(len(self) >= WORTH_A_BAR):
            data = self._selected().map(
                batch,
                batched=True,
                with_indices=True,
                new_fingerprint=fingerprint,
                cache_file_name=file,
                num_proc=num_proc,
                desc=f"{self.place}: preparing rows",
                remove_columns=self.columns,
                features=datasets.Features(values),
            )
        return _without_skipped(data, len(self))


def _without_skipped(data: Any, n_rows: int) -> tuple[Any, RowReport]:
    """Encoded rows that can be used, and a report on all of them."""
    columns = data.with_format("arrow")
    flat = {name: columns[name][:].combine_chunks().flatten() for name in ("skipped", "notes")}
    lengths, lost = (data.with_format("numpy")[name][:] for name in ("length", "lost"))
    report = RowReport(n_rows, int((lost > 0).sum()), int(lost.sum()), int(lengths.sum()), notes={*flat["notes"].to_pylist()})
    if "spans" in data.column_names:
        edges = columns["spans"][:].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        report.n_trained = int(edges[1::2].sum() - edges[::2].sum())
    reasons, places = flat["skipped"][::2].to_pylist(), flat["skipped"][1::2].to_pylist()
    for reason, place in zip(reasons, places, strict=True):
        report.skip(reason, place)
    if reasons:
        report.unusable = dict(zip(np.flatnonzero(lengths == 0).tolist(), reasons, strict=True))
        data = data.select(np.flatnonzero(lengths))
    return data.remove_columns(["lost", "skipped", "notes"]), report


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


@contextmanager
def progress_bar_if(is_shown: bool) -> Iterator[None]:
    """Inside the block: the progress bars of ``datasets``, or none."""
    import datasets

    are_on = not datasets.are_progress_bars_disabled()
    if not is_shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if are_on:
            datasets.enable_progress_bars()
