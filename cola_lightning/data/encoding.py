"""From text to tokens to batches: prompts with their options, and text with a language-model loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cola_lightning.errors import UserError

IGNORED = -100  # no token, or no loss: Hugging Face's value
MAX_NEW_TOKENS = 50  # of an answer that is generated: the protocol's


@dataclass(frozen=True)
class Example:
    """A prompt, the options to choose from, and which one is right; or a prompt whose answer is generated.

    Attributes:
        prompt: what stands before each option.
        options: appended to the prompt as they are; where the answer is generated, the one that is learned.
        answer: the right one's place among them.
        place: where the row stands, for messages.
        accepted: places of all options that count as right, where there are several.
        references: where the answer is generated: what it is compared with.

    Raises:
        UserError: if there is no option, if two are equal, or if the answer is none of them.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int
    place: str = "an example"
    accepted: tuple[int, ...] = ()
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.options:
            raise UserError(f"{self.place}: expected options to choose from, received none")
        if len(set(self.options)) < len(self.options):
            twice = next(option for option in self.options if self.options.count(option) > 1)
            raise UserError(f"{self.place}: expected options that differ, received {twice!r} twice")
        if not 0 <= self.answer < len(self.options):
            raise UserError(
                f"{self.place}: expected the place of one of {len(self.options)} options as the answer, received {self.answer}"
            )

    def right(self) -> "Example":
        """The same with the right option alone: what the language model's loss needs."""
        return replace(self, options=(self.options[self.answer],), answer=0, accepted=(), references=())


@dataclass(frozen=True)
class EncodedExample:
    """An example in tokens.

    Attributes:
        example: what was encoded.
        prefixes: what precedes an option's last token: once for all options that share it, so that options of one token
            need one forward pass.
        prefix_of: for each option, its place in ``prefixes``.
        option_ids: for each option, its tokens.
        prompt_ids: where the answer is generated, the prompt, with room left for the answer; else empty.
        n_shared: with how many tokens all prefixes begin, without those that an option's tokens are predicted at.
    """

    example: Example
    prefixes: list[list[int]]
    prefix_of: list[int]
    option_ids: list[list[int]]
    prompt_ids: list[int]
    n_shared: int

    def __len__(self) -> int:
        return max(map(len, self.prefixes))


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], max_length: int, *, is_chat: bool = False
) -> list[EncodedExample]:
    """Tokenises prompt and option as one text; what that has more than the prompt alone is the option.

    A text that is too long loses tokens at the left; a beginning-of-sentence token stays. No option is cut.

    Args:
        tokenizer: a Hugging Face tokenizer.
        examples: what to encode.
        max_length: of prompt and option, in tokens.
        is_chat: whether a prompt is a user's turn in the tokenizer's chat template, and its option what the assistant says.

    Raises:
        UserError: if an option alone is too long, or adds no token to its prompt.
    """
    if max_length <= MAX_NEW_TOKENS + 1 and any(example.references for example in examples):
        raise UserError(
            f"data.max_length: expected more than {MAX_NEW_TOKENS + 1}, for an answer that is written takes up to "
            f"{MAX_NEW_TOKENS} tokens, received {max_length}"
        )
    befores = [_as_turn(tokenizer, example.prompt, example.place) if is_chat else example.prompt for example in examples]
    afters = [before + option for before, example in zip(befores, examples, strict=True) for option in example.options]
    prompts, texts = (_tokenize(tokenizer, some, is_whole=is_chat) for some in (befores, afters))
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
        room = max_length - MAX_NEW_TOKENS
        prompt_ids = truncate_left(prompt, room, tokenizer.bos_token_id) if example.references else []
        n_free = min(len(prefixes[k]) - len(ids) for k, ids in zip(prefix_of, option_ids, strict=True))
        n_shared = min(n_free, *(_n_common(prefixes[0], prefix) for prefix in prefixes))
        encoded.append(EncodedExample(example, prefixes, prefix_of, option_ids, prompt_ids, max(n_shared, 0)))
    return encoded


def _as_turn(tokenizer: Any, prompt: str, place: str) -> str:
    """A user's turn, and the beginning of the assistant's."""
    return _render(tokenizer, [{"role": "user", "content": prompt}], place, is_open=True)


def _render(tokenizer: Any, messages: list[dict[str, str]], place: str, *, is_open: bool) -> str:
    """A conversation as text; ``is_open``: with the beginning of the assistant's next turn."""
    if not tokenizer.chat_template:
        raise UserError("data: expected a tokenizer with a chat template (model.model_name), received one without")
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
    except jinja2.TemplateError as error:
        raise UserError(f"{place}: expected turns that the chat template can write, received: {error}") from error
    return text


def encode_messages(
    tokenizer: Any, messages: list[dict[str, str]], max_length: int, place: str = "a row"
) -> dict[str, list[int]]:
    """A conversation as tokens in the tokenizer's chat template; the loss is on what the assistant says, its end included.

    Args:
        tokenizer: a Hugging Face tokenizer, a fast one.
        messages: turns of a ``role`` and its ``content``.
        max_length: in tokens; a longer conversation loses its beginning.
        place: where the row stands, for the message.

    Raises:
        UserError: if nobody says anything as the assistant, or it begins, or the template does not write turn after turn.
    """
    if messages[0]["role"] == "assistant":
        raise UserError(f"{place}: expected a conversation that somebody else begins, received one that the assistant does")
    text, spans = _render(tokenizer, messages, place, is_open=False), []
    for k, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before = _render(tokenizer, messages[:k], place, is_open=True)
            after = _render(tokenizer, messages[: k + 1], place, is_open=False)
            if not text.startswith(after) or not after.startswith(before):
                raise UserError(f"{place}: expected a chat template that writes turn after turn, received one that does not")
            spans.append((len(before), len(after)))
    if not spans:
        raise UserError(f"{place}: expected a turn of the role assistant, received {[turn['role'] for turn in messages]}")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_said = [any(start < end and end > a and start < b for a, b in spans) for start, end in encoded["offset_mapping"]]
    labels = [token if said else IGNORED for token, said in zip(encoded["input_ids"], is_said, strict=True)]
    labels = [IGNORED, *labels[-max_length:][1:]]  # a first token is not predicted
    if set(labels) == {IGNORED}:
        raise UserError(
            f"{place}: expected words of the assistant in the last {max_length} tokens (data.max_length), received none"
        )
    return {"input_ids": encoded["input_ids"][-max_length:], "labels": labels}


def _check_option(example: Example, n_prompt: int, n_option: int, max_length: int) -> None:
    if not n_prompt:
        raise UserError(f"{example.place}: expected a prompt of at least one token, received {example.prompt!r}")
    if n_option < 1:
        raise UserError(
            f"{example.place}: expected options that add tokens to the prompt (a blank belongs to their beginnings, not to its "
            f"end), received {example.options}"
        )
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


def _tokenize(tokenizer: Any, texts: list[str], *, is_whole: bool = False) -> list[list[int]]:
    """Tokens with what the tokenizer puts before a text, and without an end-of-text token that it puts behind it.

    ``is_whole``: the texts have all of that already, as a chat template writes it.
    """
    if not texts:
        return []
    encoded = tokenizer(texts, verbose=False, add_special_tokens=not is_whole)  # not verbose: we truncate ourselves
    rows: list[list[int]] = encoded["input_ids"]
    if is_whole:
        return rows
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


def collate_options(rows: Sequence[EncodedExample], pad: int, loss: str = "options") -> dict[str, Any]:
    """An option batch, padded on the left to its longest prefix: see :class:`~cola_lightning.COLACausalLM` for its parts."""
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
    batch: dict[str, Any] = {"loss": loss}
    if any(row.example.accepted for row in rows):
        accepted = torch.zeros(len(rows), n_options, dtype=torch.bool)
        for i, row in enumerate(rows):
            accepted[i, list(row.example.accepted or [row.example.answer])] = True
        batch["accepted"] = accepted
    if len(prefixes) > len(rows):
        batch["n_sequences"] = torch.tensor([len(row.prefixes) for row in rows])
        batch["n_shared"] = torch.tensor([row.n_shared for row in rows])
    if rows[0].prompt_ids:
        batch["prompt_ids"] = _pad_left([row.prompt_ids for row in rows], pad)
        batch["prompt_mask"] = _pad_left([[1] * len(row.prompt_ids) for row in rows], 0)
        batch["references"] = [list(row.example.references) for row in rows]
    return batch | {
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
