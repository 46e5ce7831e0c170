"""Encoded rows as batches, padded on the left: rows with a loss, alone or in packs, and prompts for generation."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cola_lightning.constants import IGNORE_INDEX
from cola_lightning.data.render import LanguageRow
from cola_lightning.decoding import Decoding


@dataclass(frozen=True)
class PromptRow:
    """A prompt for generation, in tokens.

    Attributes:
        prompt_ids: the tokens.
        prompt: the prompt in the data: a text, or the turns of a conversation.
        target: the expected response; None if the data has none.
    """

    prompt_ids: list[int]
    prompt: Any
    target: str | None

    def __len__(self) -> int:
        return len(self.prompt_ids)


def labels_of(row: LanguageRow) -> list[int]:
    """A row's labels: its tokens where they have a loss, and ``IGNORE_INDEX``.

    Example:
        >>> labels_of({"input_ids": [7, 8, 9, 5], "spans": [1, 2, 3, 4]})
        [-100, 8, -100, 5]
    """
    ids, spans = row["input_ids"], row["spans"]
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels


def collate_language(rows: Sequence[LanguageRow], pad: int) -> dict[str, Tensor]:
    """The usual language-model batch, padded on the left, so that the tokens with a loss are aligned at its end."""
    return {
        "input_ids": pad_left([row["input_ids"] for row in rows], pad),
        "attention_mask": pad_left([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": pad_left([labels_of(row) for row in rows], IGNORE_INDEX),
    }


def collate_prompts(rows: Sequence[PromptRow], pad: int, decoding: Decoding, end_tokens: list[int]) -> dict[str, Any]:
    """Prompts for generation, padded on the left, and decoding options: see :meth:`~cola_lightning.COLACausalLM.generate`."""
    return {
        "prompt_ids": pad_left([row.prompt_ids for row in rows], pad),
        "prompt_mask": pad_left([[1] * len(row.prompt_ids) for row in rows], 0),
        "prompt": [row.prompt for row in rows],
        "target": [row.target for row in rows],
        "decoding": dict(vars(decoding)),
        "end_tokens": end_tokens,
    }


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one tensor."""
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])


# ---------------------------------------------------------------------- rows that share a sequence of the model


class Packs:
    """The rows of a data set in packs: each row is in one of them, and the packs are the same in every epoch.

    Args:
        rows: the data set, of encoded rows, in Arrow.
        lengths: the rows' lengths, in tokens.
        max_length: the length of a pack.
        seed: which of several rows of one length is packed first: their order in the data may be by subject.
        pad: the token of padding.

    Example:
        >>> import datasets
        >>> rows = datasets.Dataset.from_list([{"input_ids": [k] * n} for k, n in enumerate([5, 3, 2, 4])])
        >>> [[row["input_ids"] for row in pack] for pack in Packs(rows, [5, 3, 2, 4], 7, seed=0, pad=9)]
        [[[0, 0, 0, 0, 0], [2, 2]], [[3, 3, 3, 3], [1, 1, 1]]]
    """

    def __init__(self, rows: Any, lengths: Sequence[int], max_length: int, seed: int, pad: int) -> None:
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).numpy()
        shuffled = np.asarray(lengths)[order]
        packs = best_fit(shuffled.tolist(), max_length)
        self.rows, self.pad = rows, pad
        self.ends = np.cumsum([len(pack) for pack in packs])  # arrays: there may be millions of rows
        self.places = order[np.fromiter(chain.from_iterable(packs), dtype=np.int64, count=len(order))]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, pack: int) -> list[LanguageRow]:
        return self.__getitems__([range(len(self))[pack]])[0]

    def __getitems__(self, packs: Sequence[int]) -> list[list[LanguageRow]]:
        """The rows of several packs, read together."""
        places = [self.places[self.ends[pack - 1] if pack else 0 : self.ends[pack]].tolist() for pack in packs]
        rows = iter(self.rows.__getitems__(list(chain.from_iterable(places))))
        return [[next(rows) for _ in places_of_pack] for places_of_pack in places]

    def collate(self, packs: Sequence[Sequence[LanguageRow]]) -> dict[str, Tensor]:
        """A batch of packs."""
        return collate_packs(packs, self.pad)


def best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Puts rows into packs, the longest first, each into the fullest pack that has room for it.

    Args:
        lengths: the rows' lengths, none above ``max_length``.
        max_length: the length of a pack.

    Returns:
        the rows of each pack, by their place in ``lengths``.

    Source: best fit decreasing (Johnson, 1973), at most 11/9 of the fewest packs and one more.

    Example:
        >>> best_fit([5, 3, 2, 4], 7)
        [[0, 2], [3, 1]]
    """
    packs: list[list[int]] = []
    rooms: list[int] = []  # that packs have left, in order, each once
    having: dict[int, list[int]] = defaultdict(list)  # the packs, by the room that they have left
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect_left(rooms, lengths[row])
        if place < len(rooms):
            room = rooms[place]
            pack = having[room].pop()
            if not having[room]:
                del rooms[place]
        else:
            room, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(row)
        if left := room - lengths[row]:
            if not having[left]:
                insort(rooms, left)
            having[left].append(pack)
    return packs


def collate_packs(packs: Sequence[Sequence[LanguageRow]], pad: int) -> dict[str, Tensor]:
    """A language-model batch with a pack in each row, whose positions start again with each of the pack's rows.

    Padding, on the left, has no loss, and each of its tokens is a row of its own.
    """

    def joined(values: Any) -> list[list[int]]:
        return [list(chain.from_iterable(map(values, pack))) for pack in packs]

    return {
        "input_ids": pad_left(joined(lambda row: row["input_ids"]), pad),
        "labels": pad_left(joined(labels_of), IGNORE_INDEX),
        "position_ids": pad_left(joined(lambda row: range(len(row["input_ids"]))), 0),
    }
