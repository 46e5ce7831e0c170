"""Conversations to train on, as tokens: each assistant turn once, after the prompt that a server would generate it from."""

import bisect
import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cola_lightning.chat_template import ChatTemplate, Conversation, Message, text_of
from cola_lightning.data.encoding import TOO_LONG, LanguageRow, TooLong, n_common, room_for_prompt, tokenize_continued
from cola_lightning.data.fields import PreferencePair
from cola_lightning.data.rows import each, together
from cola_lightning.errors import UnusableRow

MODE = "enable_thinking"  # the template variable by which a generation prompt opens a thought or does not


class RenderedTurn(NamedTuple):
    """An assistant turn as text.

    Attributes:
        conversation: the conversation up to and with the turn.
        prompt: the turns before it, with the generation prompt.
        text: the same with the turn.
    """

    conversation: Conversation
    prompt: str
    text: str


@dataclass(frozen=True)
class EncodedTurn:
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

    def is_in_context_of(self, other: "EncodedTurn") -> bool:
        """Whether a later turn's context contains this one, token by token, so that one row can train both."""
        return self.end <= other.start and self.ids[: self.end] == other.ids[: self.end]


def encode_conversations(
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    max_length: int,
    notes: set[str],
    *,
    too_long: TooLong = "shorten",
    shortens_response: bool = False,
) -> list[list[LanguageRow] | UnusableRow]:
    """Conversations as tokens, with the loss on what the assistant must generate: its trained turns, with their stop tokens.

    Each turn is trained once, in its own context: the rendering of the turns before it, with the generation prompt. A template
    that only appends gives one row for the conversation; one that rewrites earlier turns (drops their thoughts, moves the
    system prompt) gives as many rows as there are contexts.

    Args:
        template: the tokenizer's chat template.
        conversations: each ends with a turn of the assistant's that is trained.
        max_length: in tokens.
        notes: lines for the log are added to it.
        too_long: whether to shorten or to skip a longer conversation. It loses its oldest exchanges whole, but not its system
            prompt; then what is asked last loses its beginning.
        shortens_response: whether a response that leaves its prompt less than a quarter of ``max_length`` loses its end;
            ``False``: such a conversation is skipped.

    Returns:
        The rows of each conversation, or the reason why it cannot be used.
    """

    def encode(conversation: Conversation, turns: list[EncodedTurn] | UnusableRow) -> list[LanguageRow]:
        n_tokens = 0  # of the longest turn's context, before the conversation is shortened
        while True:
            if isinstance(turns, UnusableRow):
                if (shorter := _without_greeting(conversation)) is None:
                    raise turns
            else:
                longest = max(turns, key=lambda turn: len(turn.ids))
                n_tokens = n_tokens or len(longest.ids)
                if n_tokens > max_length and too_long == "skip":
                    raise UnusableRow(TOO_LONG)
                shorter = _shortened(template, conversation, longest, max_length, shortens_response=shortens_response)
                if shorter is None:
                    first, *others = _grouped(turns)
                    n_lost = n_tokens - min(len(longest.ids), max_length)
                    return [_row(first, max_length, n_lost), *(_row(group, max_length, 0) for group in others)]
            conversation = shorter
            (turns,) = _encoded_turns(template, [conversation], notes)

    all_turns = _encoded_turns(template, conversations, notes)
    return each(lambda pair: encode(*pair), zip(conversations, all_turns, strict=True))


def encode_preferences(
    template: ChatTemplate, pairs: Sequence[PreferencePair], max_length: int, notes: set[str], too_long: TooLong = "shorten"
) -> list[tuple[LanguageRow, LanguageRow] | UnusableRow]:
    """Preference pairs as tokens, the chosen and the rejected response of each, with the loss on the response.

    Both keep the same prompt. If the longer one is over ``max_length``, the prompt is shortened as that of a conversation;
    then the responses lose their ends.

    Args:
        template: the tokenizer's chat template.
        pairs: the pairs.
        max_length: in tokens.
        notes: lines for the log are added to it.
        too_long: whether to shorten or to skip a longer pair.
    """

    def encode(pair: PreferencePair, encoded: Sequence[list[EncodedTurn] | UnusableRow]) -> tuple[LanguageRow, LanguageRow]:
        lengths: list[int] = []  # before the prompt is shortened
        while True:
            if reasons := [turns for turns in encoded if isinstance(turns, UnusableRow)]:
                if (shorter := _without_greeting(pair.prompt)) is None:
                    raise reasons[0]
            else:
                both = [_only_group(turns) for turns in encoded if not isinstance(turns, UnusableRow)]
                lengths = lengths or [len(turns[-1].ids) for turns in both]
                if max(lengths) > max_length and too_long == "skip":
                    raise UnusableRow(TOO_LONG)
                longer = max(both, key=lambda turns: len(turns[-1].ids))
                response = replace(longer[-1], start=longer[0].start)
                shorter = _shortened(template, pair.prompt, response, max_length, shortens_response=True)
                if shorter is None:
                    lost = [n - min(len(turns[-1].ids), max_length) for n, turns in zip(lengths, both, strict=True)]
                    return _row(both[0], max_length, lost[0]), _row(both[1], max_length, lost[1])
            pair = replace(pair, prompt=shorter)
            encoded = _encoded_turns(template, pair.conversations(), notes)

    flat = _encoded_turns(template, [conversation for pair in pairs for conversation in pair.conversations()], notes)
    return each(lambda item: encode(item[0], item[1:]), zip(pairs, flat[::2], flat[1::2], strict=True))


def fit_prompt(template: ChatTemplate, conversation: Conversation, max_length: int) -> str:
    """The prompt for the assistant's next turn, of a conversation that is shortened as in training."""
    while True:
        text = template.prompt(conversation)
        n_over = len(template.tokenizer(text, add_special_tokens=False)["input_ids"]) - max_length
        if n_over <= 0:
            return text
        conversation = _without_oldest(conversation, 0) or _without_beginning(template, conversation, n_over)


# ---------------------------------------------------------------------- shorter conversations


def _shortened(
    template: ChatTemplate, conversation: Conversation, longest: EncodedTurn, max_length: int, *, shortens_response: bool
) -> Conversation | None:
    """A shorter conversation, if this one is too long; None if it fits, or if only its response needs to lose its end.

    Args:
        template: the tokenizer's chat template.
        conversation: the conversation.
        longest: its turn with the longest context.
        max_length: in tokens.
        shortens_response: whether the response may lose its end.
    """
    if (n_over := len(longest.ids) - max_length) <= 0:
        return None
    if (shorter := _without_oldest(conversation, n_over / len(longest.ids))) is not None:
        return shorter
    if not shortens_response:
        return _without_beginning(template, conversation, n_over)
    n_over = longest.start - room_for_prompt(max_length, len(longest.ids) - longest.start)
    try:
        return _without_beginning(template, conversation, n_over) if n_over > 0 else None
    except UnusableRow:
        if longest.start > max_length - room_for_prompt(max_length, max_length):
            raise
        return None  # what is around a short question leaves room for a response


def _without_oldest(conversation: Conversation, share: float) -> Conversation | None:
    """The conversation without its oldest exchanges, about as many as are a share of its text, and at least one.

    The system prompt stays. None if there is only one exchange.
    """
    roles = [message["role"] for message in conversation.messages]
    first = next((place for place, role in enumerate(roles) if role != "system"), len(roles))
    starts = [place for place, role in enumerate(roles) if role == "user"]
    if len(starts) < 2:
        return None
    ends = list(itertools.accumulate(len(text_of(message["content"])) for message in conversation.messages))
    fitting = [start for start in starts[1:] if ends[start - 1] <= share * ends[-1]]  # too few rather than too many
    return conversation.without(first, max([starts[1], *fitting]))


def _without_greeting(conversation: Conversation) -> Conversation | None:
    """The conversation without what the assistant says before the user's first turn, which some templates refuse."""
    roles = [message["role"] for message in conversation.messages]
    start = next((place for place, role in enumerate(roles) if role != "system"), len(roles))
    end = roles.index("user") if "user" in roles else start
    return conversation.without(start, end) if start < end else None


def _without_beginning(template: ChatTemplate, conversation: Conversation, n_tokens: int) -> Conversation:
    """The conversation whose longest turn, other than the system's and the assistant's, has lost about its first tokens."""
    places = [place for place, turn in enumerate(conversation.messages) if turn["role"] not in ("system", "assistant")]
    texts = {place: text_of(conversation.messages[place]["content"]) for place in places}
    place = max(places, key=lambda place: len(texts[place]), default=None)
    ids = [] if place is None else template.tokenizer(texts[place], add_special_tokens=False)["input_ids"]
    if place is None or n_tokens >= len(ids):
        raise UnusableRow(TOO_LONG)
    # By characters: half of a character, as text, may have more tokens than the whole one.
    n_characters = math.ceil(len(texts[place]) * n_tokens / len(ids))
    return conversation.replaced(place, texts[place][n_characters:])


# ---------------------------------------------------------------------- turns in tokens


def _encoded_turns(
    template: ChatTemplate, conversations: Sequence[Conversation], notes: set[str]
) -> list[list[EncodedTurn] | UnusableRow]:
    """The trained turns of each conversation, or the reason why it cannot be used."""

    def rendered(conversation: Conversation) -> list[RenderedTurn]:
        return [_render(template, conversation.until(place + 1), notes) for place in conversation.trained]

    texts = each(rendered, conversations)
    # The turns of all conversations are tokenized together, which is faster.
    flat = [turn for turns in texts if not isinstance(turns, UnusableRow) for turn in turns]
    encoded = iter(_in_matching_mode(template, flat, _tokens(template, flat), notes))
    return each(lambda turns: _stopped(template, [next(encoded) for _ in turns]), texts)


def _render(template: ChatTemplate, conversation: Conversation, notes: set[str], **mode: bool) -> RenderedTurn:
    """The last turn of a conversation as text."""
    before = conversation.until(len(conversation.messages) - 1)
    prompt = template.render(before, is_open=True, **mode)
    text = template.render(conversation, is_open=False, **mode)
    if not text.startswith(prompt):
        text = _continued(prompt, template.render(before, is_open=False, **mode), text)
    _check_words(template, conversation.messages[-1], text[n_common(prompt, text) :], notes)
    return RenderedTurn(conversation, prompt, text)


def _tokens(template: ChatTemplate, turns: Sequence[RenderedTurn]) -> list[EncodedTurn]:
    """Tokenizes turns."""
    prompts, texts = [turn.prompt for turn in turns], [turn.text for turn in turns]
    encoded, n_after = [], template.n_after_stop
    for turn, tokens in zip(turns, tokenize_continued(template.tokenizer, prompts, texts, is_whole=True), strict=True):
        ids, start = tokens.ids, tokens.n_prompt
        special = [k for k in range(start, len(ids)) if ids[k] in template.special_ids]
        end = len(ids) if n_after is None or n_after >= len(special) else special[-1 - n_after] + 1
        encoded.append(EncodedTurn(ids, start, end, tokens.is_edge, not turn.text.startswith(turn.prompt)))
    return encoded


def _in_matching_mode(
    template: ChatTemplate, rendered: Sequence[RenderedTurn], turns: list[EncodedTurn], notes: set[str]
) -> list[EncodedTurn]:
    """The turns, each in the mode of the template whose generation prompt it follows, if there is one."""
    source = str(template.tokenizer.chat_template)
    for mode in (False, True) if MODE in source and MODE not in template.kwargs else ():
        strays = [k for k, turn in enumerate(turns) if not turn.follows_prompt]
        render = functools.partial(_render, template, notes=notes, **{MODE: mode})  # type: ignore[arg-type]
        texts = each(render, [rendered[k].conversation for k in strays])
        for k, turn in zip(strays, together(functools.partial(_tokens, template), texts), strict=True):
            if isinstance(turn, EncodedTurn) and turn.follows_prompt:
                turns[k] = turn
                notes.add(
                    f"assistant turns that do not follow the chat template's generation prompt are rendered with {MODE} "
                    f"{mode}; data.chat_template_kwargs '{{{MODE}: {str(mode).lower()}}}' does so in generation, too"
                )
    if any(turn.departs for turn in turns):
        notes.add(
            "the chat template's generation prompt opens a thought, or the like, that assistant turns of the rows do not have: "
            "their loss begins where they depart from it"
        )
    return turns


def _continued(prompt: str, before: str, whole: str) -> str:
    """A turn after its prompt, where the template renders the turns before it otherwise once it is there.

    Args:
        prompt: the turns before it, with the generation prompt.
        before: without the generation prompt.
        whole: with the turn.
    """
    n_history = n_common(prompt, before)
    if n_common(prompt, whole) >= n_history:  # they are the same; the turn is not what the generation prompt opens
        return whole
    lengths = range(1, len(prompt) + 1)  # of the prompt's end; the longest one that is in both
    n_end = bisect.bisect_left(lengths, True, key=lambda n: prompt[-n:] not in whole)
    if n_end < max(1, len(prompt) - n_history):
        raise UnusableRow("the chat template's generation prompt does not begin the assistant's turn")
    return prompt + whole[whole.rindex(prompt[-n_end:]) + n_end :]


def _check_words(template: ChatTemplate, turn: Message, rendered: str, notes: set[str]) -> None:
    """Refuses a rendering without the last word of what the assistant says, or without the functions that it calls."""
    text = text_of(turn["content"])  # of which a template may omit thoughts, and white space
    calls = [call.get("function", call).get("name", "") for call in turn.get("tool_calls") or ()]
    if not all(name in rendered for name in calls):
        raise UnusableRow("the chat template does not render function calls")
    if not all(word in rendered for word in (re.findall(r"\w+", text) or text.split())[-1:]):
        raise UnusableRow("the chat template does not render what the assistant says")
    thoughts = turn.get("reasoning_content") or text.rpartition("</think>")[0].rpartition("<think>")[2]
    if str(thoughts).strip() not in rendered:
        notes.add("the chat template does not render the thoughts of assistant turns")


def _stopped(template: ChatTemplate, turns: list[EncodedTurn]) -> list[EncodedTurn]:
    """A conversation's turns, each with its stop token: that with which the next turn begins, if the template has no other.

    If that is none either, the last turn ends with the end of text.
    """
    if template.n_after_stop is not None:
        return turns
    stopped = []
    for turn, following in itertools.zip_longest(turns, turns[1:]):
        n, stop = len(turn.ids), template.stop_tokens
        if following is not None and turn.is_in_context_of(following):
            if template.special_ids.issuperset(following.ids[n : n + 1]):
                stop = following.ids[n : n + 1]  # a tool's turn, notes, and not the user's
            elif template.is_plain:
                stop = []  # the last turn alone has the end of text
        stopped.append(replace(turn, ids=[*turn.ids, *stop], end=n + len(stop)))
    return stopped


def _grouped(turns: Sequence[EncodedTurn]) -> list[list[EncodedTurn]]:
    """A conversation's turns in groups that one row each trains: a later turn's context contains the earlier turns."""
    groups: list[list[EncodedTurn]] = []
    for turn in turns:
        group = next((group for group in groups if group[-1].is_in_context_of(turn)), None)
        if group is None:
            groups.append(group := [])
        group.append(turn)
    return groups


def _only_group(turns: Sequence[EncodedTurn]) -> list[EncodedTurn]:
    """The turns of a response, if one row can train all of them."""
    first, *others = _grouped(turns)
    if others:
        raise UnusableRow("a response of several turns, of which the chat template rewrites earlier ones")
    return first


def _row(turns: Sequence[EncodedTurn], max_length: int, n_lost: int) -> LanguageRow:
    """The row of turns whose contexts are all in the last one; a response that is too long loses its end."""
    ids = turns[-1].ids[:max_length]
    spans = [(max(turn.start, 1), min(turn.end, len(ids))) for turn in turns]  # a first token is not predicted
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        raise UnusableRow("no words of the assistant")
    return {"input_ids": ids, "spans": [place for span in spans for place in span], "lost": n_lost}
