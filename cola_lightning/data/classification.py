"""Rows with labels: what data for classifiers share, and texts, or pairs of texts, for sequence classifiers."""

import itertools
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from cola_lightning.data.labels import ClassReader, class_name, find_classes, sorted_labels
from cola_lightning.data.preprocessing import TokenPreprocessor
from cola_lightning.data.render import TOO_LONG, TooLong
from cola_lightning.data.rows import Row, Rows, each
from cola_lightning.data.source import Source, SourceDataModule
from cola_lightning.data.tokenized import TokenizedDataModule
from cola_lightning.errors import UnusableRow, UserError, shortened_text

# Columns with a text, or a pair of texts, and with its label, by the first that a data set has.
TEXTS = [["premise", "hypothesis"], ["sentence1", "sentence2"], ["question1", "question2"], ["question", "sentence"]]
TEXTS += [["text"], ["sentence"], ["content"], ["review"]]
LABELS = ["label", "labels"]


class LabelledDataModule(SourceDataModule):
    """Rows with labels, for classifiers.

    Labels are names or whole numbers; with ``model.label_names``, a whole number is a name's index. Without
    them, they are those of the train split, or of a single file: its class names in their order, else sorted. ``predict`` also
    accepts rows without a label.

    Args:
        source: A file, a folder, or the id of a data set on the hub. The parts of a file have the same share of each label.
        subset: Name of a configuration of a data set on the hub.
        label_field: Column with the label. ``null`` uses ``label`` or ``labels``.
        batch_size: Rows in a training batch.
        **rows: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Attributes:
        label_names: the labels in the order of the model's outputs. They are the trained module's. Without a Trainer, they
            may be set before ``setup``; otherwise they are those of the train split.
    """

    label_names: Sequence[str] = ()
    _are_names_given = True

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        label_field: str | None = None,
        batch_size: int = 32,
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, batch_size=batch_size, **rows)
        self.label_field = label_field

    @abstractmethod
    def find_inputs(self, columns: Sequence[str]) -> list[str]:
        """Those of a data set's columns that hold the inputs."""

    def _find_columns(self, rows: Rows) -> tuple[list[str], str]:
        """The columns with the inputs, and with the label, if there must be one; logs them once."""
        names, has_label, listed = rows.columns, not rows.may_lack_targets, ", ".join(rows.columns)
        inputs = self.find_inputs(names)
        label = self.label_field or next((name for name in LABELS if name in names), None if has_label else LABELS[0])
        if label is None or (has_label and label not in names):
            raise UserError(f"data.label_field: name one of the columns {listed}{f', got {label}' if label else ''}")
        self._log_columns(f"{', '.join(inputs)} -> {label}", names, (*inputs, label))
        return inputs, label

    # ------------------------------------------------------------------ labels

    @override
    def setup(self, stage: str) -> None:
        module: Any = self.trainer and self.trainer.lightning_module
        if module is None:
            self.label_names = self.label_names or self._find_classes(stage)
        else:
            settles = stage == "fit" or getattr(module, "label_names", None) is None
            if settles and hasattr(module, "settle_labels") and (classes := self._find_classes(stage)):
                module.settle_labels(classes)
            self.label_names = getattr(module, "label_names", None) or [str(index) for index in range(module.num_labels)]
            self._are_names_given = getattr(module, "are_names_given", True)
        self._log(f"{len(self.label_names)} labels: {shortened_text(', '.join(self.label_names), 200)}")
        super().setup(stage)

    def _find_classes(self, stage: str) -> list[str]:
        """The classes of the rows to train on: in the order of all sources if it is the same, else sorted."""
        splits = [splits for splits in self._splits if stage == "fit" or self.train_split in splits]
        found = [find_classes(rows, self._find_columns(rows)[1]) for rows in map(self._train_rows, splits)]
        is_same = all(classes == found[0] for classes in found)
        return found[0] if found and is_same else sorted_labels({*itertools.chain.from_iterable(found)})

    @override
    def groups(self, rows: Rows) -> list[Hashable] | None:
        _, label = self._find_columns(rows)
        labels = [Row({label: value}, rows.place, rows.class_names) for value in rows.data[label]]  # without other columns
        found = each(lambda row: class_name(row, label, self.label_names), labels)
        return [name if isinstance(name, str) else None for name in found]

    def class_reader(self, rows: Rows, label: str) -> ClassReader:
        """What reads the classes of rows from a column."""
        lacks_column = rows.may_lack_targets and label not in rows.columns
        names = () if lacks_column else tuple(self.label_names)
        return ClassReader(label, names, self._are_names_given, rows.may_lack_targets)


@dataclass(frozen=True)
class LabelledTexts(TokenPreprocessor):
    """Texts, or pairs of texts, with their labels.

    Attributes:
        columns: those with the texts.
        label: reads a row's label.
        too_long: whether to shorten or to skip a longer text.
        features: what the tokenizer returns, and the label.
    """

    columns: tuple[str, ...]
    label: ClassReader
    too_long: TooLong
    features: Mapping[str, Any]

    @override
    def read(self, row: Row) -> tuple[int, list[str]]:
        return self.label(row), [row.text(name) for name in self.columns]

    @override
    def encode(self, items: Sequence[tuple[int, list[str]]], notes: set[str]) -> list[list[dict[str, Any]] | UnusableRow]:
        tokenizer, inputs = self.tokenizer, [list(column) for column in zip(*(texts for _, texts in items), strict=True)]
        whole = tokenizer(*inputs, verbose=False)  # which does not warn of long texts

        def encoded_row(k: int) -> list[dict[str, Any]]:
            label, texts = items[k]
            row, n_tokens = {name: values[k] for name, values in whole.items()}, len(whole["input_ids"][k])
            if not n_tokens:
                raise UnusableRow("no text")
            if n_tokens > self.max_length:
                if self.too_long == "skip":
                    raise UnusableRow(TOO_LONG)
                side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
                try:
                    row = dict(tokenizer(*texts, truncation=True, max_length=self.max_length))
                finally:
                    tokenizer.truncation_side = side
            return [row | {"labels": label, "lost": n_tokens - len(row["input_ids"])}]

        return each(encoded_row, range(len(items)))

    @override
    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: value for name, value in row.items() if name not in ("labels", "length")} for row in examples]
        # On the right, whatever the tokenizer's default: not every classifier with learned positions accounts for left padding.
        batch = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in examples])}


class TextClassificationDataModule(TokenizedDataModule, LabelledDataModule):
    """Labelled texts, or labelled pairs of texts, tokenized for a sequence classifier.

    Labels are names or whole numbers; with ``model.label_names``, a whole number is a name's index. Without
    them, they are those of the train split, or of a single file: its class names in their order, else sorted. ``predict`` also
    accepts rows without a label.

    Args:
        source: a file, a folder of ``train.csv`` and so on, or the id of a data set on the hub: see ``SourceDataModule``. The
            parts of a file have the same share of each label.
        subset: name of a configuration of a data set on the hub (``rte`` of ``nyu-mll/glue``).
        text_fields: the column with the text, or a list of two with a pair of texts; ``null``: found by their names:
            ``premise`` and ``hypothesis``, ``sentence1`` and ``sentence2``, ``text``, ``sentence``, and so on.
        label_field: the column with the label; ``null``: ``label`` or ``labels``.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies. A longer text is truncated on
            the right.
        **labelled: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Attributes:
        label_names: the labels in the order of the model's outputs. They are the trained module's. Without a Trainer, they
            may be set before ``setup``; otherwise they are those of the train split.

    Raises:
        UserError: for invalid files, rows and sizes.
    """

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        text_fields: list[str] | str | None = None,
        max_length: int = 512,
        **labelled: Any,
    ) -> None:
        super().__init__(source, subset, max_length=max_length, **labelled)
        self.text_fields = [text_fields] if isinstance(text_fields, str) else text_fields

    @override
    def find_inputs(self, columns: Sequence[str]) -> list[str]:
        texts = self.text_fields or next((pair for pair in TEXTS if {*pair} <= {*columns}), [])
        if not 0 < len(texts) <= 2 or not {*texts} <= {*columns}:
            got = f", got {', '.join(texts)}" if texts else ""
            raise UserError(f"data.text_fields: name one or two of the columns {', '.join(columns)}{got}")
        return texts

    @override
    def preprocessor_of(self, rows: Rows, part: str) -> LabelledTexts:
        texts, label = self._find_columns(rows)
        features = {name: ["int32"] for name in self.tokenizer("a")} | {"labels": "int64"}
        reader = self.class_reader(rows, label)
        return LabelledTexts(self.tokenizer, self.max_length, tuple(texts), reader, self.too_long, features)
