"""Text, or pairs of texts, with labels: data for sequence classifiers."""

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from cola_lightning.constants import IGNORE_INDEX, WHOLE_NUMBER
from cola_lightning.data.encoding import TOO_LONG
from cola_lightning.data.report import RowReport
from cola_lightning.data.rows import Row, Rows, each, plain_label, together
from cola_lightning.data.source import Source, SourceDataModule
from cola_lightning.errors import UnusableRow, UserError, shortened_text

# Columns with a text, or a pair of texts, and with its label, by the first that a data set has.
TEXTS = [["premise", "hypothesis"], ["sentence1", "sentence2"], ["question1", "question2"], ["question", "sentence"]]
TEXTS += [["text"], ["sentence"], ["content"], ["review"]]
LABELS = ["label", "labels"]


class TextClassificationDataModule(SourceDataModule):
    """Labelled texts, or labelled pairs of texts, tokenized for a sequence classifier.

    Labels are names or whole numbers; with ``model.label_names``, a whole number is a name's index. Without
    ``model.label_names``, they are those of the train split, or of a single file: its class names in their order, else sorted.
    ``predict`` also accepts rows without a label.

    Args:
        source: a file, a folder of ``train.csv`` and so on, or the id of a data set on the hub: see ``SourceDataModule``. The
            parts of a file have the same share of each label.
        subset: name of a configuration of a data set on the hub (``rte`` of ``nyu-mll/glue``).
        text_fields: the column with the text, or a list of two with a pair of texts; ``null``: found by their names:
            ``premise`` and ``hypothesis``, ``sentence1`` and ``sentence2``, ``text``, ``sentence``, and so on.
        label_field: the column with the label; ``null``: ``label`` or ``labels``.
        batch_size: rows per training batch.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies. A longer text is truncated on
            the right.
        **rows: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Raises:
        UserError: for invalid files, rows and sizes.
    """

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        text_fields: list[str] | str | None = None,
        label_field: str | None = None,
        batch_size: int = 32,
        max_length: int = 512,
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, batch_size=batch_size, max_length=max_length, **rows)
        self.text_fields = [text_fields] if isinstance(text_fields, str) else text_fields
        self.label_field = label_field

    def _find(self, names: Sequence[str], *, has_label: bool = True) -> tuple[list[str], str]:
        """The columns with the text, or the pair of texts, and with the label, if there must be one; logs them once."""
        listed = ", ".join(names)
        texts = self.text_fields or next((pair for pair in TEXTS if {*pair} <= {*names}), [])
        if not 0 < len(texts) <= 2 or not {*texts} <= {*names}:
            got = f", got {', '.join(texts)}" if texts else ""
            raise UserError(f"data.text_fields: name one or two of the columns {listed}{got}")
        label = self.label_field or next((name for name in LABELS if name in names), None if has_label else LABELS[0])
        if label is None or (has_label and label not in names):
            raise UserError(f"data.label_field: name one of the columns {listed}{f', got {label}' if label else ''}")
        self._log_columns(f"{', '.join(texts)} -> {label}", names, (*texts, label))
        return texts, label

    # ------------------------------------------------------------------ labels

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of the model's outputs."""
        names = getattr(self._module, "label_names", None)
        return list(map(str, range(self._module.num_labels))) if names is None else list(names)

    @property
    def _module(self) -> Any:
        return self.trainer and self.trainer.lightning_module

    @override
    def setup(self, stage: str) -> None:
        is_known = getattr(self._module, "label_names", None) is not None
        if hasattr(self._module, "settle_labels") and (stage == "fit" or not is_known):
            trained = [self._train(splits) for splits in self._splits if stage == "fit" or self.train_split in splits]
            found = [find_labels(rows, self._find(rows.columns)[1]) for rows in trained]
            if labels := {*itertools.chain.from_iterable(found)}:
                self._module.settle_labels(found[0] if all(one == found[0] for one in found) else sorted_labels(labels))
        super().setup(stage)

    @override
    def groups(self, rows: Rows) -> list[Hashable] | None:
        _, label = self._find(rows.columns, has_label=not rows.may_lack_targets)
        return [name_of_label(row, label) if row.has_target(label) else None for row in rows]

    # ------------------------------------------------------------------ rows

    @override
    def encode(self, rows: Rows, part: str) -> tuple[Any, RowReport]:
        texts, label = self._find(rows.columns, has_label=not rows.may_lack_targets)
        names = None if rows.may_lack_targets and label not in rows.columns else self.label_names
        are_given = getattr(self._module, "are_names_given", True)
        places = {name: place for place, name in enumerate(names or [])}

        def read(row: Row) -> tuple[int, list[str]]:
            known = row.has_target(label, names)
            index = place_of_label(row, label, places, are_given=are_given) if known else IGNORE_INDEX
            return index, [row.text(name) for name in texts]

        features = {name: ["int32"] for name in self.tokenizer("a")} | {"labels": "int64"}
        options = texts, label, names, are_given, rows.may_lack_targets, self.too_long
        return self.map_rows(rows, features, *options, encode=lambda some, notes: together(self._tokens, each(read, some)))

    def _tokens(self, read: list[tuple[int, list[str]]]) -> list[list[dict[str, Any]] | UnusableRow]:
        """Tokenizes rows, whose labels and texts are given."""
        if not read:
            return []
        tokenizer, inputs = self.tokenizer, [list(column) for column in zip(*(texts for _, texts in read), strict=True)]
        side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
        try:
            encoded = tokenizer(*inputs, truncation=True, max_length=self.max_length)
        finally:
            tokenizer.truncation_side = side

        def row(k: int) -> list[dict[str, Any]]:
            lost = encoded.encodings[k].overflowing if encoded.encodings else []
            made = {name: values[k] for name, values in encoded.items()} | {"labels": read[k][0]}
            if not made["input_ids"]:
                raise UnusableRow("no text")
            if lost and self.too_long == "skip":
                raise UnusableRow(TOO_LONG)
            return [made | {"lost": sum(len(one.ids) - sum(one.special_tokens_mask) for one in lost)}]

        return each(row, range(len(read)))

    @override
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: value for name, value in row.items() if name not in ("labels", "length")} for row in rows]
        # On the right, whatever the tokenizer's default: not every classifier with learned positions accounts for left padding.
        batch = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


# ---------------------------------------------------------------------- columns and labels


def name_of_label(row: Row, field: str) -> str | None:
    """A row's label as text: a name without surrounding white space, a whole number, or a class name; None if there is none.

    Raises:
        UserError: if the data has no such field.
        UnusableRow: if it holds something else.

    Example:
        >>> [name_of_label(Row({"label": value}, "here"), "label") for value in (" good ", 3, 1.0, True, "", None, -1)]
        ['good', '3', '1', '1', None, None, None]
    """
    value = plain_label(row[field])
    if value in (None, -1, ""):
        return None
    if not isinstance(value, int | str):
        raise row.refused(field, "a label as text or as a whole number")
    names = row.class_names.get(field, [])
    return names[value] if isinstance(value, int) and value in range(len(names)) else str(value)


def find_labels(rows: Rows, field: str) -> list[str]:
    """The labels of the rows: in the order of the data's class names if it has them, else sorted, numbers by value.

    Args:
        rows: the rows, of which each has a label or is refused when it is encoded.
        field: the field with the label.
    """
    if names := rows.class_names.get(field):
        return list(names)
    found = {name_of_label(Row({field: value}, rows.place), field) for value in rows.values(field)}
    return sorted_labels(name for name in found if name is not None)


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Labels in sorted order, numbers by value."""
    labels = sorted(labels)
    return sorted(labels, key=int) if all(map(WHOLE_NUMBER.fullmatch, labels)) else labels


def place_of_label(row: Row, field: str, places: Mapping[str, int], *, are_given: bool = True) -> int:
    """The index of a row's label among the known labels.

    Args:
        row: the row.
        field: the field with the label.
        places: the labels' indices, by name.
        are_given: whether the user gave the names and thus their order: any other number is an index.

    Raises:
        UnusableRow: if the label is not known, or missing.
    """
    if (name := name_of_label(row, field)) is None:
        raise row.refused(field, "a label")
    if name in places:
        return places[name]
    value = plain_label(row[field])
    is_number = isinstance(value, int) or WHOLE_NUMBER.fullmatch(value)
    is_index = is_number and int(value) in range(len(places)) and not all(map(WHOLE_NUMBER.fullmatch, places))
    if is_index and are_given:
        return int(value)
    listed = shortened_text(", ".join(places), 200)
    hint = " (an index needs model.label_names)" if is_index else ""
    raise UnusableRow(f"{name!r} in the field {field!r} is none of the labels {listed}{hint}")
