"""Rows of a data set: from the Hugging Face hub, a file, or a folder with one file per split."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from cola_lightning import hub
from cola_lightning.data.files import ENDINGS, class_names, ending_of, iterate_file
from cola_lightning.data.row import Row
from cola_lightning.errors import HubError, UnusableRow, UserError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")

PERCENT_SKIPPED = 1  # at most, of the rows of a part

NAMES_OF_SPLITS = {"validation": ("validation", "valid", "val", "dev")}  # of files; those of other splits have the split's name


def read_rows(source: str, split: str, subset: str | None = None) -> list[Row]:
    """All rows of a split; for a single file, all its rows, whatever the split.

    Args:
        source: a file, a folder with a file ``{split}.csv``, ``{split}.jsonl`` and so on, or the id of a data set on the hub.
        split: ``train``, ``validation``, ``test``.
        subset: on the hub, the name of a configuration (``sst2`` of ``nyu-mll/glue``).

    Raises:
        UserError: if there is no such file, folder or data set, or a line cannot be read.
        HubError: if the data set is on the hub, which cannot be reached.
    """
    return list(_iterate_rows(source, split, subset))


def first_row(source: str, split: str, subset: str | None = None) -> Row | None:
    """The first row of a split, without reading the others; None for an empty split; see :func:`read_rows`."""
    return next(_iterate_rows(source, split, subset), None)


def _iterate_rows(source: str, split: str, subset: str | None) -> Iterator[Row]:
    if is_file(source):
        yield from iterate_file(Path(os.path.expanduser(source)))
    elif (folder := _folder(source)) is not None:
        yield from iterate_file(_file_of(folder, split))
    else:
        rows = _load_from_hub(source, split, subset)
        names = class_names(rows)
        for number, fields in enumerate(rows, start=1):
            yield Row(dict(fields), f"{source}, {split}, row {number}", names)


def is_file(source: str) -> bool:
    """Whether a source is a single file."""
    return Path(os.path.expanduser(source)).is_file()


def has_split(source: str, split: str) -> bool:
    """Whether a source has a split: a folder by its files; a file only ``train``; the hub is assumed to have validation too."""
    if (folder := _folder(source)) is not None:
        return bool(_files_of(folder, split))
    return split == "train" or (split == "validation" and not is_file(source))


def let_lack_targets(rows: list[Row]) -> list[Row]:
    """Marks rows to be predicted, whose labels or answers may be missing."""
    for row in rows:
        row.may_lack_target = True
    return rows


def fill_cache(source: str, subset: str | None, splits: Collection[str]) -> None:
    """Downloads a data set from the hub, to be called in one process, before all read it. Files need no download."""
    if _folder(source) is None and not is_file(source):
        for split in sorted(splits):
            _load_from_hub(source, split, subset)


def check_source(source: str | None, subset: str | None) -> None:
    """Refuses an empty source, and a subset unless the source names a data set on the hub."""
    if source == "":  # as a path, it would be the current folder
        raise UserError("data.source: expected a file, a folder or the id of a data set on the hub, received ''")
    if subset is not None and (source is None or _folder(source) is not None or is_file(source)):
        raise UserError(f"data.subset: expected null where data.source is {source or 'null'}, received {subset!r}")


def _folder(source: str) -> Path | None:
    folder = Path(os.path.expanduser(source))
    return folder if folder.is_dir() else None


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and ending_of(path.name) is not None]


def _files_of(folder: Path, split: str) -> list[Path]:
    names = NAMES_OF_SPLITS.get(split, (split.lower(),))
    return [path for path in _files(folder) if path.name.lower().removesuffix(".gz").rpartition(".")[0] in names]


def _file_of(folder: Path, split: str) -> Path:
    if len(files := _files_of(folder, split)) != 1:
        what = f"one file {split}{ENDINGS[0]} (or {', '.join(ENDINGS[1:])})"
        received = ", ".join(path.name for path in files or _files(folder)) or "no file of rows"
        raise UserError(f"data.source: expected {what} in {folder}, received {received}")
    return files[0]


def _load_from_hub(source: str, split: str, subset: str | None) -> Any:
    # The hub would be asked in vain for a name with the ending of a file.
    if ending_of(source) is not None or not hub.is_repo_id(source):
        raise UserError(
            "data.source: expected a file or folder that exists, or the id of a data set on the hub (owner/name), "
            f"received {source!r}"
        )
    import datasets

    try:
        with hub.offline_if_unreachable() as is_offline:
            return datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # for ids, subsets and splits that do not exist
        if is_offline:
            raise HubError(
                f"data.source: {source!r} is not in the local cache, and the Hugging Face hub cannot be reached: a file "
                "or folder works without it"
            ) from error
        raise UserError(
            f"data.source: expected a data set with the split {split!r}, received {source!r}: {one_line(str(error))}"
        ) from error


class SkippedRows:
    """The unusable rows of a part, which are skipped with a warning if they are few.

    Example:
        >>> skipped = SkippedRows()
        >>> with skipped.if_unusable():
        ...     text = Row({"text": None}, "train.jsonl, line 7").text("text")
        >>> skipped.errors
        [UnusableRow("train.jsonl, line 7: expected text in the field 'text', received None")]
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
    """The number of rows for a size: a number or, below 1, a share, of at least one row.

    Example:
        >>> as_count(0.25, 10), as_count(0.01, 10), as_count(7, 10)
        (2, 1, 7)
    """
    return int(size) if size >= 1 else max(1, round(size * n_rows))


def draw(
    rows: Sequence[T], sizes: Sequence[int], seed: int, what: str, groups: Sequence[object] | None = None
) -> list[list[T]]:
    """Disjoint parts of the rows, drawn together by one seeded permutation.

    Args:
        rows: the rows to draw from, in order.
        sizes: the parts' sizes.
        seed: the permutation's seed.
        what: names the rows in the message.
        groups: each row's group, for a stratified split: each part has about the same share of each group, and earlier parts
            have priority for a group of few rows. None: purely random.

    Raises:
        UserError: if there are fewer rows than the parts need.
    """
    if sum(sizes) > len(rows):
        wanted = " + ".join(map(str, sizes)) + (f" = {sum(sizes)}" if len(sizes) > 1 else "")
        raise UserError(f"{what}: expected at least {wanted} rows, received {len(rows)}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    if groups is not None:
        counts, seen = Counter(groups), Counter[object]()
        places = {}  # position, from 0 to 1, in the row's group: all groups are spread evenly over the order
        for i in order:
            places[i] = (seen[groups[i]] + 0.5) / counts[groups[i]]
            seen[groups[i]] += 1
        order.sort(key=places.__getitem__)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [[rows[i] for i in order[start : start + size]] for start, size in zip(starts, sizes, strict=True)]


def in_order_of(rows: Sequence[T], part: Sequence[T]) -> list[T]:
    """A part that was drawn from rows, in their order."""
    drawn = set(map(id, part))
    return [row for row in rows if id(row) in drawn]


def draw_parts(
    rows: Sequence[Row],
    sizes: Mapping[str, float | None],
    seed: int,
    what: str,
    groups: Sequence[object] | None = None,
) -> list[list[Row]]:
    """Disjoint parts of the rows, see :func:`draw`; in their order if one part takes all.

    Args:
        rows: the rows to draw from.
        sizes: each part's size, by option: a number of rows, a share below 1, 0 for an empty part; None: the rest.
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
        return [list(rows) if count else [] for count in wanted]
    fields = " + ".join(f"data.{name}" for name, count in zip(counts, wanted, strict=True) if count)
    parts = iter(draw(rows, [count for count in wanted if count], seed, f"{fields}, of {what}", groups))
    return [next(parts) if count else [] for count in wanted]
