"""Conversations to train on, as tokens: each assistant turn once, after the prompt that a server would generate it from."""

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cola_lightning.chat_template import ChatTemplate, Conversation, Message, text_of
from cola_lightning.data.encoding import PROMPT_SHARE, TOO_LONG, LanguageRow, TooLong, n_common, tokenize_continued
from cola_lightning.data.rows import each, together
from cola_lightning.errors import UnusableRow

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

    def is_in_modules(self, other: "Turn") -> bool:
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

    def encode(conversation: Conversation, rows: list[list[Turn]] | UnusableRow) -> list[LanguageRow]:
        n_tokens = 0  # of the longest row, before it is shortened
        while True:
            if isinstance(rows, UnusableRow):
                if (shorter := _without_greeting(conversation)) is None:
                    raise rows
            else:
                longest = max((row[-1] for row in rows), key=lambda turn: len(turn.ids))
                n_tokens = n_tokens or len(longest.ids)
                if n_tokens > max_length and too_long == "skip":
                    raise UnusableRow(TOO_LONG)
                shorter = _shortened(template, conversation, longest, max_length, shortens_response=shortens_response)
                if shorter is None:
                    n_lost = n_tokens - min(len(longest.ids), max_length)
                    return [_row(row, max_length, n_lost * (row is rows[0])) for row in rows]
            conversation = shorter
            (rows,) = _rows(template, [conversation], notes)

    found = _rows(template, conversations, notes)
    return each(lambda one: encode(*one), zip(conversations, found, strict=True))


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
    template: ChatTemplate, conversation: Conversation, longest: Turn, max_length: int, *, shortens_response: bool
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
    least = max_length // PROMPT_SHARE
    n_over = longest.start - max(max_length - (len(longest.ids) - longest.start), least)
    try:
        return _without_beginning(template, conversation, n_over) if n_over > 0 else None
    except UnusableRow:
        if longest.start > max_length - least:
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


def _rows(
    template: ChatTemplate, conversations: Sequence[Conversation], notes: set[str]
) -> list[list[list[Turn]] | UnusableRow]:
    """The turns of each conversation, in groups that one row each trains; or the reason why it cannot be used."""
    contexts = [[one.until(place + 1) for place in one.trained] for one in conversations]
    texts = each(lambda some: [_render(template, one, notes) for one in some], contexts)

    def turns_of(usable: list[list[tuple[str, str]]]) -> list[list[Turn]]:
        flat = [one for some, found in zip(contexts, texts, strict=True) if not isinstance(found, UnusableRow) for one in some]
        turns = iter(_in_a_mode(template, flat, _tokens(template, list(itertools.chain(*usable))), notes))
        return [list(itertools.islice(turns, len(some))) for some in usable]

    found = together(turns_of, texts)
    return each(lambda turns: _in_rows(_stopped(template, turns)), found)


def _render(template: ChatTemplate, conversation: Conversation, notes: set[str], **mode: bool) -> tuple[str, str]:
    """The prompt for the last turn of a conversation, and the conversation with it."""
    before = conversation.until(len(conversation.messages) - 1)
    prompt = template.render(before, is_open=True, **mode)
    whole = template.render(conversation, is_open=False, **mode)
    if not whole.startswith(prompt):
        whole = _continued(prompt, template.render(before, is_open=False, **mode), whole)
    _check_words(template, conversation.messages[-1], whole[n_common(prompt, whole) :], notes)
    return prompt, whole


def _tokens(template: ChatTemplate, texts: Sequence[tuple[str, str]]) -> list[Turn]:
    """Tokenizes turns, whose prompts and whole texts are given."""
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


def _in_a_mode(template: ChatTemplate, contexts: Sequence[Conversation], turns: list[Turn], notes: set[str]) -> list[Turn]:
    """The last turn of each conversation, rendered in the mode whose generation prompt it follows, if there is one."""
    source = str(template.tokenizer.chat_template)
    for mode in (False, True) if MODE in source and MODE not in template.kwargs else ():
        strays = [k for k, turn in enumerate(turns) if not turn.follows_prompt]
        texts = each(lambda k, mode=mode: _render(template, contexts[k], notes, **{MODE: mode}), strays)  # type: ignore[misc]
        for k, turn in zip(strays, together(lambda some: _tokens(template, some), texts), strict=True):
            if isinstance(turn, Turn) and turn.follows_prompt:
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


def _stopped(template: ChatTemplate, turns: list[Turn]) -> list[Turn]:
    """A conversation's turns, each with its stop token: that with which the next turn begins, if the template has no other.

    If that is none either, the last turn ends with the end of text.
    """
    if template.n_after_stop is not None:
        return turns
    stopped = []
    for turn, following in itertools.zip_longest(turns, turns[1:]):
        n, stop = len(turn.ids), template.stop_tokens
        if following is not None and turn.is_in_modules(following):
            if template.special_ids.issuperset(following.ids[n : n + 1]):
                stop = following.ids[n : n + 1]  # a tool's turn, notes, and not the user's
            elif template.is_plain:
                stop = []  # the last turn alone has the end of text
        stopped.append(replace(turn, ids=[*turn.ids, *stop], end=n + len(stop)))
    return stopped


def _in_rows(turns: Sequence[Turn]) -> list[list[Turn]]:
    """A conversation's turns in groups: a turn whose context contains an earlier turn is in the same group."""
    rows: list[list[Turn]] = []
    for turn in turns:
        row = next((row for row in rows if row[-1].is_in_modules(turn)), None)
        if row is None:
            rows.append(row := [])
        row.append(turn)
    return rows


def _row(turns: Sequence[Turn], max_length: int, n_lost: int) -> LanguageRow:
    """The row of turns whose contexts are all in the last one; a response that is too long loses its end."""
    ids = turns[-1].ids[:max_length]
    spans = [(max(turn.start, 1), min(turn.end, len(ids))) for turn in turns]  # a first token is given
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        raise UnusableRow("no words of the assistant")
    return {"input_ids": ids, "spans": [place for span in spans for place in span], "lost": n_lost}
