"""Collates tokens into batches, padded on the left."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cola_lightning.conventions import IGNORE_INDEX
from cola_lightning.data.encoding import LanguageRow, PromptRow, labels_of
from cola_lightning.data.examples import EncodedExample
from cola_lightning.decoding import Decoding


def collate_options(
    rows: Sequence[EncodedExample], pad: int, loss: str = "options", metric: str | None = None
) -> dict[str, Any]:
    """An option batch, padded on the left to its longest prefix: see :class:`~cola_lightning.COLACausalLM` for its parts."""
    batch: dict[str, Any] = {"loss": loss} | ({"metric": metric} if metric else {})
    batch |= {"prompt": [row.example.prompt for row in rows], "options": [list(row.example.options) for row in rows]}
    if rows[0].prompt_ids:
        batch["prompt_ids"] = _pad_left([row.prompt_ids for row in rows], pad)
        batch["prompt_mask"] = _pad_left([[1] * len(row.prompt_ids) for row in rows], 0)
        batch["references"] = [list(row.example.references) for row in rows]
    if not all(row.prefixes for row in rows):  # the answers are unknown and will be generated
        return batch
    prefixes = [prefix for row in rows for prefix in row.prefixes]
    n_options, n_tokens = max(len(row.option_ids) for row in rows), max(len(ids) for row in rows for ids in row.option_ids)
    option_ids = torch.full((len(rows), n_options, n_tokens), IGNORE_INDEX)
    option_rows = torch.zeros(len(rows), n_options, dtype=torch.long)
    first = 0
    for i, row in enumerate(rows):
        for k, (ids, prefix) in enumerate(zip(row.option_ids, row.prefix_of, strict=True)):
            option_ids[i, k, n_tokens - len(ids) :] = torch.tensor(ids)
            option_rows[i, k] = first + prefix
        first += len(row.prefixes)
    if any(row.example.accepted for row in rows):
        accepted = torch.zeros(len(rows), n_options, dtype=torch.bool)
        for i, row in enumerate(rows):
            answers = row.example.accepted or ([] if row.example.answer is None else [row.example.answer])
            accepted[i, list(answers)] = True
        batch["accepted"] = accepted
    if len(prefixes) > len(rows):
        batch["n_sequences"] = torch.tensor([len(row.prefixes) for row in rows])
        batch["n_shared"] = torch.tensor([row.n_shared for row in rows])
    return batch | {
        "input_ids": _pad_left(prefixes, pad),
        "attention_mask": _pad_left([[1] * len(prefix) for prefix in prefixes], 0),
        "sequence_lengths": [len(prefix) for prefix in prefixes],
        "option_ids": option_ids,
        "option_rows": option_rows,
        "answer": torch.tensor([IGNORE_INDEX if row.example.answer is None else row.example.answer for row in rows]),
    }


def collate_language(rows: Sequence[LanguageRow], pad: int) -> dict[str, Tensor]:
    """The usual language-model batch, padded on the left, so that the tokens with a loss are aligned at its end."""
    return {
        "input_ids": _pad_left([row["input_ids"] for row in rows], pad),
        "attention_mask": _pad_left([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": _pad_left([labels_of(row) for row in rows], IGNORE_INDEX),
    }


def collate_prompts(rows: Sequence[PromptRow], pad: int, decoding: Decoding, end_tokens: list[int]) -> dict[str, Any]:
    """Prompts for generation, padded on the left, and decoding options: see :meth:`~cola_lightning.COLACausalLM.generate`."""
    return {
        "prompt_ids": _pad_left([row.prompt_ids for row in rows], pad),
        "prompt_mask": _pad_left([[1] * len(row.prompt_ids) for row in rows], 0),
        "prompt": [row.prompt for row in rows],
        "target": [row.target for row in rows],
        "decoding": decoding.to_dict(),
        "end_tokens": end_tokens,
    }


def _pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])
