"""Conversations to train on, as tokens."""

from collections.abc import Sequence
from typing import Any

from cola_lightning.conventions import IGNORE_INDEX
from cola_lightning.data.encoding import LanguageRow, response_too_long
from cola_lightning.data.tokens import tokenize_with_places
from cola_lightning.errors import UserError
from cola_lightning.turns import Messages, render


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Messages], max_length: int, places: Sequence[str], *, keeps_response: bool = False
) -> list[LanguageRow]:
    """Conversations as tokens in the tokenizer's chat template; the loss is on the assistant's turns, including their end.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        conversations: turns, each with ``role`` and ``content``.
        max_length: in tokens; a longer conversation is truncated on the left.
        places: each conversation's file and line, for messages.
        keeps_response: whether to refuse a conversation whose assistant's turns would be truncated.

    Raises:
        UserError: if the last turn is not the assistant's, the first one is, or the template does not write turn after turn;
            for a tokenizer that is not a fast one.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "model.model_name: expected a fast tokenizer for conversations, which tells where each token lies in the text, "
            f"received {type(tokenizer).__name__}"
        )
    written = [_write(tokenizer, messages, place) for messages, place in zip(conversations, places, strict=True)]
    tokens = tokenize_with_places(tokenizer, [text for text, _ in written])
    rows = []
    for (ids, starts, ends), (_, said), place in zip(tokens, written, places, strict=True):
        # A token of white space may begin where it ends (ByteLevel's trim_offsets): then it begins where the last one ended.
        starts = [min(a, before) if a == b else a for a, b, before in zip(starts, ends, [0, *ends[:-1]], strict=True)]
        is_said = [any(start < end and end > a and start < b for a, b in said) for start, end in zip(starts, ends, strict=True)]
        if keeps_response and any(is_said) and (n_response := len(ids) - is_said.index(True)) >= max_length:
            raise response_too_long(place, n_response, max_length)
        labels = [token if said else IGNORE_INDEX for token, said in zip(ids, is_said, strict=True)]
        labels = [IGNORE_INDEX, *labels[-max_length:][1:]]  # a first token is not predicted
        if set(labels) == {IGNORE_INDEX}:
            raise UserError(
                f"{place}: expected words of the assistant in the last {max_length} tokens (data.max_length), received none"
            )
        rows.append({"input_ids": ids[-max_length:], "labels": labels})
    return rows


def _write(tokenizer: Any, messages: Messages, place: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and the spans of the assistant's turns in it."""
    if messages[0]["role"] == "assistant":
        raise UserError(f"{place}: expected a first turn of another role than assistant, received the assistant's")
    text, said = render(tokenizer, messages, place, is_open=False), []
    for k, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before = render(tokenizer, messages[:k], place, is_open=True)
            after = render(tokenizer, messages[: k + 1], place, is_open=False)
            if not text.startswith(after) or not after.startswith(before):
                raise UserError(f"{place}: expected a chat template that writes turn after turn, received one that does not")
            said.append((len(before), len(after)))
    if not said:
        raise UserError(f"{place}: expected a turn of the role assistant, received {[turn['role'] for turn in messages]}")
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{place}: expected the assistant's turn as the last one, for a loss (predict answers another role's), "
            f"received one of the role {messages[-1]['role']}"
        )
    return text, said
