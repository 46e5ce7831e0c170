"""Base classes of data modules for language models: rows that are tokenized, from a file, a folder or the hub."""

import functools
import logging
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from typing_extensions import override

from cola_lightning import __version__
from cola_lightning.data.base import EpochDataModule, check_shares
from cola_lightning.data.row import Row
from cola_lightning.data.rows import (
    Rows,
    check_source,
    choose_split,
    draw_parts,
    identity_of,
    identity_of_source,
    is_file,
    load_splits,
)
from cola_lightning.data.tokens import identity_of_tokenizer
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)

DRAWN_SHARE = 0.1  # of the training rows, for each part that has no split
ENCODING = 1  # counted up where the same rows are encoded otherwise: what is cached is then of no use
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")


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

    The splits are looked up: ``train``; ``validation``, ``valid``, ``val`` or ``dev``; ``test``. A part without a split is
    drawn from the train split by ``split_seed``.

    Args:
        source: a file of rows (``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.parquet``; all but the last also ``.gz``), a
            folder with such a file for each split (``train.csv``, ``validation.csv``, ``test.csv``), or the id of a data set
            on the hub. ``predict`` takes all rows of a single file.
        subset: name of a configuration of a data set on the hub.
        revision: branch, tag or commit of a data set on the hub.
        train_split: the split with the training rows.
        val_split: the validation split; ``null``: the first of the names above that there is.
        test_split: the split that test and predict read; ``null``: ``test``, if there is one.
        batch_size: rows per training batch.
        eval_batch_size: rows per batch in validation, test and predict; ``null``: as in training.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies.
        train_size: number of training rows or, as a float up to 1.0, their share of the rows, drawn by ``split_seed``;
            ``null``: all that remain.
        val_size: number or share of validation rows, drawn from the train split together with the training rows; ``null``: the
            validation split, or a share of 0.1 if there is none.
        test_size: number or share of test rows, drawn in the same way; ``null``: the test split, or a share of 0.1 if there is
            none.
        split_seed: seed by which rows are drawn.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.
        num_proc: processes that tokenize rows before training; ``null``: the main process does, with its threads.
        length_grouped: group rows of similar length into training batches, to reduce padding, and shuffle the batches;
            ``false``: shuffle the rows, as in the paper's runs.
    """

    def __init__(
        self,
        source: str,
        subset: str | None = None,
        *,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        length_grouped: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, max_length, split_seed, num_workers, length_grouped)
        check_shares(train_size=train_size, val_size=val_size, test_size=test_size)
        check_source(source, subset, revision)
        for part, split, size in (("val", val_split, val_size), ("test", test_split, test_size)):
            if None not in (split, size):
                raise UserError(f"data.{part}_split: expected null beside data.{part}_size, received {split!r}")
        self.source, self.subset, self.revision, self.num_proc = source, subset, revision, num_proc
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self._told: set[str] = set()

    @override
    def __getstate__(self) -> dict[str, Any]:
        """In a worker process nothing is read: batches arrive as rows."""
        return {name: value for name, value in super().__getstate__().items() if name != "_splits"}

    # ------------------------------------------------------------------ splits

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """See ``EpochDataModule.identity``; the hash of a file is computed once."""
        return identity_of_source(self.source, self.subset, self.revision)

    @functools.cached_property
    def _splits(self) -> Mapping[str, Rows]:
        return load_splits(self.source, self.subset, self.revision)

    @property
    def _train_rows(self) -> Rows:
        rows = choose_split(self._splits, self.train_split, (), "train_split")
        assert rows is not None
        return rows

    @property
    def _val_rows(self) -> Rows | None:
        """The rows of the validation split; None: validation rows are drawn from the train split."""
        return None if self.val_size else choose_split(self._splits, self.val_split, VALIDATION_SPLITS, "val_split")

    @property
    def _test_rows(self) -> Rows | None:
        """The rows of the test split, or of a validation split where no other is; None: drawn from the train split."""
        names = ("test",) if self.train_split in self._splits else ("test", *VALIDATION_SPLITS)
        return None if self.test_size else choose_split(self._splits, self.test_split, names, "test_split")

    def _tell(self, text: str) -> None:
        if text not in self._told:  # each stage comes here
            log.info("%s", text)
            self._told.add(text)

    @override
    def prepare_data(self) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:  # one process; the others find its files
            self.setup(self.trainer.state.fn.value)  # type: ignore[union-attr]

    @override
    def setup(self, stage: str) -> None:
        val, test = self._val_rows, self._test_rows
        if stage == "fit":
            assert self.identity is not None  # computed here: a file may change during the run
        if stage == "fit" or (self.needs_train_rows and self.train_split in self._splits):
            self.look_at(self._train_rows)
        if stage == "predict":
            rows = (
                self._train_rows
                if is_file(self.source)
                else test or self._drawn(self._train_rows.lacking_targets())[2].sorted()
            )
            self.test = self._not_empty(self.encode_predicted(rows.lacking_targets()))
            return
        if stage == "test":
            self.test = self._not_empty(self.encode(self._drawn(self._train_rows)[2] if test is None else test))
            return
        train, drawn, _ = self._drawn(self._train_rows) if stage == "fit" or val is None else (None, None, None)
        self.val = self._not_empty(self.encode(drawn if val is None else val))  # type: ignore[arg-type]
        if train is not None and stage == "fit":
            self.train = self._not_empty(self.encode_train(train))

    def _drawn(self, rows: Rows) -> list[Rows]:
        """Splits the rows of the train split into training, validation and test rows."""
        val, test = self._val_rows, self._test_rows
        sizes = {
            "train_size": self.train_size,
            "val_size": 0 if val is not None else self.val_size or DRAWN_SHARE,
            "test_size": 0 if test is not None else self.test_size or DRAWN_SHARE,
        }
        is_drawn = val is None or test is None or self.train_size is not None
        parts = draw_parts(rows, sizes, self.split_seed, rows.place, self.groups(rows) if is_drawn else None)
        *others, last = [
            f"{len(part)}{' rows' * (name == 'training')} for {name}"
            for name, part, own in zip(("training", "validation", "test"), parts, (None, val, test), strict=True)
            if own is None
        ]
        drawn = f"{', '.join(others)} and {last}, by data.split_seed" if others else last
        own = [f"{one.place}: {len(one)} for {part}" for part, one in (("validation", val), ("test", test)) if one is not None]
        self._tell("; ".join([f"{rows.place}: {drawn}", *own]))
        return parts

    def _not_empty(self, encoded: Any) -> Any:
        if not len(encoded):
            raise UserError(f"data.source: expected rows of at least two tokens, received none in {self.source!r}")
        return encoded

    # ------------------------------------------------------------------ rows in Arrow

    def map_rows(self, rows: Rows, features: Mapping[str, Any], *options: Any, encode: Any) -> Any:
        """Encodes rows to Arrow, see :meth:`~cola_lightning.data.rows.Rows.mapped`: a column ``length`` is added.

        Args:
            rows: the rows.
            features: the types of the columns that ``encode`` makes: ``int32``, or ``[int32]`` for a list.
            *options: plain values on which it depends, besides the rows and the tokenizer.
            encode: makes dicts of a list of rows.
        """
        tokenizer, kind = identity_of_tokenizer(self.tokenizer), type(self)
        is_ours = kind.__module__.startswith("cola_lightning.")  # code of another's may change without a sign of it
        ours = __version__, ENCODING, kind.__name__, self.max_length, options
        identity = identity_of(tokenizer, ours) if is_ours and tokenizer is not None else None

        def with_lengths(some: list[Row]) -> list[dict[str, Any]]:
            return [{**row, "length": len(row["input_ids"])} for row in encode(some)]

        return rows.mapped(with_lengths, {**features, "length": "int32"}, identity, self.num_proc)

    @override
    def lengths(self, data: Any) -> Sequence[int]:
        is_in_arrow = hasattr(data, "with_format")
        return data.with_format("numpy")["length"][:] if is_in_arrow else super().lengths(data)

    # ------------------------------------------------------------------ defined by a subclass

    @property
    @override
    def can_be_tested(self) -> bool:
        try:
            rows = self._test_rows
            return rows is None or (len(rows) > 0 and self.has_target(rows.lacking_targets()[0]))
        except UserError:  # said where it is tested on
            return False

    def has_target(self, row: Row) -> bool:
        """Whether a row that may lack its target, a label or an answer, has one."""
        return True

    @property
    def needs_train_rows(self) -> bool:
        """Whether :meth:`look_at` is also called for other stages than fit."""
        return False

    def look_at(self, rows: Rows) -> None:
        """Inspects the rows of the train split, before any is drawn or encoded: for their labels."""

    def groups(self, rows: Rows) -> Sequence[Hashable] | None:
        """Each row's group, such as its label, of which each drawn part has the same share; None: at random."""
        return None

    @abstractmethod
    def encode(self, rows: Rows) -> Any:
        """Encodes rows for ``collate``."""

    def encode_train(self, rows: Rows) -> Any:
        """Encodes training rows."""
        return self.encode(rows)

    def encode_predicted(self, rows: Rows) -> Any:
        """Encodes rows to be predicted, none of which may be omitted: a prediction's index is its row's."""
        return self.encode(rows)
