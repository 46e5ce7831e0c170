"""Base classes of data modules for language models: rows that are tokenized, from a file, a folder or the hub."""

import functools
import logging
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

from typing_extensions import override

from cola_lightning.data.base import EpochDataModule, check_shares
from cola_lightning.data.row import Row
from cola_lightning.data.rows import (
    check_source,
    draw_parts,
    fill_cache,
    first_row,
    has_split,
    in_order_of,
    is_file,
    let_lack_targets,
    read_rows,
)
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)

DRAWN_SHARE = 0.1  # of the rows of one file, each for validation and test


class TokenizedDataModule(EpochDataModule):
    """Rows that the module's tokenizer tokenizes.

    Args:
        batch_size: rows per training batch.
        eval_batch_size: rows per batch in validation, test and predict; ``null``: as in training.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies.
        split_seed: seed of the split into training, validation and test rows.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.
        length_grouped: group rows of similar length into training batches, to reduce padding, and shuffle the batches;
            ``false``: shuffle the rows.
    """

    def __init__(
        self,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 2048,
        split_seed: int = 0,
        num_workers: int = 0,
        length_grouped: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, split_seed, num_workers)
        self.length_grouped = length_grouped
        if max_length < 2:
            raise UserError(f"data.max_length: expected at least 2 tokens, received {max_length}")
        self._max_length = max_length
        self._tokenizer_of_worker: Any = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | ({"_tokenizer_of_worker": self.tokenizer} if self.trainer else {})

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the module that is trained."""
        if self.trainer is None and self._tokenizer_of_worker is not None:
            return self._tokenizer_of_worker
        module = self.trainer and self.trainer.lightning_module
        if "tokenizer" not in dir(module):  # not getattr: an error inside a property of that name must not be hidden
            raise UserError(f"model: expected a module with a tokenizer, received {type(module).__name__}")
        return cast(Any, module).tokenizer

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: the smaller of the requested length and the model's limit."""
        return int(min(self._max_length, self.tokenizer.model_max_length))


class SourceDataModule(TokenizedDataModule):
    """Rows of a data set from a file, a folder or the hub, in its own splits or in drawn ones.

    Args:
        source: a file of rows (``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.parquet``; all but the last also ``.gz``), a
            folder with such a file for each split (``train.csv``, ``validation.csv``, ``test.csv``), or the id of a data set
            on the hub. The rows of a single file are split by ``split_seed``; ``predict`` takes all of them.
        subset: name of a configuration of a data set on the hub.
        batch_size: rows per training batch.
        eval_batch_size: rows per batch in validation, test and predict; ``null``: as in training.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies.
        train_size: number of training rows or, below 1, their share of the rows, drawn by ``split_seed``; ``null``: all that
            remain.
        val_size: number or share of validation rows, drawn from the train split together with the training rows; ``null``: the
            validation split, or a share of 0.1 if there is none.
        test_size: number or share of test rows, drawn in the same way; ``null``: the test split, or a share of 0.1 if there is
            none.
        test_split: the split that test and predict read; ``null``: ``test`` if a folder has it, else ``validation``.
        split_seed: seed by which rows are drawn.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.
        length_grouped: group rows of similar length into training batches, to reduce padding, and shuffle the batches;
            ``false``: shuffle the rows, as in the paper's runs.
    """

    def __init__(
        self,
        source: str,
        subset: str | None = None,
        *,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        test_split: str | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
        length_grouped: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, max_length, split_seed, num_workers, length_grouped)
        check_shares(train_size=train_size, val_size=val_size, test_size=test_size)
        check_source(source, subset)
        if None not in (test_size, test_split):
            raise UserError(f"data.test_split: expected null beside data.test_size, received {test_split!r}")
        self.source, self.subset, self.test_split = source, subset, test_split
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size

    @property
    def _val_split(self) -> str | None:
        """The validation split's name; None: validation rows are drawn from the train split."""
        return "validation" if self.val_size is None and has_split(self.source, "validation") else None

    @property
    def _test_split(self) -> str | None:
        """The test split's name; None: test rows are drawn from the train split."""
        if self.test_split is not None and is_file(self.source):
            raise UserError(
                f"data.test_split: expected null where data.source is a file, {self.source!r}, received {self.test_split!r}"
            )
        if self.test_size is not None or self.test_split is not None:
            return self.test_split
        return next((split for split in ("test", "validation") if has_split(self.source, split)), None)

    @override
    def prepare_data(self) -> None:
        if not is_file(self.source):
            fill_cache(self.source, self.subset, {"train", *filter(None, (self._val_split, self._test_split))})

    @override
    def setup(self, stage: str) -> None:
        read = functools.cache(lambda split: read_rows(self.source, split, self.subset))
        if stage == "fit" and self._test_split is not None:  # refused before training, and not after it
            first_row(self.source, self._test_split, self.subset)
        if stage == "fit" or (self.needs_train_rows and has_split(self.source, "train")):
            self.look_at(read("train"))
        if stage == "predict":
            self.test = self._not_empty(self.encode_predicted(self._predicted(read)))
            return
        if stage == "test":
            rows = read(self._test_split) if self._test_split else self._drawn(read("train"))[2]
            self.test = self._not_empty(self.encode(rows))
            return
        train, val, _ = self._drawn(read("train")) if stage == "fit" or self._val_split is None else ([], [], [])
        self.val = self._not_empty(self.encode(read(self._val_split) if self._val_split else val))
        if stage == "fit":
            self.train = self._not_empty(self.encode_train(train))

    def _predicted(self, read: Callable[[str], list[Row]]) -> Sequence[Row]:
        """The rows to be predicted, whose labels or answers may be missing: the test rows, or all rows of a file."""
        if is_file(self.source):
            return let_lack_targets(read("train"))
        if self._test_split:
            return let_lack_targets(read(self._test_split))
        rows = let_lack_targets(read("train"))
        return in_order_of(rows, self._drawn(rows)[2])

    def _drawn(self, rows: list[Row]) -> list[list[Row]]:
        """Splits the rows of the train split into training, validation and test rows."""
        sizes = {
            "train_size": self.train_size,
            "val_size": 0 if self._val_split else self.val_size or DRAWN_SHARE,
            "test_size": 0 if self._test_split else self.test_size or DRAWN_SHARE,
        }
        # One file, in a folder or alone, is stratified; other sources are drawn purely at random, as in earlier releases.
        is_alone = not any(has_split(self.source, split) for split in ("validation", "test"))
        groups = [self.group(row) for row in rows] if is_alone else None
        where = self.source if is_file(self.source) else f"{self.source}, train"
        parts = draw_parts(rows, sizes, self.split_seed, where, groups)
        if is_alone:
            counts = [len(part) for part in parts]
            log.info("%s: %d rows for training, %d for validation and %d for test, by data.split_seed", where, *counts)
        return parts

    def _not_empty(self, encoded: Sequence[Any]) -> Sequence[Any]:
        if not encoded:
            raise UserError(f"data.source: expected rows of at least two tokens, received none in {self.source!r}")
        return encoded

    @property
    def target_field(self) -> str | None:
        """The field with a row's target, a label or an answer; None: the row as a whole."""
        return None

    @property
    @override
    def can_be_tested(self) -> bool:
        if self._test_split is None:
            return True
        row = first_row(self.source, self._test_split, self.subset)
        return row is not None and self.has_target(let_lack_targets([row])[0])

    def has_target(self, row: Row) -> bool:
        """Whether a row that may lack its target has one."""
        return self.target_field is None or row.has_target(self.target_field)

    @property
    def needs_train_rows(self) -> bool:
        """Whether :meth:`look_at` is also called for other stages than fit."""
        return False

    def look_at(self, rows: list[Row]) -> None:
        """Inspects all rows of the train split, before any is drawn or encoded: for their labels."""

    def group(self, row: Row) -> Hashable:
        """The group, such as the label, of which each part of a split file has the same share."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Sequence[Any]:
        """Encodes rows for ``collate``."""

    def encode_train(self, rows: Sequence[Row]) -> Sequence[Any]:
        """Encodes training rows."""
        return self.encode(rows)

    def encode_predicted(self, rows: Sequence[Row]) -> Sequence[Any]:
        """Encodes rows to be predicted, none of which may be omitted: a prediction's index is its row's."""
        return self.encode(rows)
