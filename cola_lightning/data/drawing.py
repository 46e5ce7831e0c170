"""How many rows a part of the data has, and which ones: they are drawn by a seed."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cola_lightning.errors import UserError


def check_shares(**sizes: float | None) -> None:
    """Refuses what is neither a number nor a share of rows; sizes are given by field name, None if not set."""
    for field, size in sizes.items():
        if size is not None and not (0 < size < 1 or (size >= 1 and float(size).is_integer())):
            raise UserError(f"data.{field} must be a whole number of rows or a share up to 1.0, got {size}")


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
