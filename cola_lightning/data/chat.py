"""Conversations to train on, as tokens: each assistant turn once, after the prompt that a server would generate it from."""

import bisect
import functools
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cola_lightning.chat_template import ChatTemplate, Conversation, Message, text_of
from cola_lightning.data.encoding import LanguageRow, n_common, response_too_long, tokenize_continued
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)

MODE = "enable_thinking"  # the template variable by which a generation prompt opens a thought or does not


@dataclass(frozen=True)
class Turn:
    """An assistant turn, in tokens.

    Attributes:
        ids: the conversation up to the turn.
        start: where the loss begins.
        end: where the loss ends: after the stop token.
        follows_prompt: whether the loss begins where the generation prompt ends, between two tokens.
        departs: whether the text of the turn is not the generation prompt's continued.
    """

    ids: list[int]
    start: int
    end: int
    follows_prompt: bool
    departs: bool

    def is_inside(self, other: "Turn") -> bool:
        """Whether a later turn's context holds this one, token by token, so that one row trains both."""
        return self.end <= other.start and self.ids[: self.end] == other.ids[: self.end]


def encode_conversations(
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    max_length: int,
    places: Sequence[str],
    *,
    loss: Literal["all", "last"] = "all",
    keeps_response: bool = False,
) -> list[list[LanguageRow]]:
    """Conversations as tokens, with the loss on what the assistant must generate: each of its turns, with its stop token.

    Each turn is trained once, in its own context: the rendering of the turns before it, with the generation prompt. A template
    that only appends gives one row for the conversation; one that rewrites earlier turns (drops their thoughts, moves the
    system prompt) gives as many rows as there are contexts.

    Args:
        template: the tokenizer's chat template.
        conversations: each begins with another role's turn, and ends with the assistant's.
        max_length: in tokens; a longer row is truncated on the left.
        places: each conversation's place, for messages.
        loss: on ``all`` assistant turns, or on the ``last`` one alone.
        keeps_response: whether to refuse a conversation whose assistant turns would be truncated.

    Returns:
        The rows of each conversation.

    Raises:
        UserError: if the last turn is not the assistant's, the first one is, or the template does not render its words.
    """
    contexts, counts = [], []
    for conversation, place in zip(conversations, places, strict=True):
        ends = [end for end in _ends_of_turns(conversation.messages, place) if end > conversation.n_prompt]
        ends = ends[-1:] if loss == "last" else ends
        contexts += [(replace(conversation, messages=conversation.messages[:end]), place) for end in ends]
        counts.append(len(ends))
    turns = iter(_turns(template, contexts))
    rows = []
    for count, place in zip(counts, places, strict=True):
        groups = _in_rows(_stopped(template, list(itertools.islice(turns, count))))
        rows.append([_row(group, max_length, place, keeps_response=keeps_response) for group in groups])
    return rows


def _ends_of_turns(messages: Sequence[Message], place: str) -> list[int]:
    """How many messages there are up to each assistant turn."""
    roles = [turn["role"] for turn in messages]
    if roles[0] == "assistant":
        raise UserError(f"{place}: expected a first turn of another role than assistant, received the assistant's")
    if roles[-1] != "assistant":
        raise UserError(f"{place}: expected the assistant's turn as the last one, for a loss, received the {roles[-1]}'s")
    return [k for k, role in enumerate(roles, start=1) if role == "assistant"]


def _turns(template: ChatTemplate, contexts: Sequence[tuple[Conversation, str]]) -> list[Turn]:
    """The last turn of each conversation, rendered in the mode whose generation prompt it follows, if there is one."""
    source, turns = str(template.tokenizer.chat_template), _encode(template, contexts)
    for mode in (False, True) if MODE in source and MODE not in template.kwargs else ():
        strays = [k for k, turn in enumerate(turns) if not turn.follows_prompt]
        for k, turn in zip(strays, _encode(template, [contexts[k] for k in strays], **{MODE: mode}), strict=True):
            if turn.follows_prompt:
                turns[k] = turn
                _warn_once(
                    f"assistant turns that do not follow the chat template's generation prompt are rendered with {MODE} "
                    f"{mode}; data.chat_template_kwargs '{{{MODE}: {str(mode).lower()}}}' does so in generation, too",
                    source,
                )
    if any(turn.departs for turn in turns):
        _warn_once(
            "the chat template's generation prompt opens a thought, or the like, that assistant turns of the rows do not have: "
            "their loss begins where they depart from it",
            source,
        )
    return turns


def _encode(template: ChatTemplate, contexts: Sequence[tuple[Conversation, str]], **mode: bool) -> list[Turn]:
    texts: list[tuple[str, str]] = []
    for conversation, place in contexts:
        before, turn = replace(conversation, messages=conversation.messages[:-1]), conversation.messages[-1]
        prompt = template.render(before, place, is_open=True, **mode)
        whole = template.render(conversation, place, is_open=False, **mode)
        if not whole.startswith(prompt):
            whole = _continued(prompt, template.render(before, place, is_open=False, **mode), whole, place)
        _check_words(template, turn, whole[n_common(prompt, whole) :], place)
        texts.append((prompt, whole))
    prompts, wholes = [prompt for prompt, _ in texts], [whole for _, whole in texts]
    turns = []
    for (prompt, whole), tokens in zip(
        texts, tokenize_continued(template.tokenizer, prompts, wholes, is_whole=True), strict=True
    ):
        ids, start = tokens.ids, tokens.n_prompt
        special = [k for k in range(start, len(ids)) if ids[k] in template.special_ids]
        n_after = template.n_after_stop
        end = len(ids) if n_after is None or n_after >= len(special) else special[-1 - n_after] + 1
        turns.append(Turn(ids, start, end, tokens.is_edge, not whole.startswith(prompt)))
    return turns


def _continued(prompt: str, before: str, whole: str, place: str) -> str:
    """A turn after its prompt, where the template renders the turns before it otherwise once it is there.

    Args:
        prompt: the turns before it, with the generation prompt.
        before: without the generation prompt.
        whole: with the turn.
        place: names the conversation in messages.
    """
    n_history = n_common(prompt, before)
    if n_common(prompt, whole) >= n_history:  # they are the same; the turn is not what the generation prompt opens
        return whole
    lengths = range(1, len(prompt) + 1)  # of the prompt's end; the longest one that is in both
    n_end = bisect.bisect_left(lengths, True, key=lambda n: prompt[-n:] not in whole)
    if n_end < max(1, len(prompt) - n_history):
        raise UserError(f"{place}: expected a chat template whose generation prompt begins an assistant turn, received another")
    return prompt + whole[whole.rindex(prompt[-n_end:]) + n_end :]


def _check_words(template: ChatTemplate, turn: Message, rendered: str, place: str) -> None:
    """Refuses a rendering without the last word of what the assistant says, or without the functions that it calls."""
    said = text_of(turn["content"])  # of which a template may omit thoughts, and white space
    calls = [call.get("function", call).get("name", "") for call in turn.get("tool_calls") or ()]
    for words in [*(re.findall(r"\w+", said) or said.split())[-1:], *calls]:
        if words not in rendered:
            raise UserError(f"{place}: expected a chat template that renders the assistant's words, {words!r} among them")
    thoughts = turn.get("reasoning_content") or said.rpartition("</think>")[0].rpartition("<think>")[2]
    if str(thoughts).strip() not in rendered:
        _warn_once("the chat template does not render the thoughts of assistant turns", template.tokenizer.chat_template)


@functools.cache
def _warn_once(message: str, chat_template: str) -> None:
    """Warns once for each chat template."""
    log.warning(message)


def _stopped(template: ChatTemplate, turns: list[Turn]) -> list[Turn]:
    """A conversation's turns, each with its stop token: that with which the next turn begins, if the template has no other.

    If that is none either, the last turn ends with the end of text.
    """
    if template.n_after_stop is not None:
        return turns
    stopped = []
    for turn, following in itertools.zip_longest(turns, turns[1:]):
        n, stop = len(turn.ids), template.stop_tokens
        if following is not None and turn.is_inside(following):
            if template.special_ids.issuperset(following.ids[n : n + 1]):
                stop = following.ids[n : n + 1]  # a tool's turn, say, and not the user's
            elif template.is_plain:
                stop = []  # the last turn alone has the end of text
        stopped.append(replace(turn, ids=[*turn.ids, *stop], end=n + len(stop)))
    return stopped


def _in_rows(turns: Sequence[Turn]) -> list[list[Turn]]:
    """A conversation's turns, together where a later turn's context holds an earlier one."""
    rows: list[list[Turn]] = []
    for turn in turns:
        row = next((row for row in rows if row[-1].is_inside(turn)), None)
        if row is None:
            rows.append(row := [])
        row.append(turn)
    return rows


def _row(turns: Sequence[Turn], max_length: int, place: str, *, keeps_response: bool) -> LanguageRow:
    """The row of turns whose contexts are all in the last one."""
    ids = turns[-1].ids[-max_length:]
    n_cut = len(turns[-1].ids) - len(ids)
    if keeps_response and (n_response := len(turns[-1].ids) - turns[0].start) >= max_length:
        raise response_too_long(place, n_response, max_length)
    spans = [(max(turn.start - n_cut, 1), turn.end - n_cut) for turn in turns if turn.end - n_cut > 1]  # a first token is given
    if not spans:
        raise UserError(f"{place}: expected words of the assistant in the last {max_length} tokens (data.max_length)")
    return {"input_ids": ids, "spans": [place for span in spans for place in span]}
