"""Which rows a part of the data has: they are drawn by a seed, and a record says which rows were held out."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cola_lightning.data.rows import Rows
from cola_lightning.errors import UserError

VALIDATION_SHARE, MOST_VALIDATION_ROWS = 0.1, 1_000  # of the training rows, if there is no validation split


def check_shares(**sizes: float | None) -> None:
    """Refuses what is neither a number nor a share of rows; sizes are given by field name, None if not set."""
    for name, size in sizes.items():
        if size is not None and not (0 < size < 1 or (size >= 1 and float(size).is_integer())):
            raise UserError(f"data.{name} must be a whole number of rows or a share up to 1.0, got {size}")


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

    ``datasets`` has ``train_test_split(stratify_by_column)``: it makes two parts, not three, and fails if a class has one row.

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
        raise UserError(f"{what}: {sum(sizes)} rows are needed, but there are only {n_rows}")
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


def drawn(rows: Rows, sizes: Mapping[str, float | None], seed: int, groups: Sequence[object] | None = None) -> dict[str, Rows]:
    """Disjoint parts of the rows, see :func:`draw`; in their order if one part takes all.

    Args:
        rows: the rows.
        sizes: the size of each part, ``train``, ``val`` or ``test``; None: the rest.
        seed: the permutation's seed.
        groups: each row's group.

    Raises:
        UserError: if there are fewer rows than the parts need.
    """
    if [*sizes.values()] == [None]:
        return dict.fromkeys(sizes, rows)
    counts = {part: None if size is None else as_count(size, len(rows)) for part, size in sizes.items()}
    rest = max(len(rows) - sum(count or 0 for count in counts.values()), 1)
    needed = [rest if count is None else count for count in counts.values()]
    what = f"{' + '.join(f'data.{part}_size' for part in counts)}, of {rows.place}"
    places_of_parts = draw(len(rows), needed, seed, what, groups)
    return {part: rows.select(places) for part, places in zip(counts, places_of_parts, strict=True)}


@dataclass(frozen=True)
class HeldOut:
    """Which rows of a split were held out by the first run of a chain that trained on the split.

    Checkpoints store it, for the runs of all stages. No later run trains on these rows, and an evaluation measures them.

    Attributes:
        contents: the hash of each of the split's files, in order: they are the same wherever the files are.
        n_rows: how many rows the split has.
        val: the positions of the validation rows in the split.
        test: those of the test rows.
        hashes: those of the validation rows, and then of the test rows; empty in checkpoints of earlier versions.
    """

    contents: list[str]
    n_rows: int
    val: list[int]
    test: list[int]
    hashes: list[str] = field(default_factory=list)

    def found_in(self, rows: Rows) -> "HeldOut | None":
        """The record of a split that has most of the rows that were held out, wherever they are in it; None: of another one."""
        if not self.hashes or 2 * sum(one in rows.positions for one in self.hashes) <= len(self.hashes):
            return None
        of_parts = self.hashes[: len(self.val)], self.hashes[len(self.val) :]
        val, test = ([number for one in dict.fromkeys(part) for number in rows.positions.get(one, ())] for part in of_parts)
        return replace(self, val=val, test=test)


def find_record(rows: Rows, records: Iterable[Mapping[str, Any] | None]) -> HeldOut | None:
    """The record of the split of these rows, which may have changed since; None: no run has trained on it.

    Args:
        rows: of the split.
        records: of all runs, as checkpoints store them: the fields of :class:`HeldOut`; None: it is unknown.

    Raises:
        UserError: if a run has trained on some of its files, and nobody can tell on which of their rows.
    """
    contents = rows.contents()
    for record in (HeldOut(**fields) for fields in records if fields is not None):
        if contents[: len(record.contents)] == record.contents and record.n_rows <= len(rows.split):
            return record
        if (found := record.found_in(rows)) is not None:
            return found
        if not {*contents}.isdisjoint(record.contents):
            raise UserError(
                f"data.source: this run or an earlier one was trained on rows of {rows.place}, and which of them it held out "
                "is unknown, because it read them together with others, or in another version. Name the files as that run did"
            )
    return None
