"""Predictions as a file: one line with a JSON object per row of the data, in the data's order."""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from typing_extensions import override

from cola_lightning.callbacks.run_folder import run_folder
from cola_lightning.errors import UserError
from cola_lightning.sharded import tensors
from cola_lightning.writing import whole_file

log = logging.getLogger(__name__)

FILE_NAME = "predictions.jsonl"
PARTIAL_NAME = "predictions.partial.jsonl"


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returns to ``predictions.jsonl`` in the run's folder, atomically.

    ``predict_step`` returns a dict of columns, each with one value per row of the batch: ``prediction``, ``target`` and any
    others; tensors and arrays are written as numbers and lists, NaN and infinities as null. ``index``, the row's index in its
    data, is added; rows without one, of an ``IterableDataset`` for example, are counted, in a single process. The rows of
    several loaders follow one another.

    A predict that fails or is stopped leaves the rows so far in ``predictions.partial.jsonl``; of several processes, those of
    the first. A ``fast_dev_run`` writes nothing.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._lines: dict[tuple[int, int], str] = {}  # of the file, by loader and row
        self._n_rows = Counter[int]()  # so far, of each loader
        self._folder = Path()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lines, self._n_rows = {}, Counter()
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
        columns = {name: _plain(values) for name, values in prediction.items()}
        if not _has_indices(trainer, dataloader_idx):
            batch_indices = None  # not those of the last batch that had any, which Lightning gives here
            if trainer.world_size > 1:
                raise UserError(
                    "predict: expected a loader that batches rows with indices (no IterableDataset) where "
                    f"{trainer.world_size} processes share its rows, received another; trainer.devices 1 takes any"
                )
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        first = self._n_rows[dataloader_idx]
        indices = range(first, first + len(rows)) if batch_indices is None else batch_indices
        for index, row in zip(indices, rows, strict=True):
            self._lines[dataloader_idx, int(index)] = json.dumps({"index": int(index), **row}, ensure_ascii=False) + "\n"
        self._n_rows[dataloader_idx] += len(rows)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By index: a distributed sampler distributes the rows, and repeats some so that all processes have equally many.
        lines = {key: line for part in tensors.gather_objects(self._lines) for key, line in part.items()}
        self._lines = {}
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._folder / FILE_NAME
            _write(lines, path)
            log.info("%d predictions: %s", len(lines), path)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        lines, self._lines = self._lines, {}
        if lines and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._folder / PARTIAL_NAME
            _write(lines, path)
            log.info("stopped after %d predictions: %s", len(lines), path)


def _write(lines: dict[tuple[int, int], str], path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text("".join(lines[key] for key in sorted(lines)), encoding="utf-8")


def _plain(value: Any) -> Any:
    """A value of tensors and arrays in plain types; None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, dict) else value


def _has_indices(trainer: Trainer, dataloader_idx: int) -> bool:
    """Whether Lightning knows the indices of a loader's rows."""
    loader = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened[dataloader_idx]
    return hasattr(getattr(loader, "batch_sampler", None), "seen_batch_indices")
