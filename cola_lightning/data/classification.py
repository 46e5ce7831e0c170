"""Text, or pairs of texts, with labels: data for sequence classifiers."""

from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override

from cola_lightning.data.rows import Row
from cola_lightning.data.text import SourceDataModule
from cola_lightning.errors import UserError


class TextClassificationDataModule(SourceDataModule):
    """Labelled texts, or pairs of them, as a model's tokenizer writes them.

    Args:
        source: a folder of ``train.jsonl`` and so on, one JSON object a line, or the id of a data set on the hub.
        subset: on the hub, the name of a configuration (``rte`` of ``nyu-mll/glue``).
        text_fields: the field that holds the text, or the two that hold a pair.
        label_field: the field that holds the label, from 0.
        batch_size: rows in a training batch.
        max_length: of a sequence, in tokens; the model's own limit holds too. A longer text loses its end.
        **rows: which rows there are, and how they are batched: the other arguments of ``SourceDataModule``.

    Raises:
        UserError: for files, rows and sizes that cannot be.
    """

    def __init__(
        self,
        source: str,
        subset: str | None = None,
        *,
        text_fields: list[str] | None = None,
        label_field: str = "label",
        batch_size: int = 32,
        max_length: int = 512,
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, batch_size=batch_size, max_length=max_length, **rows)
        self.text_fields, self.label_field = ["sentence"] if text_fields is None else text_fields, label_field
        if len(self.text_fields) not in (1, 2):
            raise UserError(f"data.text_fields: expected the name of a field, or of two, received {self.text_fields}")

    @override
    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if not rows:
            return []
        texts = [[row.text(field) for row in rows] for field in self.text_fields]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            if not ids:
                raise UserError(
                    f"{row.place}: expected at least one token of text in {' and '.join(self.text_fields)}, received none"
                )
        labels = [row.label(self.label_field, self._n_labels) for row in rows]
        return [{name: values[k] for name, values in encoded.items()} | {"labels": label} for k, label in enumerate(labels)]

    @property
    def _n_labels(self) -> int:
        module = self.trainer and self.trainer.lightning_module
        if (n_labels := getattr(module, "num_labels", None)) is None:
            raise UserError(f"model: expected a classifier, with num_labels, received {type(module).__name__}")
        return int(n_labels)

    @override
    def length(self, row: dict[str, Any]) -> int:
        return len(row["input_ids"])

    @override
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        # On the right, whatever the tokenizer prefers: not every classifier with learned positions asks where padding ends.
        batch = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
