"""Base class of data modules whose rows are from a file, a folder or the hub: their splits, sizes and examples."""

import functools
import hashlib
import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from torch.utils.data import ConcatDataset
from typing_extensions import override

from cola_lightning.data.base import EpochDataModule, EpochLoader
from cola_lightning.data.preprocessing import Preprocessor, prepare
from cola_lightning.data.reading import Splits, TextUnit, choose_split, files_identity, is_file, is_on_hub, load_splits
from cola_lightning.data.report import RowReport
from cola_lightning.data.rows import Rows
from cola_lightning.data.split import (
    MOST_VALIDATION_ROWS,
    VALIDATION_SHARE,
    HeldOut,
    as_count,
    check_shares,
    draw,
    drawn,
    find_record,
)
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)

VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
PURPOSES = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}
STAGE_PARTS = {"fit": ["train", "val"], "validate": ["val"]}  # the parts that a stage needs; other stages: test


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


class SourceDataModule(EpochDataModule):
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
        train_split: Name of the split with the training rows.
        val_split: Name of the validation split. Default: the first of ``validation``, ``valid``, ``val``, ``dev`` that exists.
        test_split: Name of the split that test and predict read. Default: ``test``, if it exists. Without a name, predict reads
            all rows: of a file, or of the test split, else the validation split, else the train split.
        batch_size: Rows in a training batch.
        eval_batch_size: Rows in a batch of validation, test and predict. ``null`` uses ``batch_size``.
        train_size: Number of training rows or, as a float up to 1.0, their share of the rows. They are drawn by ``split_seed``.
            ``null`` uses all that remain.
        val_size: Number or share of validation rows. They are drawn from the validation split or, if there is none, from the
            training rows. ``null`` uses all of the validation split, or else draws 10 % of the training rows, at most 1,000. 0
            turns validation off.
        test_size: Number or share of test rows, which are drawn in the same way. ``null`` uses all of the test split. If there
            is none, there are no test rows. ``cola test`` and ``cola validate`` measure the rows that the model's runs held
            out, whatever the sizes. Data that no run was trained on, if it has no test or validation split, is measured on all
            rows. 1.0 takes all rows, except in a fit.
        split_seed: Seed by which rows are drawn.
        num_workers: Number of worker processes that prepare batches. With 0 the main process prepares them.
        num_proc: Number of processes that prepare rows: they tokenize texts, or check whether pictures can be read. ``null``
            uses the main process.
        max_skipped: Largest share of the rows that may be skipped because they cannot be used, such as rows without a response.
            One row may be skipped in any case, unless this is 0. It does not limit ``predict``.
    """

    main_process_only = frozenset({"_splits", "_rows_of_predict", "_indices", "unpredicted", "_held_out", "_held_out_at_setup"})
    _indices: Sequence[int] = ()  # of the rows that are predicted, among those that predict reads
    unpredicted: dict[int, str]  # for each of the others, by its index, the reason
    preprocessor: Preprocessor | None = None
    text_unit: TextUnit = "paragraph"

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,  # of a list, jsonargparse would read the entries from the file
        subset: str | None = None,
        *,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        max_skipped: float = 0.05,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, split_seed, num_workers)
        check_shares(train_size=train_size, val_size=val_size or None, test_size=test_size or None)
        self.source, self.subset, self.revision, self.num_proc = source, subset, revision, num_proc
        self.sources = self._listed()
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        if not 0 <= max_skipped <= 1:
            raise UserError(f"data.max_skipped must be a share of the rows, from 0 to 1, got {max_skipped}")
        self.max_skipped = max_skipped
        self.rows_hash = ""  # of the training rows
        self._held_out: list[dict[str, Any] | None] = []
        self._held_out_at_setup = self._held_out
        self._logged: set[str] = set()

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
        identities = [self.identity_of(source) for source in self.sources]
        return identities[0] if len(identities) == 1 else {"sources": identities}

    @functools.cached_property
    def _splits(self) -> list[Splits]:
        """The splits of each source, each with the share of its rows that is used."""
        return [
            {name: functools.partial(self._used, source, read) for name, read in self.load(source).items()}
            for source in self.sources
        ]

    def identity_of(self, source: Source) -> dict[str, Any]:
        """A source, and the size and hash of its files on this machine; of the hub, its name alone."""
        options = {name: value for name, value in asdict(source).items() if value and (name, value) != ("share", 1)}
        return options | files_identity(source.source)

    def load(self, source: Source) -> Splits:
        """The splits of a source."""
        return load_splits(source.source, source.subset, source.revision, self.text_unit)

    def _used(self, source: Source, read: Callable[[], Rows]) -> Rows:
        """The rows of a split that are used, in their order."""
        rows = read()
        if source.share < 1 and (n_rows := as_count(float(source.share), len(rows))) < len(rows):
            rows = rows.select(np.sort(draw(len(rows), [n_rows], self.split_seed, rows.place)[0]))
        rows.source_columns = source.columns
        return rows

    # ------------------------------------------------------------------ splits

    @property
    def held_out(self) -> list[dict[str, Any] | None]:
        """The rows that runs have held out, of which the trained module's run knows."""
        run = getattr(self.trainer and self.trainer.lightning_module, "run", None)
        return getattr(run, "held_out", self._held_out)

    def _evaluation_split(self, splits: Splits, part: str) -> Callable[[], Rows] | None:
        """What reads the validation or the test split; None: there is none, or its rows are drawn from the train split."""
        split, size, names = self.val_split, self.val_size, [*VALIDATION_SPLITS]
        if part == "test":  # on a validation split where there is no other
            split, size = self.test_split, self.test_size
            names = ["test"] if self.train_split in splits else ["test", *VALIDATION_SPLITS]
        is_drawn = size is not None and split == self.train_split
        return None if is_drawn else choose_split(splits, split, names, f"{part}_split")

    def _train_rows(self, splits: Splits) -> Rows:
        """The rows of the train split."""
        return cast(Callable[[], Rows], choose_split(splits, self.train_split, (), "train_split"))()

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
        if stage == "fit":
            self.identity  # noqa: B018  # computed here: a file may change during the run
        parts, total = self.parts(stage), RowReport()
        for part in reversed(STAGE_PARTS.get(stage, ["test"])):
            if not parts.get(part) and stage == "fit" and part != "train":
                setattr(self, part, [])
                continue
            if not parts.get(part):
                advice = "Set it above 0 in the fit. With 1.0 all rows are used, also those that were trained on"
                raise UserError(f"data.{part}_size: {self.source!r} has no {PURPOSES[part]} rows. {advice}.")
            purpose = "predict" if stage == "predict" else part
            preprocessors = [self.preprocessor_of(rows, purpose) for rows in parts[part]]
            # It makes the batches of all sources. Of texts and prompts, it is that of prompts.
            prompted = [one for one in preprocessors if one.prompt_format.get("kind") != "text"]
            self.preprocessor = [*prompted, *preprocessors][0]
            by_source = [prepare(*one, self.num_proc) for one in zip(parts[part], preprocessors, strict=True)]
            encoded = joined([examples for examples, _ in by_source])
            for _, report in by_source:
                total += report
                for note in sorted(report.notes):
                    self._log(note)
                self._log(f"{PURPOSES[purpose]}: {report}")
            if not encoded:
                reasons = f": {total.reasons()}" if total.skipped else ""
                raise UserError(f"data.source: no row of {self.source!r} can be used for {PURPOSES[purpose]}{reasons}")
            setattr(self, part, encoded)
        self._report, self._held_out_at_setup = total, [*self.held_out]
        if stage == "fit":
            rows = [[*some.contents(), hashlib.sha256(some.numbers.tobytes()).hexdigest()] for some in parts["train"]]
            self.rows_hash = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
        if stage != "predict":  # of all parts together: one of few rows may have more by chance
            total.check(self.max_skipped)
            return
        if total.skipped and not self.writes_predictions:  # those that are returned have no index
            raise UserError(
                f"{total.n_skipped:,} of {total.n_rows:,} rows have no prediction ({total.reasons()}). Use PredictionWriter "
                "and trainer.predict(..., return_predictions=False): it writes them with a null and the reason"
            )
        self._rows_of_predict: Any = ConcatDataset(parts["test"])  # type: ignore[arg-type]  # Rows have what it needs
        self.unpredicted = total.unusable
        self._indices = [index for index in range(len(self._rows_of_predict)) if index not in total.unusable]
        assert len(self._indices) == len(self.test), "a row to be predicted has one example, or a reason"

    def parts(self, stage: str) -> dict[str, list[Rows]]:
        """The rows of each source that a stage needs, if there are any: ``train`` and ``val``, ``val``, or ``test``."""
        parts: dict[str, list[Rows]] = {}
        for source, splits in zip(self.sources, self._splits, strict=True):
            for part, rows in self._parts_of(source, splits, stage).items():
                if len(rows):
                    parts.setdefault(part, []).append(rows)
        return parts

    def _parts_of(self, source: Source, splits: Splits, stage: str) -> dict[str, Rows]:
        """The rows of a source that a stage needs. This is the rule for each stage, which docs/data.md tells users.

        * ``fit``: a named split, or what is drawn from the train split; a file is a train split.
        * ``test`` and ``validate``: their own split, or else the rows that the runs of the model held out. All rows, if no run
          was trained on them, or their size is 1.0.
        * ``predict``: all rows of a file; else those that ``test`` measures, if ``test_split`` is given; else all rows of the
          test split, of the validation split, or of the train split, whichever there is.
        """
        if stage == "fit":
            return self._drawn_parts(splits, ["train", "val"], stage)
        part, has_splits = "val" if stage == "validate" else "test", not is_file(source.source)
        own = self._evaluation_split(splits, part) if has_splits else None
        reads = [own, self._evaluation_split(splits, "val")] if has_splits else [*splits.values()]
        read = next(filter(None, reads), functools.partial(self._train_rows, splits))
        if stage == "predict":
            takes_all = not has_splits or self.test_split is None or self.test_size == 0
            parts = {part: read()} if takes_all else self._drawn_parts(splits, [part], stage)
            return {part: rows.lacking_targets() for part, rows in parts.items()}
        size = self.val_size if part == "val" else self.test_size
        takes_all = own is None and isinstance(size, float) and size == 1
        if own is None and not takes_all:
            rows = splits.get(self.train_split, read)()
            if (record := find_record(rows, self.held_out)) is not None:
                held_out = rows.at(getattr(record, part))
                self._log(f"{rows.place}: {len(held_out)} rows for {PURPOSES[part]}, as the fit held them out")
                return {part: held_out}
            if takes_all := bool(self.held_out) and None not in self.held_out:
                self._log(f"{source.source}: no run of the model used it as it is, so all rows are for {PURPOSES[part]}")
        return {part: read()} if takes_all else self._drawn_parts(splits, [part], stage)

    def _drawn_parts(self, splits: Splits, names: Sequence[str], stage: str) -> dict[str, Rows]:
        parts, sizes = dict[str, Rows](), {"train": self.train_size}
        for part, size in (("val", self.val_size), ("test", self.test_size)):
            read = self._evaluation_split(splits, part)
            if read is not None and size != 0 and part in names:
                parts |= drawn(read(), {part: size}, self.split_seed)
            elif read is None and (size or (part == "val" and size is None)):
                sizes[part] = size
        if not sizes.keys().isdisjoint(names):
            train = self._train_rows(splits)
            parts |= self._drawn(train.lacking_targets() if stage == "predict" else train, sizes, parts, stage)
        return parts

    def _drawn(self, rows: Rows, sizes: Mapping[str, Any], others: Mapping[str, Rows], stage: str) -> dict[str, Rows]:
        """Draws parts from the train split: the training rows, and those that have no split; logs all of them.

        What an earlier run on the split has held out stays held out in a fit, also if the sizes or the seed are others.

        Args:
            rows: the train split.
            sizes: the parts' sizes.
            others: parts that have a split.
            stage: what they are drawn for.
        """
        default = min(as_count(VALIDATION_SHARE, len(rows)), MOST_VALIDATION_ROWS)
        sizes = {part: default if (part, size) == ("val", None) else size for part, size in sizes.items()}
        is_drawn = len(sizes) > 1 or self.train_size is not None
        parts = drawn(rows, sizes, self.split_seed, self.groups(rows) if is_drawn else None)
        how = ", by data.split_seed" * is_drawn
        if stage == "fit":
            held_out = {part: parts[part].numbers.tolist() if part in parts else [] for part in ("val", "test")}
            record = find_record(rows, self.held_out)
            if record is None:
                hashes = rows.hashes([*held_out["val"], *held_out["test"]])
                self.held_out.append(asdict(HeldOut(rows.contents(), len(rows.split), **held_out, hashes=hashes)))
            elif {part: rows.at(getattr(record, part)).numbers.tolist() for part in held_out} != held_out:
                free = rows.select(np.flatnonzero(~np.isin(rows.numbers, [*record.val, *record.test])))
                groups = None if self.train_size is None else self.groups(free)
                of_record = {part: rows.at(getattr(record, part)) for part in sizes if part != "train"}
                parts = drawn(free, {"train": self.train_size}, self.split_seed, groups) | of_record
                how = ", as an earlier run held them out"
        counts = [f"{len(some)}{' rows' * (part == 'train')} for {PURPOSES[part]}" for part, some in parts.items()]
        lines = [f"{rows.place}: {', '.join(counts)}{how}"]
        lines += [f"{some.place}: {len(some)} of {len(some.split)} for {PURPOSES[part]}" for part, some in others.items()]
        self._log("; ".join(lines))
        return parts

    def indices_of(self, places: Sequence[int]) -> list[int]:
        """The indices, among all rows that predict reads, of rows that it can use, by their places among those."""
        return [self._indices[place] for place in places]

    def fields_of(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The data's own fields of the rows that predict reads, for the file of predictions."""
        return [dict(self._rows_of_predict[index]) for index in indices]

    # ------------------------------------------------------------------ examples

    @override
    def collate(self, rows: list[Any]) -> Any:
        """Makes a batch, as the preprocessor of the stage that was set up last does it."""
        assert self.preprocessor is not None, "setup has made it"
        return self.preprocessor.collate(rows)

    @property
    @override
    def prompt_format(self) -> dict[str, Any]:
        return dict(self.preprocessor.prompt_format) if self.preprocessor else {}

    @override
    def val_dataloader(self) -> Any:
        self._follow_checkpoint()
        return super().val_dataloader()

    @override
    def test_dataloader(self) -> EpochLoader:
        self._follow_checkpoint()
        return super().test_dataloader()

    def _follow_checkpoint(self) -> None:
        """Sets up the rows to measure again, if the Trainer has loaded a checkpoint that holds out others since the setup."""
        stage = self.trainer and self.trainer.state.fn
        if stage in ("validate", "test") and self.held_out != self._held_out_at_setup:
            self.setup(stage)

    @override
    def _order(self) -> dict[str, Any]:
        return {"data.source (a hash of its training rows)": self.rows_hash} | super()._order()

    @override
    def lengths(self, data: Any) -> Sequence[int]:
        if not hasattr(data, "with_format"):
            return [len(row) for row in data]
        return data.with_format("numpy")["length"][:] if "length" in data.column_names else [0] * len(data)

    # ------------------------------------------------------------------ defined by a subclass

    @property
    def can_be_tested(self) -> bool:
        """Whether there are test rows, with labels or answers to be scored with."""
        readers = [read for splits in self._splits if (read := self._evaluation_split(splits, "test")) is not None]
        if self.test_size == 0 or not (readers or self.test_size):
            return False
        try:
            first = [read()[:1] for read in readers]
            return all(len(prepare(rows, self.preprocessor_of(rows, "test"))[0]) for rows in first)
        except UserError:  # it has no label, say
            return False

    def groups(self, rows: Rows) -> Sequence[Hashable] | None:
        """Each row's group, such as its label, of which each drawn part has the same share; None: at random."""
        return None

    @abstractmethod
    def preprocessor_of(self, rows: Rows, part: str) -> Preprocessor:
        """What makes examples of these rows.

        Args:
            rows: the rows; their columns say which kind they are.
            part: what they are for: ``train``, ``val``, ``test``, or ``predict``.
        """


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
