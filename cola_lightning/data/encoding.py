"""Texts, and prompts with or without their responses, as tokens and as batches, padded on the left."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola_lightning.chat_template import end_of_text, n_appended
from cola_lightning.constants import IGNORE_INDEX
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError

# input_ids, and spans: where each stretch of tokens with a loss begins and ends, one number after the other.
LanguageRow = dict[str, list[int]]


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


# ---------------------------------------------------------------------- tokens


def tokenize(tokenizer: Any, texts: Sequence[str], *, is_whole: bool = False) -> list[list[int]]:
    """Tokens with the special tokens that the tokenizer prepends, and without those that it appends.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        is_whole: whether the texts already contain all special tokens, as from a chat template.
    """
    return _tokenize(tokenizer, texts, is_whole=is_whole)[0]


def _tokenize(tokenizer: Any, texts: Sequence[str], *, is_whole: bool) -> tuple[list[list[int]], Any]:
    """Tokens, and the ``tokenizers.Encoding`` of each text; None for the latter if the tokenizer is a slow one."""
    if not texts:
        return [], []
    # Without a warning of texts that are too long: they are truncated later.
    encoded = tokenizer(list(texts), add_special_tokens=not is_whole, return_attention_mask=False, verbose=False)
    n = 0 if is_whole else n_appended(tokenizer)
    return [ids[: len(ids) - n] for ids in encoded["input_ids"]] if n else encoded["input_ids"], encoded.encodings


@dataclass(frozen=True)
class Continued:
    """A text that continues a prompt, in tokens.

    Attributes:
        ids: the tokens of the text.
        n_prompt: how many of them, from the first, are also the first tokens of the prompt alone.
        is_edge: whether these are all tokens of the prompt, so that its end is an edge between two tokens of the text.
    """

    ids: list[int]
    n_prompt: int
    is_edge: bool


def tokenize_continued(
    tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], *, is_whole: bool = False
) -> list[Continued]:
    """Tokenizes texts that continue prompts; a prompt alone only where the text does not show where its tokens end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: the beginning of each text.
        texts: the texts.
        is_whole: whether the texts already contain all special tokens, as from a chat template.
    """
    tokens, encodings = _tokenize(tokenizer, texts, is_whole=is_whole)
    end, followed = tokenize(tokenizer, ["\n", "\na"], is_whole=True)
    keeps_line_end = bool(end) and followed[: len(end)] == end
    found = [
        _visible_edge(*one, keeps_line_end=keeps_line_end)
        for one in zip(prompts, texts, encodings or [None] * len(texts), strict=True)
    ]
    unseen = [prompt for prompt, n in zip(prompts, found, strict=True) if n is None]
    others = iter(tokenize(tokenizer, unseen, is_whole=is_whole))
    continued = []
    for ids, n in zip(tokens, found, strict=True):
        before = next(others) if n is None else ids[:n]
        n_prompt = n_common(before, ids)
        continued.append(Continued(ids, n_prompt, n_prompt == len(before)))
    return continued


def _visible_edge(prompt: str, text: str, encoding: Any, *, keeps_line_end: bool) -> int | None:
    """How many tokens of a text are its prompt's, if the prompt ends between two tokens before a space or after a line break.

    None elsewhere: what follows may then change the prompt's last tokens though none spans its end. GPT-2 splits two line
    breaks before a word and joins them at the end of a text; others remove white space there, or mark the end of a word.

    Args:
        prompt: the beginning of the text.
        text: the text.
        encoding: the ``tokenizers.Encoding`` of the text; None: a slow tokenizer has none.
        keeps_line_end: whether a line break at the end of a text has the tokens that it has before a word.
    """
    n = len(prompt)
    if encoding is None or not text.startswith(prompt):
        return None
    is_before_space = _is_visible(prompt[-1:]) and text[n : n + 1] == " "
    is_after_line = _is_visible(prompt[-2:-1]) and prompt[-1:] == "\n" and text[n : n + 1].isalnum() and keeps_line_end
    place = encoding.char_to_token(n) if is_before_space or is_after_line else None
    if not place or encoding.token_to_chars(place)[0] != n:
        return None
    before = encoding.token_to_chars(place - 1)  # None: of a special token that the tokenizer prepends
    return place if before is not None and before[1] == n else None


def _is_visible(character: str) -> bool:
    """Whether there is a character that is neither white space nor a mark that Unicode joins to what follows."""
    return bool(character.strip()) and character.isprintable()


def identity_of_tokenizer(tokenizer: Any) -> str | None:
    """A hash of what determines its tokens and chat template; None for a tokenizer with custom code, which may change."""
    import tokenizers
    import transformers

    kind = type(tokenizer)
    if not tokenizer.is_fast or kind.__module__.partition(".")[0] != "transformers":
        return None
    digest = hashlib.sha256()
    identity = (transformers.__version__, tokenizers.__version__, kind.__module__, kind.__qualname__)
    # The backend's serialisation omits split_special_tokens.
    for part in (*identity, tokenizer.split_special_tokens, tokenizer.special_tokens_map, tokenizer.chat_template):
        digest.update(repr(part).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[LanguageRow]]:
    """Texts as tokens with a loss on all of them; a text over ``max_length`` becomes several rows, a single token none."""
    rows, end = [], end_of_text(tokenizer)
    for ids in tokenize(tokenizer, texts):
        ids = _ended(ids, end)
        pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        # A first token is not predicted.
        rows.append([{"input_ids": piece, "spans": [1, len(piece)]} for piece in pieces if len(piece) > 1])
    return rows


def encode_responses(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int, places: Sequence[str]
) -> list[LanguageRow]:
    """Prompts with their responses, each pair tokenized as one text; the loss is on the response and its end-of-text token.

    A token that spans the boundary of prompt and response counts as the response's, and so do spaces at the prompt's end,
    whether they are separate tokens or not: in generation the prompt has none.

    Args:
        tokenizer: a Hugging Face tokenizer.
        pairs: prompt and response. If both together are too long, the prompt is truncated on the left, never the response.
        max_length: of both together, in tokens.
        places: each pair's place, for messages.

    Raises:
        UserError: if a response alone is too long, or adds nothing to its prompt.
    """
    prompts, texts = [prompt.rstrip(" ") for prompt, _ in pairs], [prompt + response for prompt, response in pairs]
    rows, end = [], end_of_text(tokenizer)
    for text, (_, response), place in zip(tokenize_continued(tokenizer, prompts, texts), pairs, places, strict=True):
        if text.n_prompt == len(text.ids):
            raise UserError(f"{place}: expected a response that adds tokens to its prompt, received {response!r}")
        ids = _ended(text.ids, end)
        n_response = len(ids) - text.n_prompt
        if n_response >= max_length:
            raise response_too_long(place, n_response, max_length)
        ids = truncate_left(ids, max_length, tokenizer.bos_token_id)
        rows.append({"input_ids": ids, "spans": [max(len(ids) - n_response, 1), len(ids)]})  # a first token is not predicted
    return rows


def encode_prompts(tokenizer: Any, prompts: Sequence[str], max_length: int, *, is_whole: bool) -> list[list[int]]:
    """Prompts for generation as tokens; a longer one is truncated on the left, as in training.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: the texts; spaces at their ends are removed, for the model to generate.
        max_length: in tokens.
        is_whole: whether they are formatted by the chat template; their spaces then stay.
    """
    if is_whole:
        return [ids[-max_length:] for ids in tokenize(tokenizer, prompts, is_whole=True)]
    rows = tokenize(tokenizer, [prompt.rstrip(" ") for prompt in prompts])
    return [truncate_left(ids, max_length, tokenizer.bos_token_id) for ids in rows]


def response_too_long(place: str, n_response: int, max_length: int) -> UserError:
    """The error for a response that would be truncated."""
    return UserError(f"{place}: expected a response of fewer than {max_length} tokens (data.max_length), received {n_response}")


def _ended(ids: list[int], end: int | None) -> list[int]:
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def truncate_left(ids: list[int], max_length: int, bos: int | None) -> list[int]:
    """The last tokens; a beginning-of-sentence token stays in front of them.

    Example:
        >>> truncate_left([0, 5, 6, 7], 3, bos=0), truncate_left([5, 6, 7, 8], 3, bos=0)
        ([0, 6, 7], [6, 7, 8])
    """
    if len(ids) <= max_length:
        return ids
    return ids[:1] + ids[len(ids) - max_length + 1 :] if ids[0] == bos else ids[-max_length:]


def n_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common prefix of two sequences."""
    if first == second[: len(first)]:
        return len(first)
    return next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


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


# ---------------------------------------------------------------------- batches


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
        "decoding": decoding.to_dict(),
        "end_tokens": end_tokens,
    }


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one tensor."""
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])
