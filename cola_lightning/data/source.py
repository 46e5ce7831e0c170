"""Base classes of data modules for language models: rows that are tokenized, from a file, a folder or the hub."""

import functools
import itertools
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from torch.utils.data import ConcatDataset
from typing_extensions import override

from cola_lightning import __version__
from cola_lightning.chain.checkpoint import OpenedCheckpoint, StoredState
from cola_lightning.data.base import EpochDataModule, check_sizes
from cola_lightning.data.drawing import as_count, check_shares, draw
from cola_lightning.data.encoding import TOO_LONG, TooLong, identity_of_tokenizer
from cola_lightning.data.report import RowReport
from cola_lightning.data.rows import Encode, Rows
from cola_lightning.data.splits import Splits, TextUnit, choose_split, files_identity, is_file, is_on_hub, load_splits
from cola_lightning.errors import UserError, shortened_text

log = logging.getLogger(__name__)

ENCODING = 5  # counted up where the same rows are encoded otherwise: what is cached is then of no use
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
PURPOSES = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}
STAGE_PARTS = {"fit": ["train", "val"], "validate": ["val"]}  # the parts that a stage needs; other stages: test


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

    Attributes:
        tokenizer: the tokenizer of the module that is trained. To use the rows without a Trainer, set it before ``setup``.
        too_long: whether a row that is longer than ``max_length`` is shortened, or skipped and counted.
    """

    tokenizer: Any = None
    too_long: TooLong = "shorten"

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
        check_sizes(max_length=max_length)
        self._max_length = max_length

    def set_tokenizer(self) -> None:
        """Sets ``tokenizer`` to that of the trainer's module, if there is a trainer."""
        if self.trainer is not None:
            self.tokenizer = cast(Any, self.trainer.lightning_module).tokenizer

    @override
    def length(self, row: Any) -> int:
        return len(row["input_ids"] if isinstance(row, dict) else row)

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: the smaller of the requested length and the model's limit."""
        return int(min(self._max_length, self.tokenizer.model_max_length))


@dataclass(frozen=True)
class Source:
    """One of several sources.

    Args:
        source: a file, a pattern of files, a folder, or the id of a data set on the hub.
        subset: name of a configuration of a data set on the hub.
        revision: branch, tag or commit of a data set on the hub.
        columns: for ``TextDataModule`` and ``PreferenceDataModule``: the columns to use; ``null``: as ``data.columns``.
        share: the share of its rows that is used, drawn by ``split_seed``.
    """

    source: str
    subset: str | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None
    share: float = 1.0


class SourceDataModule(TokenizedDataModule):
    """Rows of a data set from a file, a folder or the hub, in its own splits or in drawn ones.

    The splits are looked up: ``train``; ``validation``, ``valid``, ``val`` or ``dev``; ``test``. Validation rows that have no
    split are drawn from the train split by ``split_seed``, and test rows if ``test_size`` asks for them.

    Args:
        source: a file of rows (``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.txt``, also compressed as ``.gz`` or ``.zst``, or
            ``.parquet``), a pattern of files (``logs/*.jsonl``), a folder with such a file for each split (``train.csv``,
            ``validation.csv``, ``test.csv``), a folder of ``Dataset.save_to_disk``, or the id of a data set on the hub. A list
            mixes several: each entry is one of these, or a mapping of ``source``, ``subset``, ``revision``, ``columns`` and
            ``share``, the share of its rows that is used. Each has its own splits, and sizes apply to each.
        subset: Name of a configuration of a data set on the hub.
        revision: Branch, tag or commit of a data set on the hub.
        text_unit: What a row of a ``.txt`` file is: the whole ``file``, a ``line``, or a ``paragraph``, the text between empty
            lines. If the file is one paragraph, each line is a row.
        train_split: Name of the split with the training rows.
        val_split: Name of the validation split. Default: the first of ``validation``, ``valid``, ``val``, ``dev`` that exists.
        test_split: Name of the split that test and predict read. Default: ``test``, if it exists. Without a name, predict reads
            all rows: of a file, or of the test split, else the validation split, else the train split.
        batch_size: Rows in a training batch.
        eval_batch_size: Rows in a batch of validation, test and predict. ``null`` uses ``batch_size``.
        max_length: Maximum length of a sequence, in tokens. The model's own limit also applies.
        train_size: Number of training rows or, as a float up to 1.0, their share of the rows. They are drawn by ``split_seed``.
            ``null`` uses all that remain.
        val_size: Number or share of validation rows. They are drawn from the validation split or, if there is none, from the
            training rows. ``null`` uses all of the validation split, or else draws 10 % of the training rows, at most 1,000. 0
            turns validation off.
        test_size: Number or share of test rows, which are drawn in the same way. ``null`` uses all of the test split. If there
            is none, there are no test rows. ``cola test`` and ``cola validate`` measure the rows that the fit of
            ``--ckpt_path`` held out. Other data than the fit's, if it has no test or validation split, is measured on all rows.
            1.0 takes all rows, except in a fit.
        split_seed: Seed by which rows are drawn.
        num_workers: Number of worker processes that prepare batches. With 0 the main process prepares them.
        num_proc: Number of processes that tokenize, for ``TextDataModule``, ``PreferenceDataModule`` and
            ``TextClassificationDataModule``. ``null`` uses the main process' threads.
        length_grouped: ``true`` puts rows of similar length into a training batch, to reduce padding, and shuffles the batches.
            ``false`` shuffles the rows, as in the paper's runs.
        max_skipped: Largest share of the rows that may be skipped because they cannot be used, such as rows without a response.
            One row may be skipped in any case, unless this is 0. It does not limit ``predict``.
        too_long: ``shorten`` a row that is longer than ``max_length``, or ``skip`` and count it. Plain text is always split.
    """

    main_process_only = frozenset({"_splits", "_rows_of_predict", "_indices", "unpredicted"})
    _rows_of_predict: Any = None
    _indices: Sequence[int] = ()  # of the rows that are predicted, among those that predict reads
    unpredicted: dict[int, str]  # for each of the others, by its index, the reason

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,  # of a list, jsonargparse would read the entries from the file
        subset: str | None = None,
        *,
        revision: str | None = None,
        text_unit: TextUnit = "paragraph",
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
        max_skipped: float = 0.05,
        too_long: TooLong = "shorten",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, max_length, split_seed, num_workers, length_grouped)
        check_shares(train_size=train_size, val_size=val_size or None, test_size=test_size or None)
        self.source, self.subset, self.revision, self.num_proc = source, subset, revision, num_proc
        self.text_unit: TextUnit = text_unit
        self.sources = self._listed()
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        if not 0 <= max_skipped <= 1:
            raise UserError(f"data.max_skipped must be a share of the rows, from 0 to 1, got {max_skipped}")
        self.max_skipped, self.too_long = max_skipped, too_long
        self.checkpoint: StoredState | None = None  # the one that is evaluated, of --ckpt_path
        self._logged: set[str] = set()
        self._sizes = list[str]()  # of the parts, by source

    # ------------------------------------------------------------------ sources

    def _listed(self) -> list[Source]:
        if isinstance(self.source, str):
            listed = [Source(self.source, self.subset, self.revision)]
        elif self.subset or self.revision or not self.source:
            raise UserError("data.source: a list needs at least one entry. Set subset and revision in each entry")
        else:
            listed = [Source(entry) if isinstance(entry, str) else entry for entry in self.source]
        for entry in listed:
            hub_options = [f"data.{name}" for name in ("subset", "revision") if getattr(entry, name) is not None]
            if hub_options and not is_on_hub(entry.source):
                raise UserError(f"{hub_options[0]} works with data sets of the hub only, but {entry.source!r} is a local path")
            if not 0 < entry.share <= 1:
                raise UserError(f"data.source: share must be above 0 and at most 1, got {entry.share}")
        return listed

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Each source, and its revision on the hub, or the size and hash of its files, which are computed once."""
        identities = [identity_of(source) for source in self.sources]
        return identities[0] if len(identities) == 1 else {"sources": identities}

    @functools.cached_property
    def _trained_on(self) -> list[Any]:
        """The contents of the sources that the run of ``--ckpt_path`` and its earlier stages used; empty if one is unknown."""
        state, contents = self.checkpoint, list[Any]()
        while state is not None:
            data, (path, *_) = state.facts["data"], state.facts["init_chain_source"]
            contents += map(contents_of, data.get("sources", [data] if data else []))
            try:
                state = OpenedCheckpoint.open(path).state if path else None
            except UserError:  # it was moved, or is a chain folder, which has no data
                data = {}
            if not data:
                return []
        return contents

    @functools.cached_property
    def _splits(self) -> list[Splits[Any]]:
        """The splits of each source."""
        return [self.splits_of(source) for source in self.sources]

    def splits_of(self, source: Source) -> Splits[Any]:
        """The splits of a source, each with the share of its rows that is used."""
        splits = load_splits(source.source, source.subset, source.revision, self.text_unit)
        return {name: functools.partial(self._used, source, read) for name, read in splits.items()}

    def _used(self, source: Source, read: Callable[[], Rows]) -> Rows:
        """The rows of a split that are used, in their order."""
        rows = read()
        n_rows = as_count(float(source.share), len(rows))
        if n_rows < len(rows):
            rows = rows.at_numbers(np.sort(draw(len(rows), [n_rows], self.split_seed, rows.place)[0]))
        rows.source_columns = source.columns
        return rows

    # ------------------------------------------------------------------ splits

    def _evaluation_split(self, splits: Splits[Any], part: str) -> Callable[[], Any] | None:
        """What reads the validation or the test split; None: there is none, or its rows are drawn from the train split."""
        split, size, names = self.val_split, self.val_size, [*VALIDATION_SPLITS]
        if part == "test":  # on a validation split where there is no other
            split, size = self.test_split, self.test_size
            names = ["test"] if self.train_split in splits else ["test", *VALIDATION_SPLITS]
        is_drawn = size is not None and split == self.train_split
        return None if is_drawn else choose_split(splits, split, names, f"{part}_split")

    def _train_rows(self, splits: Splits[Any]) -> Any:
        """The rows of the train split."""
        read = choose_split(splits, self.train_split, (), "train_split")
        return read and read()

    @override
    def set_tokenizer(self) -> None:
        super().set_tokenizer()
        if self.max_length < self._max_length:
            self._log(f"data.max_length: {self.max_length}, the model's longest sequence, and not {self._max_length}")

    def _log(self, text: str, level: int = logging.INFO) -> None:
        if text not in self._logged:  # each stage comes here
            log.log(level, "%s", text)
            self._logged.add(text)

    def _log_columns(self, taken: str, names: Sequence[str], used: Collection[str]) -> None:
        unused = ", ".join(name for name in names if name not in used)
        self._log(f"rows: {taken}" + (f"; not used: {unused}" if unused else ""))

    @override
    def prepare_data(self) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:  # one process; the others find its files
            self.setup(self.trainer.state.fn.value)  # type: ignore[union-attr]

    @override
    def setup(self, stage: str) -> None:
        self.set_tokenizer()
        if stage == "fit":
            self.identity  # noqa: B018  # computed here: a file may change during the run
        self._sizes.clear()
        parts, total = self.parts(stage), RowReport()
        for part in reversed(STAGE_PARTS.get(stage, ["test"])):
            if not parts.get(part) and stage == "fit":
                setattr(self, part, [])
                continue
            if not parts.get(part):
                advice = "Set it in the fit, or use `cola validate`" if part == "test" else "Set it above 0 in the fit"
                advice += ". With 1.0 all rows are used, also those that were trained on"
                raise UserError(f"data.{part}_size: {self.source!r} has no {PURPOSES[part]} rows. {advice}.")
            purpose = "predict" if stage == "predict" else part
            by_source = [self.encode(rows, purpose) for rows in parts[part]]
            encoded = joined([rows for rows, _ in by_source])
            for _, report in by_source:
                total += report
                for note in sorted(report.notes):
                    self._log(note)
                if report.n_rows:  # of a stream, none is read yet
                    self._log(f"{PURPOSES[purpose]}: {report}")
            if not encoded:
                reasons = f": {total.reasons()}" if total.skipped else ""
                raise UserError(f"data.source: no row of {self.source!r} can be used for {PURPOSES[purpose]}{reasons}")
            setattr(self, part, encoded)
        self._report = total
        if stage != "predict":  # of all parts together: one of few rows may have more by chance
            self.check_skipped(total)
            return
        if total.skipped and not self.writes_predictions:  # those that are returned have no index
            raise UserError(
                f"{total.n_skipped:,} of {total.n_rows:,} rows have no prediction ({total.reasons()}). Use PredictionWriter "
                "and trainer.predict(..., return_predictions=False): it writes them with a null and the reason"
            )
        self._rows_of_predict, self.unpredicted = ConcatDataset(parts["test"]), total.unusable
        self._indices = [index for index in range(len(self._rows_of_predict)) if index not in total.unusable]
        assert len(self._indices) == len(self.test), "encode must give each row a prompt, or report it as unusable"

    def check_skipped(self, report: RowReport) -> None:
        """Refuses rows of which more were skipped than ``max_skipped`` allows."""
        report.check(self.max_skipped, None if self.too_long == "shorten" else TOO_LONG)

    def parts(self, stage: str) -> dict[str, list[Any]]:
        """The rows of each source that a stage needs, if there are any: ``train`` and ``val``, ``val``, or ``test``."""
        parts: dict[str, list[Any]] = {}
        for source, splits in zip(self.sources, self._splits, strict=True):
            names = STAGE_PARTS.get(stage, ["test"])
            if stage == "predict":
                drawn = {"test": self._rows_to_predict(source, splits)}
            elif stage != "fit" and self._is_whole(source, splits, *names):
                drawn = dict.fromkeys(names, self._all_rows(source, splits, *names))
            else:
                drawn = self._parts(splits, names)
            for part, rows in drawn.items():
                parts.setdefault(part, []).append(rows)
        return parts

    def _rows_to_predict(self, source: Source, splits: Splits[Any]) -> Rows:
        """The rows that predict uses: all, unless a split is named."""
        rows = None
        if self.test_split is not None and not is_file(source.source):
            rows = self._parts(splits, ["test"], may_lack_targets=True).get("test")
        return cast(Rows, rows or self._all_rows(source, splits, "test")).lacking_targets()

    def _is_whole(self, source: Source, splits: Splits[Any], part: str) -> bool:
        """Whether a part that has no split is all rows: of other data than the fit's, or if its size is 1.0."""
        if not is_file(source.source) and self._evaluation_split(splits, part) is not None:
            return False
        size = self.val_size if part == "val" else self.test_size
        is_requested = isinstance(size, float) and size == 1
        if is_other := bool(self._trained_on) and contents_of(identity_of(source)) not in self._trained_on:
            self._log(f"{source.source}: not the data of ckpt_path's fit, so all rows are used for {PURPOSES[part]}")
        return is_requested or is_other

    def _all_rows(self, source: Source, splits: Splits[Any], part: str) -> Any:
        """All rows of a file; else those of the part's split, else of the validation split, else of the train split."""
        if is_file(source.source):  # of one split, whatever those of the fit's data are called
            (read,) = splits.values()
        else:
            reads = [self._evaluation_split(splits, name) for name in (part, "val")]
            read = next(filter(None, reads), functools.partial(self._train_rows, splits))
        return read().drawn({part: None}, self.split_seed)[part]

    def _parts(self, splits: Splits[Any], names: Sequence[str], *, may_lack_targets: bool = False) -> dict[str, Any]:
        parts, drawn = dict[str, Any](), {"train": self.train_size}
        for part, size in (("val", self.val_size), ("test", self.test_size)):
            read = self._evaluation_split(splits, part)
            if read is not None and size != 0 and part in names:
                parts |= read().drawn({part: size}, self.split_seed)
            elif read is None and (size or (part == "val" and size is None)):
                drawn[part] = size
        if not drawn.keys().isdisjoint(names):
            train = self._train_rows(splits)
            parts |= self._drawn(train.lacking_targets() if may_lack_targets else train, drawn, parts)
        return parts

    def _drawn(self, rows: Rows, sizes: Mapping[str, Any], others: Mapping[str, Rows]) -> dict[str, Rows]:
        """Draws parts from the train split: the training rows, and those that have no split; logs all of them.

        Args:
            rows: the train split.
            sizes: the parts' sizes.
            others: parts that have a split.
        """
        sizes = {part: rows.default_val_size if (part, size) == ("val", None) else size for part, size in sizes.items()}
        is_drawn = len(sizes) > 1 or self.train_size is not None
        groups = self.groups(rows) if is_drawn else None
        drawn = rows.drawn(sizes, self.split_seed, groups)
        counts = [
            f"{len(some) if isinstance(some, Sized) else 'streamed'}{' rows' * (part == 'train')} for {PURPOSES[part]}"
            for part, some in drawn.items()
        ]
        lines = [f"{rows.place}: {', '.join(counts)}" + f", {rows.drawing}" * is_drawn]
        lines += [f"{some.place}: {len(some)} of {len(some.data)} for {PURPOSES[part]}" for part, some in others.items()]
        self._sizes.append("; ".join(lines))
        self._log(self._sizes[-1])
        return drawn

    @override
    def describe(self) -> list[str]:
        report, sizes = self._report, shortened_text("; ".join(self._sizes), 200)
        skipped = f"{report.n_skipped:,} of {report.n_rows:,} rows skipped: {shortened_text(report.reasons(), 200)}"
        return [sizes, skipped] if report.skipped else [sizes]

    def indices_of(self, places: Sequence[int]) -> list[int]:
        """The indices, among all rows that predict reads, of rows that it can use, by their places among those."""
        return [self._indices[place] for place in places]

    def fields_of(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The data's own fields of the rows that predict reads, for the file of predictions."""
        return [dict(self._rows_of_predict[index]) for index in indices]

    # ------------------------------------------------------------------ rows in Arrow

    def map_rows(self, rows: Rows, features: Mapping[str, Any], *options: Any, encode: Encode) -> tuple[Any, RowReport]:
        """Encodes rows to Arrow, see :meth:`~cola_lightning.data.rows.Rows.mapped`: a column ``length`` is added.

        Args:
            rows: the rows.
            features: the types of the columns that ``encode`` makes: ``int32``, or ``[int32]`` for a list.
            *options: plain values on which it depends, besides the rows and the tokenizer.
            encode: makes of each row dicts, or the reason why it cannot be used.
        """
        tokenizer, kind = identity_of_tokenizer(self.tokenizer), type(self)
        known = tokenizer, __version__, ENCODING, kind.__name__, self.max_length, options
        identity = None
        if tokenizer is not None and kind.__module__.startswith("cola_lightning."):  # code of another's may change unseen
            identity = json.dumps(known, sort_keys=True, default=str)
        return rows.mapped(encode, features, identity, self.num_proc)

    @override
    def lengths(self, data: Any) -> Sequence[int]:
        is_in_arrow = hasattr(data, "with_format")
        return data.with_format("numpy")["length"][:] if is_in_arrow else super().lengths(data)

    # ------------------------------------------------------------------ defined by a subclass

    @property
    def can_be_tested(self) -> bool:
        """Whether there are test rows, with labels or answers to be scored with."""
        readers = [read for splits in self._splits if (read := self._evaluation_split(splits, "test")) is not None]
        if self.test_size == 0 or not (readers or self.test_size):
            return False
        try:
            splits = [read() for read in readers]
            return all(len(self.encode(rows[:1], "test")[0]) for rows in splits if isinstance(rows, Rows))  # no stream is read
        except UserError:  # it has no label, say
            return False

    def groups(self, rows: Rows) -> Sequence[Hashable] | None:
        """Each row's group, such as its label, of which each drawn part has the same share; None: at random."""
        return None

    @abstractmethod
    def encode(self, rows: Rows, part: str) -> tuple[Any, RowReport]:
        """Encodes rows for ``collate``, and reports which of them were skipped or shortened.

        Args:
            rows: the rows.
            part: what they are for: ``train``, ``val``, ``test``, or ``predict``.
        """


def identity_of(source: Source) -> dict[str, Any]:
    """A source, and the size and hash of its files on this machine; of the hub, its name alone."""
    options = {name: value for name, value in asdict(source).items() if value and (name, value) != ("share", 1)}
    return options | files_identity(source.source)


def contents_of(identity: Mapping[str, Any]) -> Any:
    """What tells whether two sources hold the same rows, wherever their files are."""
    files = identity.get("files", {})
    return sorted(files.values()) or identity.get("folder") or [identity["source"], identity.get("subset")]


def joined(parts: Sequence[Any]) -> Any:
    """The encoded rows of all sources: a data set of ``datasets``, or a list."""
    if len(parts) == 1 or not isinstance(parts[0], list):
        import datasets

        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return [*itertools.chain.from_iterable(parts)]
