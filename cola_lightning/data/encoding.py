"""Texts, and prompts with or without their responses, as tokens and as batches, padded on the left."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cola_lightning.chat_template import end_of_text, n_appended
from cola_lightning.constants import IGNORE_INDEX
from cola_lightning.data.rows import each
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UnusableRow

# input_ids; spans: where each stretch of tokens with a loss begins and ends, one number after the other; and lost: how many
# tokens a longer row had.
LanguageRow = dict[str, Any]
TooLong = Literal["shorten", "skip"]
TOO_LONG = "longer than data.max_length"


class Pair(NamedTuple):
    """A prompt and its response.

    Attributes:
        prompt: the prompt.
        n_head: the length of its beginning that it does not lose, in characters: the system prompt.
        response: the response.
    """

    prompt: str
    n_head: int
    response: str


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


def room_for_prompt(max_length: int, n_response: int) -> int:
    """How many tokens a prompt may have: what its response leaves of ``max_length``, but at least a quarter of it."""
    return max(max_length - n_response, max_length // 4)


def tokenize(tokenizer: Any, texts: Sequence[str], *, is_whole: bool = False) -> list[list[int]]:
    """Tokens with the special tokens that the tokenizer prepends, and without those that it appends.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        is_whole: whether the texts already contain all special tokens, as from a chat template.
    """
    return _tokenize(tokenizer, texts, is_whole=is_whole)[0]


def _tokenize(tokenizer: Any, texts: Sequence[str], *, is_whole: bool) -> tuple[list[list[int]], Any]:
    """Tokens, and the ``tokenizers.Encoding`` of each text; None in its place if the tokenizer is a slow one."""
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
    """Tokenizes texts that continue prompts; a prompt separately only if its boundary is ambiguous.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: the beginning of each text.
        texts: the texts.
        is_whole: whether the texts already contain all special tokens, as from a chat template.
    """
    tokens, encodings = _tokenize(tokenizer, texts, is_whole=is_whole)
    end, followed = tokenize(tokenizer, ["\n", "\na"], is_whole=True)
    keeps_line_end = bool(end) and followed[: len(end)] == end
    triples = zip(prompts, texts, encodings or [None] * len(texts), strict=True)
    edges = [_visible_edge(*triple, keeps_line_end=keeps_line_end) for triple in triples]
    unseen = [prompt for prompt, n in zip(prompts, edges, strict=True) if n is None]
    others = iter(tokenize(tokenizer, unseen, is_whole=is_whole))
    continued = []
    for ids, n in zip(tokens, edges, strict=True):
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
    identity = transformers.__version__, tokenizers.__version__, kind.__module__, kind.__qualname__
    # The backend's serialisation omits split_special_tokens.
    settings = tokenizer.split_special_tokens, tokenizer.special_tokens_map, tokenizer.chat_template
    return hashlib.sha256(repr((identity, settings, tokenizer.backend_tokenizer.to_str())).encode()).hexdigest()


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[LanguageRow] | UnusableRow]:
    """Texts as tokens with a loss on all of them; a text over ``max_length`` becomes several rows."""
    rows, end = list[list[LanguageRow] | UnusableRow](), end_of_text(tokenizer)
    for ids in tokenize(tokenizer, texts):
        ids = _ended(ids, end)
        pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        # A first token is not predicted.
        encoded: list[LanguageRow] = [{"input_ids": piece, "spans": [1, len(piece)]} for piece in pieces if len(piece) > 1]
        rows.append(encoded or UnusableRow("no text" if max_length > 1 else "data.max_length leaves no token to predict"))
    return rows


def encode_responses(
    tokenizer: Any, pairs: Sequence[Pair], max_length: int, too_long: TooLong = "shorten"
) -> list[list[LanguageRow] | UnusableRow]:
    """Prompts with their responses, each pair tokenized as one text; the loss is on the response and its end-of-text token.

    A token that spans the boundary of prompt and response counts as the response's, and so do spaces at the prompt's end,
    whether they are separate tokens or not: in generation the prompt has none.

    Args:
        tokenizer: a Hugging Face tokenizer.
        pairs: the pairs.
        max_length: of both together, in tokens.
        too_long: whether to shorten or to skip a longer pair. First the prompt loses tokens after its beginning-of-sentence
            token and system prompt, until it has a quarter of ``max_length``; then the response loses its end.
    """
    prompts, texts = [pair.prompt.rstrip(" ") for pair in pairs], [pair.prompt + pair.response for pair in pairs]
    end = end_of_text(tokenizer)

    def row(pair_and_text: tuple[Pair, Continued]) -> list[LanguageRow]:
        pair, text = pair_and_text
        if text.n_prompt == len(text.ids):
            raise UnusableRow("no response")
        ids, n_prompt = _ended(text.ids, end), text.n_prompt
        if len(ids) > max_length:
            if too_long == "skip":
                raise UnusableRow(TOO_LONG)
            room = room_for_prompt(max_length, len(ids) - n_prompt)
            prompt = truncate_left(ids[:n_prompt], room, tokenizer, pair.prompt[: pair.n_head])
            shortened = [*prompt, *ids[n_prompt:]][:max_length]
            return [_row(shortened, len(prompt), len(ids) - len(shortened))]
        return [_row(ids, n_prompt, 0)]

    return each(row, zip(pairs, tokenize_continued(tokenizer, prompts, texts), strict=True))


def _row(ids: list[int], start: int, n_lost: int) -> LanguageRow:
    if len(ids) <= max(start, 1):
        raise UnusableRow("data.max_length leaves no room for the response")
    return {"input_ids": ids, "spans": [max(start, 1), len(ids)], "lost": n_lost}  # a first token is not predicted


def encode_prompt(tokenizer: Any, prompt: str, max_length: int, head: str = "", *, is_whole: bool) -> list[int]:
    """A prompt for generation as tokens; a longer one is truncated on the left, as in training.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: the text; spaces at its end are removed, for the model to generate.
        max_length: in tokens.
        head: the beginning of the text that stays.
        is_whole: whether it is formatted by the chat template; its spaces then stay.
    """
    (ids,) = tokenize(tokenizer, [prompt if is_whole else prompt.rstrip(" ")], is_whole=is_whole)
    return truncate_left(ids, max_length, tokenizer, head)


def _ended(ids: list[int], end: int | None) -> list[int]:
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def truncate_left(ids: list[int], max_length: int, tokenizer: Any, head: str = "") -> list[int]:
    """The last tokens; a beginning-of-sentence token stays in front of them, and so does the beginning of the text.

    Args:
        ids: the tokens of a text.
        max_length: how many may stay.
        tokenizer: a Hugging Face tokenizer.
        head: the beginning of the text that stays, if it leaves room for other tokens.
    """
    if len(ids) <= max_length:
        return ids
    n_head = n_common(tokenize(tokenizer, [head])[0], ids) if head else 0
    n_head = n_head if 0 < n_head < max_length else int(ids[0] == tokenizer.bos_token_id)
    return ids[:n_head] + ids[len(ids) - max_length + n_head :]


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
