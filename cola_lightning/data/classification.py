"""Text, or pairs of texts, with labels: data for sequence classifiers."""

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from typing_extensions import override

from cola_lightning.conventions import IGNORE_INDEX
from cola_lightning.data.labels import find_labels, name_of_label, place_of_label
from cola_lightning.data.row import Row
from cola_lightning.data.source import SourceDataModule
from cola_lightning.errors import UserError


class TextClassificationDataModule(SourceDataModule):
    """Labelled texts, or labelled pairs of texts, tokenized for a sequence classifier.

    Labels are names or whole numbers; beside ``model.label_names``, a whole number is a name's index. Without
    ``model.label_names``, they are those of the train split, or of a single file, in sorted order. ``predict`` also accepts
    rows without a label.

    Args:
        source: a file, a folder of ``train.csv`` and so on, or the id of a data set on the hub: see ``SourceDataModule``. The
            parts of a file have the same share of each label.
        subset: name of a configuration of a data set on the hub (``rte`` of ``nyu-mll/glue``).
        text_fields: the field with the text, or a list of two fields with a pair of texts; ``null``: ``sentence``.
        label_field: the field with the label.
        batch_size: rows per training batch.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies. A longer text is truncated on
            the right.
        **rows: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Raises:
        UserError: for invalid files, rows and sizes.
    """

    def __init__(
        self,
        source: str,
        subset: str | None = None,
        *,
        text_fields: list[str] | str | None = None,
        label_field: str = "label",
        batch_size: int = 32,
        max_length: int = 512,
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, batch_size=batch_size, max_length=max_length, **rows)
        fields = ["sentence"] if text_fields is None else [text_fields] if isinstance(text_fields, str) else list(text_fields)
        self.text_fields, self.label_field = fields, label_field
        if len(self.text_fields) not in (1, 2):
            raise UserError(f"data.text_fields: expected the name of a field, or of two, received {self.text_fields}")

    # ------------------------------------------------------------------ labels

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of the model's outputs.

        Raises:
            UserError: for a module that is not a classifier, or whose labels are not known yet.
        """
        names = getattr(self._module, "label_names", None)
        if names is None and (n_labels := getattr(self._module, "num_labels", None)) is not None:
            names = [str(place) for place in range(n_labels)]
        if names is None:
            raise UserError(f"model: expected a classifier, with num_labels, received {type(self._module).__name__}")
        return cast(list[str], names)

    @property
    def _module(self) -> Any:
        return self.trainer and self.trainer.lightning_module

    @property
    @override
    def target_field(self) -> str:
        return self.label_field

    @override
    def has_target(self, row: Row) -> bool:
        return row.has_target(self.label_field, getattr(self._module, "label_names", None))

    @property
    @override
    def needs_train_rows(self) -> bool:
        return getattr(self._module, "label_names", None) is None

    @override
    def look_at(self, rows: list[Row]) -> None:
        for field in self.text_fields:
            rows[0][field]  # a missing field is reported for the first row, whichever rows are drawn
        if hasattr(self._module, "settle_labels") and (found := find_labels(rows, self.label_field)):
            self._module.settle_labels(found)

    @override
    def group(self, row: Row) -> Hashable:
        return name_of_label(row, self.label_field) if row.has_target(self.label_field) else None

    # ------------------------------------------------------------------ rows

    @override
    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if not rows:
            return []
        # Labels first: their errors often reveal a wrong choice of columns or files.
        field = self.label_field
        names = self.label_names if any(row.has_target(field) for row in rows) else []
        places = {name: place for place, name in enumerate(names)}
        is_known = [row.has_target(field, names) for row in rows]
        given = getattr(self._module, "are_names_given", True)
        labels = [
            place_of_label(row, field, places, are_given=given) if known else None
            for row, known in zip(rows, is_known, strict=True)
        ]
        texts = [[row.text(field) for row in rows] for field in self.text_fields]
        tokenizer = self.tokenizer
        side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
        try:
            encoded = tokenizer(*texts, truncation=True, max_length=self.max_length)
        finally:
            tokenizer.truncation_side = side
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            if not ids:
                raise UserError(
                    f"{row.place}: expected at least one token of text in {' and '.join(self.text_fields)}, received none"
                )
        return [
            {name: values[k] for name, values in encoded.items()} | {"labels": IGNORE_INDEX if label is None else label}
            for k, label in enumerate(labels)
        ]

    @override
    def encode_train(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if (n_labels := len(self.label_names)) > len(rows):
            raise UserError(
                f"data.label_field: expected no more labels than rows of training in {self.label_field!r}, received {n_labels} "
                f"labels and {len(rows)} rows"
            )
        return self.encode(rows)

    @override
    def length(self, row: dict[str, Any]) -> int:
        return len(row["input_ids"])

    @override
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        # On the right, whatever the tokenizer's default: not every classifier with learned positions accounts for left padding.
        batch = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
