"""Predictions as a file: one line with a JSON object per row of the data, in the data's order."""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from typing_extensions import override

from cola_lightning.callbacks.run_folder import run_folder
from cola_lightning.errors import DiskError, UserError
from cola_lightning.sharded import processes
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
        if not isinstance(prediction, dict):
            raise UserError(
                f"{type(pl_module).__name__}.predict_step: expected a dict of columns, received {type(prediction).__name__}"
            )
        columns = {name: _plain(values) for name, values in prediction.items()}
        if not _has_indices(trainer, dataloader_idx):
            batch_indices = None  # not those of the last batch that had any, which Lightning gives here
            if trainer.world_size > 1:
                raise UserError(
                    "predict: expected a loader that batches rows with indices (no IterableDataset) where "
                    f"{trainer.world_size} processes share its rows, received another; trainer.devices 1 takes any"
                )
        module = type(pl_module).__name__
        _check_columns(columns, None if batch_indices is None else len(batch_indices), module)
        for place, values in enumerate(zip(*columns.values(), strict=True)):
            index = self._n_rows[dataloader_idx] if batch_indices is None else int(batch_indices[place])
            self._n_rows[dataloader_idx] += 1
            self._lines[dataloader_idx, index] = _line({"index": index, **dict(zip(columns, values, strict=True))}, module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By index: a distributed sampler distributes the rows, and repeats some so that all processes have equally many.
        lines = {key: line for part in processes.gather_objects(self._lines) for key, line in part.items()}
        if trainer.is_global_zero and trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("no predictions: trainer.fast_dev_run writes none")
        elif trainer.is_global_zero:
            path = self._folder / FILE_NAME
            _write(lines, path)
            log.info("%d predictions: %s", len(lines), path)
        self._lines = {}

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        lines, self._lines = self._lines, {}
        if not lines or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._folder / PARTIAL_NAME
        of = f" of the first of {trainer.world_size} processes" if trainer.world_size > 1 else ""
        try:
            _write(lines, path)
            log.info("stopped after %d predictions%s: %s", len(lines), of, path)
        except DiskError as error:  # the exception that stopped the run is the one to be raised
            log.warning("%s", error)


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


def _check_columns(columns: dict[str, Any], n_rows: int | None, module: str) -> None:
    """Refuses columns that are no rows, at the first batch and not after the last.

    Args:
        columns: plain values.
        n_rows: rows of the batch; None: not known, but the same for all columns.
        module: name of its class.

    Raises:
        UserError: naming the first.
    """
    if n_rows is None:
        n_rows = next((len(values) for values in columns.values() if isinstance(values, Sized)), 1)
    for name, values in columns.items():
        if not isinstance(values, Sized) or len(values) != n_rows:
            received = f"{len(values)} values" if isinstance(values, Sized) else f"a {type(values).__name__}"
            raise UserError(
                f"{module}.predict_step: expected columns of {n_rows} values, one for each row of the batch, received {name!r} "
                f"with {received}"
            )


def _line(row: dict[str, Any], module: str) -> str:
    """A row as a line of the file.

    Raises:
        UserError: for a value that JSON cannot hold.
    """
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise UserError(
            f"{module}.predict_step: expected columns of numbers, texts, lists and dicts, received another value ({error})"
        ) from error


def _has_indices(trainer: Trainer, dataloader_idx: int) -> bool:
    """Whether Lightning knows the indices of a loader's rows."""
    loader = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened[dataloader_idx]
    return hasattr(getattr(loader, "batch_sampler", None), "seen_batch_indices")
