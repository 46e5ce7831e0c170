"""Predictions as a file: one line with a JSON object per row of the data, in the data's order."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.callbacks.run_folder import run_folder
from cola_lightning.errors import UserError
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

FILE_NAME = "predictions.jsonl"
PARTIAL_NAME = "predictions.partial.jsonl"


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returns to ``predictions.jsonl`` in the run's folder, atomically.

    ``predict_step`` returns a dict of columns, each with one value per row of the batch: ``prediction``, ``target`` and any
    others; tensors and arrays are written as numbers and lists, NaN and infinities as null. ``index``, the row's index in its
    data, is added, so the data is a map-style dataset. The rows of several loaders follow one another. A data module with a
    method ``fields_of(indices)`` adds the row's own fields, except those whose names the prediction has. If it leaves out rows,
    its ``unpredicted`` is the ``reason`` for each by index, which is written with a null prediction, and its
    ``indices_of(places)`` are the indices of the rows that it predicts.

    A predict that fails or is stopped leaves the rows so far in ``predictions.partial.jsonl``; of several processes, those of
    the first. A ``fast_dev_run`` writes nothing.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._lines: dict[tuple[int, int], str] = {}  # of the file, by loader and row
        self._folder = Path()
        self._batch_indices: Sequence[int] | None = None  # of the last batch

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lines = {}
        self._folder = Path(run_folder(trainer))  # on every process: run_folder broadcasts, and others may have failed later

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        columns = _plain(prediction)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not batch_indices or batch_indices is self._batch_indices:  # Lightning has none, or kept the last loader's
            raise UserError("predict: rows of an IterableDataset have no indices. Use a map-style dataset")
        data: Any = getattr(trainer, "datamodule", None)
        self._batch_indices, indices = batch_indices, [*map(int, batch_indices)]
        self._add(data, data.indices_of(indices) if hasattr(data, "indices_of") else indices, rows, dataloader_idx)

    def _add(self, data: Any, indices: Sequence[int], rows: Sequence[dict[str, Any]], dataloader_idx: int = 0) -> None:
        """Adds the lines of rows at these indices, with the data's own fields."""
        others = _plain(data.fields_of(indices)) if hasattr(data, "fields_of") else [{}] * len(rows)
        for index, row, fields in zip(indices, rows, others, strict=True):
            line = {"index": index, **row}
            line |= {name: value for name, value in fields.items() if name not in line}
            self._lines[dataloader_idx, index] = json.dumps(line, ensure_ascii=False) + "\n"

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By index: a distributed sampler distributes the rows, and repeats some so that all processes have equally many.
        parts = layout.gather_objects(self._lines)
        self._lines = {key: line for part in parts for key, line in part.items()}
        data = getattr(trainer, "datamodule", None)
        reasons: dict[int, str] = getattr(data, "unpredicted", {})
        self._add(data, [*reasons], [{"prediction": None, "reason": reason} for reason in reasons.values()])
        note = f" ({len(reasons)} of them null: the field reason says why)" if reasons else ""
        self._write(trainer, FILE_NAME, f"%d predictions{note}: %s")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._lines:
            self._write(trainer, PARTIAL_NAME, "stopped after %d predictions: %s")

    def _write(self, trainer: Trainer, name: str, message: str) -> None:
        lines, self._lines = self._lines, {}
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._folder / name
            with atomic_file(path) as partial:
                partial.write_text("".join(lines[key] for key in sorted(lines)), encoding="utf-8")
            log.info(message, len(lines), path)


def _plain(value: Any) -> Any:
    """The value in plain types: lists of numbers for tensors and arrays, None for numbers that JSON lacks, else text."""
    text = json.dumps(value, default=lambda one: one.tolist() if hasattr(one, "tolist") else str(one))
    return json.loads(text, parse_constant=lambda name: None)
