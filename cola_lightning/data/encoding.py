"""From text to tokens to batches: prompts with their options, and text with a language-model loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola_lightning.errors import UserError

IGNORED = -100  # no token, or no loss: Hugging Face's value


@dataclass(frozen=True)
class Example:
    """A prompt, the options to choose from, and which one is right.

    Attributes:
        prompt: what stands before each option.
        options: appended to the prompt as they are.
        answer: the right one's place among them.
        place: where the row stands, for messages.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int
    place: str = "an example"


@dataclass(frozen=True)
class EncodedExample:
    """An example in tokens.

    Attributes:
        example: what was encoded.
        prefixes: what precedes an option's last token: once for all options that share it, so that options of one token
            need one forward pass.
        prefix_of: for each option, its place in ``prefixes``.
        option_ids: for each option, its tokens.
    """

    example: Example
    prefixes: list[list[int]]
    prefix_of: list[int]
    option_ids: list[list[int]]

    def __len__(self) -> int:
        return max(map(len, self.prefixes))


def encode_examples(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[EncodedExample]:
    """Tokenises prompt and option as one text; what that has more than the prompt alone is the option.

    A text that is too long loses tokens at the left; a beginning-of-sentence token stays. No option is cut.

    Args:
        tokenizer: a Hugging Face tokenizer.
        examples: what to encode.
        max_length: of prompt and option, in tokens.

    Raises:
        UserError: if an option alone is too long, or adds no token to its prompt.
    """
    prompts = _tokenize(tokenizer, [example.prompt for example in examples])
    texts = _tokenize(tokenizer, [example.prompt + option for example in examples for option in example.options])
    encoded = []
    position = 0
    for example, prompt in zip(examples, prompts, strict=True):
        prefixes: list[list[int]] = []
        prefix_of, option_ids = [], []
        for text in texts[position : position + len(example.options)]:
            n_option = len(text) - len(prompt)
            _check_option(example, len(prompt), n_option, max_length)
            text = truncate_left(text, max_length, tokenizer.bos_token_id)
            if text[:-1] not in prefixes:
                prefixes.append(text[:-1])
            prefix_of.append(prefixes.index(text[:-1]))
            option_ids.append(text[-n_option:])
        position += len(example.options)
        encoded.append(EncodedExample(example, prefixes, prefix_of, option_ids))
    return encoded


def _check_option(example: Example, n_prompt: int, n_option: int, max_length: int) -> None:
    if not n_prompt:
        raise UserError(f"{example.place}: expected a prompt of at least one token, received {example.prompt!r}")
    if n_option < 1:
        raise UserError(f"{example.place}: expected options that add tokens to the prompt, received {example.options}")
    if n_option >= max_length:  # one token of the prompt must stay
        raise UserError(
            f"{example.place}: expected options of fewer than {max_length} tokens (data.max_length), received one of {n_option}"
        )


def encode_response(tokenizer: Any, prompt: str, response: str, max_length: int, place: str) -> dict[str, list[int]]:
    """A prompt and its response as tokens of one text; the loss is on the response and the end-of-text token after it.

    A token that holds the end of the prompt and the beginning of the response (a blank between them, say) is the response's.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: loses tokens at the left where both are too long.
        response: is never cut.
        max_length: of both, in tokens.
        place: where the row stands, for the message.

    Raises:
        UserError: if the response alone is too long.
    """
    before, text = _tokenize(tokenizer, [prompt, prompt + response])
    n_common = _n_common(before, text)
    if n_common == len(text):
        raise UserError(f"{place}: expected a response that adds tokens to its prompt, received {response!r}")
    text = text + _end_of_text(tokenizer, text)
    n_response = len(text) - n_common
    if n_response >= max_length:
        raise UserError(
            f"{place}: expected a response of 1 to {max_length - 1} tokens, its end among them (data.max_length is "
            f"{max_length}), received one of {n_response}"
        )
    text = truncate_left(text, max_length, tokenizer.bos_token_id)
    n_prompt = max(len(text) - n_response, 1)  # a first token is not predicted
    return {"input_ids": text, "labels": [IGNORED] * n_prompt + text[n_prompt:]}


def _n_common(first: list[int], second: list[int]) -> int:
    """How many tokens two texts share at their beginning."""
    return next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def encode_text(tokenizer: Any, text: str, max_length: int) -> list[dict[str, list[int]]]:
    """A text as tokens with a loss on all of them; a longer one becomes several pieces."""
    (ids,) = _tokenize(tokenizer, [text])
    ids = ids + _end_of_text(tokenizer, ids)
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    # A first token is not predicted.
    return [{"input_ids": piece, "labels": [IGNORED, *piece[1:]]} for piece in pieces if len(piece) > 1]


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens with what the tokenizer puts before a text, and without an end-of-text token that it puts behind it."""
    rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"] if texts else []  # not verbose: we truncate ourselves
    adds_end = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return [ids[:-1] for ids in rows] if adds_end else rows


def _end_of_text(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return [] if end is None or ids[-1:] == [end] else [end]


def truncate_left(ids: list[int], max_length: int, bos: int | None) -> list[int]:
    """The last tokens; a beginning-of-sentence token stays in front of them.

    Example:
        >>> truncate_left([0, 5, 6, 7], 3, bos=0), truncate_left([5, 6, 7, 8], 3, bos=0)
        ([0, 6, 7], [6, 7, 8])
    """
    if len(ids) <= max_length:
        return ids
    return ids[:1] + ids[len(ids) - max_length + 1 :] if ids[0] == bos else ids[-max_length:]


def collate_options(rows: Sequence[EncodedExample], pad: int) -> dict[str, Any]:
    """An option batch, padded on the left to its longest prefix: see ``COLACausalLM.option_scores`` for its tensors."""
    prefixes = [prefix for row in rows for prefix in row.prefixes]
    n_options, n_tokens = max(len(row.option_ids) for row in rows), max(len(ids) for row in rows for ids in row.option_ids)
    option_ids = torch.full((len(rows), n_options, n_tokens), IGNORED)
    option_rows = torch.zeros(len(rows), n_options, dtype=torch.long)
    first = 0
    for i, row in enumerate(rows):
        for k, (ids, prefix) in enumerate(zip(row.option_ids, row.prefix_of, strict=True)):
            option_ids[i, k, n_tokens - len(ids) :] = torch.tensor(ids)
            option_rows[i, k] = first + prefix
        first += len(row.prefixes)
    return {
        "input_ids": _pad_left(prefixes, pad),
        "attention_mask": _pad_left([[1] * len(prefix) for prefix in prefixes], 0),
        "option_ids": option_ids,
        "option_rows": option_rows,
        "answer": torch.tensor([row.example.answer for row in rows]),
        "prompt": [row.example.prompt for row in rows],
        "options": [list(row.example.options) for row in rows],
    }


def collate_language(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """The usual language-model batch, padded on the left, so that the tokens with a loss stand together at its end."""
    return {
        "input_ids": _pad_left([row["input_ids"] for row in rows], pad),
        "attention_mask": _pad_left([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": _pad_left([row["labels"] for row in rows], IGNORED),
    }


def _pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])
