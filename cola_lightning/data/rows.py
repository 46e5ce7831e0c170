"""Rows of a data set, in Arrow and memory-mapped by ``datasets``: from a file, a folder with a file per split, or the hub."""

import csv
import gzip
import hashlib
import json
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from typing_extensions import override

from cola_lightning import hub
from cola_lightning.data.row import Row
from cola_lightning.errors import UnusableRow, UserError, causes, one_line

log = logging.getLogger(__name__)

S = TypeVar("S")

# Of datasets, by a file's ending.
READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"} | dict.fromkeys((".jsonl", ".ndjson", ".json"), "json")
SHARD = re.compile(r"-\d+-of-\d+$")  # the end of the name of a file that has a part of a split
PERCENT_SKIPPED = 1  # at most, of the rows of a part
WORTH_A_BAR, WORTH_A_BAR_BYTES = 20_000, 10**8  # rows, and bytes of files, whose preparation takes seconds


class Rows(Sequence[Row]):
    """Rows of a split.

    Args:
        data: the split, a ``datasets.Dataset``.
        place: names it in messages.
        numbers: the positions of these rows in the split; None: all.
        may_lack_targets: whether their labels or answers may be missing, as in rows to be predicted.
    """

    def __init__(self, data: Any, place: str, numbers: Any = None, *, may_lack_targets: bool = False) -> None:
        self.data, self.place, self.may_lack_targets = data, place, may_lack_targets
        self.numbers = np.arange(len(data)) if numbers is None else np.asarray(numbers, dtype=np.int64)
        features = data.features or {}
        self.class_names = {name: feature.names for name, feature in features.items() if hasattr(feature, "names")}

    @property
    def columns(self) -> list[str]:
        """The names of the fields."""
        return list(self.data.column_names)

    @property
    def lists(self) -> list[str]:
        """The names of the fields that hold lists."""
        import datasets

        kinds = (list, datasets.List, datasets.LargeList)
        return [name for name, feature in (self.data.features or {}).items() if isinstance(feature, kinds)]

    @override
    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> "Rows": ...
    @override
    def __getitem__(self, place: int | slice) -> "Row | Rows":
        if isinstance(place, slice):
            return self._of(self.numbers[place])
        number = int(self.numbers[place])
        return self._row(self.data[number], number)

    @override
    def __iter__(self) -> Iterator[Row]:
        for number, fields in zip(self.numbers, self._selected(), strict=True):
            yield self._row(fields, int(number))

    def _row(self, fields: Mapping[str, Any], number: int) -> Row:
        row = Row(dict(fields), f"{self.place}, row {number + 1}", self.class_names)
        row.may_lack_target = self.may_lack_targets
        return row

    def _of(self, numbers: Any) -> "Rows":
        return Rows(self.data, self.place, numbers, may_lack_targets=self.may_lack_targets)

    def _selected(self) -> Any:
        is_all = np.array_equal(self.numbers, np.arange(len(self.data)))
        return self.data if is_all else self.data.select(self.numbers)

    def lacking_targets(self) -> "Rows":
        """The same rows; their labels or answers may be missing."""
        return Rows(self.data, self.place, self.numbers, may_lack_targets=True)

    def sorted(self) -> "Rows":
        """The same rows in their order in the split."""
        return self._of(np.sort(self.numbers))

    def values(self, field: str) -> list[Any]:
        """The different values of a field."""
        if field not in self.columns:
            self[0][field]  # raises
        try:
            return list(self._selected().unique(field))
        except NotImplementedError:  # of values of several types
            return list(dict.fromkeys(self._selected()[field]))

    def mapped(
        self,
        encode: Callable[[list[Row]], Sequence[Mapping[str, Any]]],
        features: Mapping[str, Any],
        identity: str | None,
        num_proc: int | None = None,
    ) -> Any:
        """Encodes the rows, a thousand at a time, into a data set that is memory-mapped, too, and cached by ``datasets``.

        Args:
            encode: makes rows of the result: several of one row, or none.
            features: the types of their columns: ``int32``, say, or ``[int32]`` for a list.
            identity: of ``encode``: what it depends on besides the rows. None: it cannot be known, and nothing is cached.
            num_proc: processes that encode; None: this one.
        """
        import datasets

        def batch(columns: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
            fields = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            rows = [self._row(one, int(self.numbers[place])) for one, place in zip(fields, places, strict=True)]
            encoded = encode(rows)
            return {name: [row[name] for row in encoded] for name in features}

        digest = hashlib.sha256(os.urandom(16) if identity is None else identity.encode())
        digest.update(self.numbers.tobytes())
        digest.update(repr(sorted(features.items())).encode())
        for file in self.data.cache_files:
            status = os.stat(file["filename"])
            digest.update(repr((file["filename"], status.st_size, status.st_mtime_ns)).encode())
        values = {
            name: datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
            for name, kind in features.items()
        }
        how: dict[str, Any] = {"remove_columns": self.columns, "features": datasets.Features(values)}
        with _progress_bar_if(len(self) >= WORTH_A_BAR):
            return self._selected().map(
                batch,
                batched=True,
                with_indices=True,
                new_fingerprint=digest.hexdigest()[:32],
                num_proc=num_proc,
                desc=f"{self.place}: preparing rows",
                **how,
            )


@contextmanager
def _progress_bar_if(is_shown: bool) -> Iterator[None]:
    import datasets

    if is_shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


# ---------------------------------------------------------------------- a source and its splits


def is_file(source: str) -> bool:
    """Whether a source is a single file."""
    return Path(os.path.expanduser(source)).is_file()


def is_on_hub(source: str) -> bool:
    """Whether a source is the id of a data set on the hub."""
    return not Path(os.path.expanduser(source)).exists()


class FileSplits(Mapping[str, Rows]):
    """The splits of a folder, each read when it is asked for."""

    def __init__(self, source: str, files: Mapping[str, list[Path]]) -> None:
        self.source, self.files, self._read = source, files, dict[str, Rows]()

    @override
    def __getitem__(self, split: str) -> Rows:
        if split not in self._read:
            self._read[split] = Rows(_read(self.files[split]), f"{self.source}, {split}")
        return self._read[split]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    @override
    def __len__(self) -> int:
        return len(self.files)


def load_splits(source: str, subset: str | None = None, revision: str | None = None) -> Mapping[str, Rows]:
    """The splits of a source, by the names that it has.

    Args:
        source: a file (one split, ``train``), a folder with a file per split (``train.csv``, ``dev.jsonl``), or the id of a
            data set on the hub.
        subset: on the hub, the name of a configuration (``sst2`` of ``nyu-mll/glue``).
        revision: on the hub, a branch, tag or commit.

    Raises:
        UserError: if there is no such file, folder, data set or subset, or it cannot be read.
        HubError: if the data set is on the hub, which cannot be reached.
    """
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return {"train": Rows(_read([path]), source)}
    if path.is_dir():
        return FileSplits(source, _files_of(path))
    return {split: Rows(data, f"{source}, {split}") for split, data in hub_data(source, subset, revision).items()}


def read_rows(source: str, split: str, subset: str | None = None, revision: str | None = None) -> Rows:
    """The rows of a split of a source; of a single file, all its rows are its split ``train``. See :func:`load_splits`.

    Raises:
        UserError: if there is no such split.
    """
    splits = load_splits(source, subset, revision)
    if split not in splits:
        raise UserError(f"data.source: expected a split {split} in {source!r}, received {', '.join(splits)}")
    return splits[split]


def choose_split(splits: Mapping[str, S], given: str | None, names: Sequence[str], option: str) -> S | None:
    """The split that an option names or, where it is null, the first of some names that there is; None if there is none.

    Raises:
        UserError: for a split that there is not; it lists those that there are.
    """
    if given is not None and given not in splits:
        raise UserError(f"data.{option}: expected one of the splits {', '.join(splits)}, received {given!r}")
    return next((splits[name] for name in ([given] if given else names) if name in splits), None)


def check_source(source: str | None, subset: str | None, revision: str | None = None) -> None:
    """Refuses an empty name, and a subset or a revision of files on this machine."""
    if source == "":  # as a path, it would be the current folder
        raise UserError("data.source: expected a file, a folder or the id of a data set on the hub, received ''")
    for name, value in (("subset", subset), ("revision", revision)):
        if value is not None and source is not None and not is_on_hub(source):
            raise UserError(f"data.{name}: expected null for files on this machine, {source!r}, received {value!r}")


def _ending(name: str) -> str | None:
    """The ending of a file's name that has a reader; None if there is none."""
    return next((ending for ending in READERS if name.lower().removesuffix(".gz").endswith(ending)), None)


def _files_of(folder: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder: ``train.csv``, or ``train-00000-of-00002.parquet`` and so on."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and (ending := _ending(path.name)) is not None:
            name = path.name[: path.name.lower().rindex(ending)].lower()
            parts = files.setdefault(split := SHARD.sub("", name), [])
            parts.append(path)
            if len(parts) > 1 and name == split:
                received = " and ".join(part.name for part in parts)
                raise UserError(f"data.source: expected one file for each split in {str(folder)!r}, received {received}")
    if not files:
        raise UserError(f"data.source: expected a file train{next(iter(READERS))} or alike in {str(folder)!r}, received none")
    return files


def _read(files: list[Path]) -> Any:
    """The rows of files of one kind."""
    import datasets
    from pandas.errors import ParserWarning

    if (ending := _ending(files[0].name)) is None:
        endings = ", ".join(READERS)
        raise UserError(f"data.source: expected a file that ends in {endings}, received {str(files[0])!r}")
    how: dict[str, Any] = {}
    with _unreadable_as_user_error(str(files[0])), warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # of cells without a column, which pandas drops
        if READERS[ending] == "csv":  # all values are text, not numbers, dates or "NA" for none; an empty cell is null
            how = {"sep": "\t" if ending == ".tsv" else ","}
            columns = _header(files[0], **how)
            how |= {"features": datasets.Features({name: datasets.Value("string") for name in columns})}
            how |= {"keep_default_na": False, "na_values": [""], "index_col": False, "encoding": "utf-8-sig"}
        with _progress_bar_if(sum(file.stat().st_size for file in files) > WORTH_A_BAR_BYTES):
            rows = datasets.load_dataset(READERS[ending], data_files=[str(file) for file in files], split="train", **how)
        if ending == ".tsv":
            _check_quotes(rows, files[0])
        return rows


def _header(file: Path, sep: str) -> list[str]:
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    with opened(file, "rt", encoding="utf-8-sig", newline="") as lines:
        names = next(csv.reader(lines, delimiter=sep))
    if len({*names}) < len(names):
        raise UserError(f"{file}: expected column names that differ, received {', '.join(names)}")
    return names


def _check_quotes(rows: Any, file: Path) -> None:
    """Refuses a TSV file in which a double quote at the beginning of a cell has joined rows."""
    import pyarrow.compute as pc

    if any(pc.any(pc.match_substring(column, "\t")).as_py() for column in rows.data.columns):
        raise UserError(
            f"{file}: expected cells without tabs, received one: a double quote at the beginning of a cell begins a text in "
            'quotes, so write it so: """word"" and the rest"'
        )


@contextmanager
def _unreadable_as_user_error(source: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, TypeError, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        *_, innermost = causes(error)
        reason = one_line(str(innermost)) or "it is empty"
        raise UserError(f"data.source: expected rows that can be read, received {source!r}: {reason}") from error


def hub_data(source: str, subset: str | None, revision: str | None, *, streaming: bool = False) -> Any:
    """The splits of a data set on the hub, as ``datasets`` has them; see :func:`load_splits`."""
    import datasets

    if _ending(source) is not None or not hub.is_repo_id(source):
        raise UserError(
            "data.source: expected a file or folder that exists, or the id of a data set on the hub (owner/name), "
            f"received {source!r}"
        )
    try:
        with hub.needed_for(f"data.source: {source!r}"):
            return datasets.load_dataset(source, subset, revision=revision, streaming=streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        if (subsets := _subsets(source, revision)) and subset not in subsets:
            listed = ", ".join(subsets)
            raise UserError(f"data.subset: expected one of {listed}, for {source!r}, received {subset or 'null'}") from error
        raise UserError(f"data.source: expected a data set on the hub, received {source!r}: {one_line(str(error))}") from error


def _subsets(source: str, revision: str | None) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_config_names(source, revision=revision))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError):  # no such data set, or revision
        return []


def identity_of_source(source: str, subset: str | None, revision: str | None) -> dict[str, Any]:
    """A source, and its revision on the hub, or the size and hash of its files."""
    named = {"source": source, "subset": subset, "revision": revision}
    return {name: value for name, value in named.items() if value} | files_identity(source)


def files_identity(source: str) -> dict[str, Any]:
    """Size and hash of a source's files on this machine, as ``{"files": {name: [size, sha256]}}``; empty for the hub."""
    path = Path(os.path.expanduser(source))
    if is_on_hub(source):
        return {}
    files = [path] if path.is_file() else [file for some in _files_of(path).values() for file in some]
    found = {}
    for file in files:
        with file.open("rb") as opened:
            found[file.name] = [file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()]
    return {"files": found}


# ---------------------------------------------------------------------- parts of a split


class SkippedRows:
    """The unusable rows of a part, which are skipped with a warning if they are few.

    Example:
        >>> skipped = SkippedRows()
        >>> with skipped.if_unusable():
        ...     text = Row({"text": None}, "train.jsonl, row 7").text("text")
        >>> skipped.errors
        [UnusableRow("train.jsonl, row 7: expected text in the field 'text', received None")]
    """

    def __init__(self) -> None:
        self.errors: list[UnusableRow] = []

    @contextmanager
    def if_unusable(self) -> Iterator[None]:
        """Records an UnusableRow raised inside the block, and continues after it."""
        try:
            yield
        except UnusableRow as error:
            self.errors.append(error)

    def check(self, n_rows: int) -> None:
        """Warns of the skipped rows.

        Args:
            n_rows: number of rows of the part, including the skipped ones.

        Raises:
            UserError: if more than one in a hundred is skipped.
        """
        n_skipped = len(self.errors)
        if not n_skipped:
            return
        if 100 * n_skipped > PERCENT_SKIPPED * n_rows:
            raise UserError(
                f"{self.errors[0]} ({n_skipped} of {n_rows} rows cannot be used; up to {PERCENT_SKIPPED} % would be skipped)"
            )
        log.warning("%d of %d rows cannot be used, and are skipped; the first: %s", n_skipped, n_rows, self.errors[0])


def as_count(size: float, n_rows: int) -> int:
    """The number of rows for a size: a whole number of rows, or a float up to 1.0 for a share, of at least one row.

    Example:
        >>> as_count(0.25, 10), as_count(0.01, 10), as_count(7, 10), as_count(1, 10), as_count(1.0, 10)
        (2, 1, 7, 1, 10)
    """
    is_share = isinstance(size, float) and size <= 1
    return max(1, round(size * n_rows)) if is_share else int(size)


def draw(n_rows: int, sizes: Sequence[int], seed: int, what: str, groups: Sequence[object] | None = None) -> list[Any]:
    """The indices of disjoint parts of rows, drawn together by one seeded permutation.

    Args:
        n_rows: the number of rows to draw from.
        sizes: the parts' sizes.
        seed: the permutation's seed.
        what: names the rows in the message.
        groups: each row's group, for a stratified split: each part has about the same share of each group, and earlier parts
            have priority for a group of few rows. None: purely random.

    Raises:
        UserError: if there are fewer rows than the parts need.
    """
    if sum(sizes) > n_rows:
        wanted = " + ".join(map(str, sizes)) + (f" = {sum(sizes)}" if len(sizes) > 1 else "")
        raise UserError(f"{what}: expected at least {wanted} rows, received {n_rows}")
    order: Any = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed)).numpy()
    if groups is not None:
        counts, seen = Counter(groups), Counter[object]()
        places = np.empty(n_rows)  # position, from 0 to 1, in the row's group: all groups are spread evenly over the order
        for i in order.tolist():
            places[i] = (seen[groups[i]] + 0.5) / counts[groups[i]]
            seen[groups[i]] += 1
        order = order[np.argsort(places[order], kind="stable")]
    starts = np.cumsum([0, *sizes[:-1]])
    return [order[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def draw_parts(
    rows: Rows, sizes: Mapping[str, float | None], seed: int, what: str, groups: Sequence[object] | None = None
) -> list[Rows]:
    """Disjoint parts of the rows, see :func:`draw`; in their order if one part takes all.

    Args:
        rows: the rows to draw from.
        sizes: each part's size, by option: see :func:`as_count`; 0 for an empty part; None: the rest.
        seed: the permutation's seed.
        what: names the rows in the message.
        groups: each row's group.

    Raises:
        UserError: if there are fewer rows than the parts need.
    """
    counts = {name: size and as_count(size, len(rows)) for name, size in sizes.items()}
    rest = max(len(rows) - sum(count or 0 for count in counts.values()), 1)
    wanted = [rest if count is None else count for count in counts.values()]
    if sum(map(bool, wanted)) == 1 and None in counts.values():
        return [rows if count else rows[:0] for count in wanted]
    fields = " + ".join(f"data.{name}" for name, count in zip(counts, wanted, strict=True) if count)
    parts = iter(draw(len(rows), [count for count in wanted if count], seed, f"{fields}, of {what}", groups))
    return [rows._of(rows.numbers[next(parts)]) if count else rows[:0] for count in wanted]


def identity_of(*parts: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
