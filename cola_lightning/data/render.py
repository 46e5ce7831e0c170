"""Conversations and texts as tokens: each assistant turn once, after the prompt that a server would generate it from."""

import bisect
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cola_lightning.chat_template import (
    MODE,
    ChatTemplate,
    Conversation,
    Message,
    PreferencePair,
    end_of_text,
    n_appended,
    text_of,
)
from cola_lightning.data.rows import each, together
from cola_lightning.errors import UnusableRow

# input_ids; spans: where each stretch of tokens with a loss begins and ends, one number after the other; and lost: how many
# tokens a longer row had.
LanguageRow = dict[str, Any]
TooLong = Literal["shorten", "skip"]
TOO_LONG = "longer than data.max_length"
FILLED = "data.max_length is filled without the question, by the system prompt, the response and the chat template"


def _length(row: LanguageRow) -> int:
    return len(row["input_ids"])


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[LanguageRow] | UnusableRow]:
    """Texts as tokens with a loss on all of them; a text over ``max_length`` becomes several rows."""
    rows, end = list[list[LanguageRow] | UnusableRow](), end_of_text(tokenizer)
    for ids in tokenize(tokenizer, texts):
        ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
        pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        # A first token is not predicted.
        encoded: list[LanguageRow] = [{"input_ids": piece, "spans": [1, len(piece)]} for piece in pieces if len(piece) > 1]
        rows.append(encoded or UnusableRow("no text" if max_length > 1 else "data.max_length leaves no token to predict"))
    return rows


@dataclass(frozen=True)
class TurnEncoder:
    """Makes conversations and preference pairs into tokens, with the loss on what the assistant must generate.

    Each turn is trained once, in its own context: the rendering of the turns before it, with the generation prompt. A template
    that only appends gives one row for the conversation; one that rewrites earlier turns (drops their thoughts, moves the
    system prompt) gives as many rows as there are contexts.

    Attributes:
        template: the tokenizer's chat template.
        max_length: in tokens.
        notes: lines for the log are added to it.
        too_long: whether to shorten or to skip what is longer. A conversation, or the prompt of a pair, loses its oldest
            exchanges whole, but not its system prompt; then what is asked last loses its beginning.
        shortens_response: whether a response that leaves its prompt less than a quarter of ``max_length`` loses its end;
            ``False``: such a conversation is skipped. With it, a conversation has one trained turn, or is one of a pair.
    """

    template: ChatTemplate
    max_length: int
    notes: set[str]
    too_long: TooLong = "shorten"
    shortens_response: bool = False

    def conversations(self, conversations: Sequence[Conversation]) -> list[list[LanguageRow] | UnusableRow]:
        """The rows of each conversation, or the reason why it cannot be used; each ends with a trained turn."""

        def encode(conversation: Conversation, encoded: list[LanguageRow] | UnusableRow) -> list[LanguageRow]:
            ((turns, n_lost),) = self._fitting(conversation, lambda shorter: [shorter], [encoded])
            first, *others = _grouped(turns)
            return [self._row(first, n_lost), *(self._row(group, 0) for group in others)]

        return each(lambda pair: encode(*pair), zip(conversations, self._turns(conversations), strict=True))

    def preferences(self, pairs: Sequence[PreferencePair]) -> list[tuple[LanguageRow, LanguageRow] | UnusableRow]:
        """The chosen and the rejected response of each pair, after the same prompt, or the reason why it cannot be used."""

        def encode(pair: PreferencePair, encoded: Sequence[list[LanguageRow] | UnusableRow]) -> tuple[LanguageRow, LanguageRow]:
            sides = self._fitting(pair.prompt, lambda shorter: replace(pair, prompt=shorter).conversations(), encoded)
            chosen, rejected = (self._row(_only_group(turns), n_lost) for turns, n_lost in sides)
            return chosen, rejected

        flat = self._turns([conversation for pair in pairs for conversation in pair.conversations()])
        return each(lambda item: encode(item[0], item[1:]), zip(pairs, flat[::2], flat[1::2], strict=True))

    # ------------------------------------------------------------------ shorter conversations

    def _fitting(
        self,
        prompt: Conversation,
        wholes: Callable[[Conversation], Sequence[Conversation]],
        encoded: Sequence[list[LanguageRow] | UnusableRow],
    ) -> list[tuple[list[LanguageRow], int]]:
        """The turns of conversations with one prompt, and how many tokens each lost: the prompt is shortened until all fit.

        Args:
            prompt: what is shortened: a whole conversation, or what two responses have in common.
            wholes: the conversations with a prompt.
            encoded: the turns of those with this prompt.
        """
        lengths: list[int] = []  # before the prompt is shortened
        while True:
            if reasons := [turns for turns in encoded if isinstance(turns, UnusableRow)]:
                if (shorter := _without_greeting(prompt)) is None:
                    raise reasons[0]
            else:
                usable = [turns for turns in encoded if not isinstance(turns, UnusableRow)]
                now = [max(map(_length, turns)) for turns in usable]
                lengths = lengths or now
                if max(lengths) > self.max_length and self.too_long == "skip":
                    raise UnusableRow(TOO_LONG)
                longest = usable[now.index(max(now))]
                shorter = self._shortened(prompt, longest[0]["spans"][0], max(now))
                if shorter is None:
                    return [(some, n - min(m, self.max_length)) for some, n, m in zip(usable, lengths, now, strict=True)]
            prompt = shorter
            encoded = self._turns(wholes(prompt))

    def _shortened(self, conversation: Conversation, start: int, n_tokens: int) -> Conversation | None:
        """A shorter conversation, if this one is too long; None if it fits, or if only its response needs to lose its end.

        Args:
            conversation: the conversation.
            start: where its response begins, in tokens.
            n_tokens: of its longest turn, with its context.
        """
        if (n_over := n_tokens - self.max_length) <= 0:
            return None
        if (shorter := _without_oldest(conversation, n_over / n_tokens)) is not None:
            return shorter
        if not self.shortens_response:
            return _without_beginning(self.template, conversation, n_over)
        n_over = start - room_for_prompt(self.max_length, n_tokens - start)
        try:
            return _without_beginning(self.template, conversation, n_over) if n_over > 0 else None
        except UnusableRow:
            if start > self.max_length - room_for_prompt(self.max_length, self.max_length):
                raise
            return None  # what is around a short question leaves room for a response

    def _row(self, turns: Sequence[LanguageRow], n_lost: int) -> LanguageRow:
        """The row of turns whose contexts are all in the last one; a response that is too long loses its end."""
        ids = turns[-1]["input_ids"][: self.max_length]
        spans = [(max(start, 1), min(end, len(ids))) for start, end in (turn["spans"] for turn in turns)]
        spans = [(start, end) for start, end in spans if start < end]  # a first token is not predicted
        if not spans:
            is_cut = len(ids) < _length(turns[-1])
            raise UnusableRow("data.max_length leaves no room for the response" if is_cut else "no words of the assistant")
        return {"input_ids": ids, "spans": [place for span in spans for place in span], "lost": n_lost}

    # ------------------------------------------------------------------ turns in tokens

    def _turns(self, conversations: Sequence[Conversation]) -> list[list[LanguageRow] | UnusableRow]:
        """The trained turns of each conversation, one row each, or the reason why it cannot be used."""

        def rendered(conversation: Conversation) -> list[tuple[Conversation, tuple[str, str]]]:
            contexts = [conversation.until(place + 1) for place in conversation.trained]
            return [(context, self._render(context)) for context in contexts]

        all_turns = each(rendered, conversations)
        # The turns of all conversations are tokenized together, which is faster.
        flat = [turn for turns in all_turns if not isinstance(turns, UnusableRow) for turn in turns]
        encoded = iter(self._in_matching_mode([one for one, _ in flat], [texts for _, texts in flat]))
        return each(lambda turns: _stopped(self.template, [next(encoded) for _ in turns]), all_turns)

    def _render(self, conversation: Conversation, **mode: bool) -> tuple[str, str]:
        """The turns before the last one with the generation prompt, and the same text with the last turn."""
        before = conversation.until(len(conversation.messages) - 1)
        prompt = self.template.render(before, is_open=True, **mode)
        text = self.template.render(conversation, is_open=False, **mode)
        if not text.startswith(prompt):
            text = _continued(prompt, self.template.render(before, is_open=False, **mode), text)
        self._check_words(conversation.messages[-1], text[n_common(prompt, text) :])
        return prompt, text

    def _in_matching_mode(self, contexts: Sequence[Conversation], texts: list[tuple[str, str]]) -> list[LanguageRow]:
        """Turns as rows, each in the mode of the template whose generation prompt it follows, if there is one."""
        turns = _tokens(self.template, texts)
        for mode in self.template.modes:
            strays = [k for k, (_, is_edge) in enumerate(turns) if not is_edge]
            others = each(lambda k: self._render(contexts[k], **{MODE: mode}), strays)  # noqa: B023  # called here
            encoded = together(functools.partial(_tokens, self.template), others)
            for k, other, turn in zip(strays, others, encoded, strict=True):
                if not isinstance(other, UnusableRow) and not isinstance(turn, UnusableRow) and turn[1]:
                    texts[k], turns[k] = other, turn
                    self.notes.add(
                        f"assistant turns that do not follow the chat template's generation prompt are rendered with {MODE} "
                        f"{mode}; data.chat_template_kwargs '{{{MODE}: {str(mode).lower()}}}' does so in generation, too"
                    )
        if any(not whole.startswith(prompt) for prompt, whole in texts):
            self.notes.add(
                "the chat template's generation prompt opens a thought, or the like, that assistant turns of the rows do not "
                "have: their loss begins where they depart from it"
            )
        return [row for row, _ in turns]

    def _check_words(self, turn: Message, rendered: str) -> None:
        """Refuses a rendering without the last word of what the assistant says, or without the functions that it calls."""
        text = text_of(turn["content"])  # of which a template may omit thoughts, and white space
        calls = [call.get("function", call).get("name", "") for call in turn.get("tool_calls") or ()]
        if not all(name in rendered for name in calls):
            raise UnusableRow("the chat template does not render function calls")
        if not all(word in rendered for word in (re.findall(r"\w+", text) or text.split())[-1:]):
            raise UnusableRow("the chat template does not render what the assistant says")
        thoughts = turn.get("reasoning_content") or text.rpartition("</think>")[0].rpartition("<think>")[2]
        if str(thoughts).strip() not in rendered:
            self.notes.add("the chat template does not render the thoughts of assistant turns")


def encode_prompt(template: ChatTemplate, conversation: Conversation, max_length: int) -> list[int]:
    """The prompt for the assistant's next turn as tokens, of a conversation that is shortened as in training."""
    while True:
        text = template.prompt(conversation)
        (ids,) = tokenize(template.tokenizer, [text], is_whole=template.writes_special_tokens)
        if len(ids) <= max_length:
            return ids
        n_over = len(ids) - max_length
        conversation = _without_oldest(conversation, 0) or _without_beginning(template, conversation, n_over)


# ---------------------------------------------------------------------- shorter conversations


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
        if template.writes_special_tokens or conversation.messages[0]["role"] != "system":
            raise UnusableRow(FILLED)
        return conversation.without(0, 1)  # of plain text, of which the system prompt is only the beginning
    # By characters: half of a character, as text, may have more tokens than the whole one.
    n_characters = math.ceil(len(texts[place]) * n_tokens / len(ids))
    return conversation.replaced(place, texts[place][n_characters:])


# ---------------------------------------------------------------------- turns in tokens


def _tokens(template: ChatTemplate, texts: Sequence[tuple[str, str]]) -> list[tuple[LanguageRow, bool]]:
    """Turns with their prompts as rows, and whether the loss begins at a prompt's end, between two tokens."""
    encoded, n_after = list[tuple[LanguageRow, bool]](), template.n_after_stop
    prompts, wholes = [prompt for prompt, _ in texts], [whole for _, whole in texts]
    continued = tokenize_continued(template.tokenizer, prompts, wholes, is_whole=template.writes_special_tokens)
    for ids, start, is_edge in continued:
        special = [] if n_after is None else [k for k in range(start, len(ids)) if ids[k] in template.special_ids]
        end = len(ids) if n_after is None or n_after >= len(special) else special[-1 - n_after] + 1
        encoded.append(({"input_ids": ids, "spans": [start, end]}, is_edge))
    return encoded


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


def _stopped(template: ChatTemplate, turns: list[LanguageRow]) -> list[LanguageRow]:
    """A conversation's turns, each with its stop token: that with which the next turn begins, if the template has no other.

    If that is none either, the last turn ends with the end of text.
    """
    if template.n_after_stop is not None:
        return turns
    stopped = []
    for turn, following in itertools.zip_longest(turns, turns[1:]):
        ids, stop = turn["input_ids"], template.stop_tokens
        if following is not None and _is_in_context_of(turn, following):
            if template.special_ids.issuperset(following["input_ids"][len(ids) : len(ids) + 1]):
                stop = following["input_ids"][len(ids) : len(ids) + 1]  # a tool's turn, notes, and not the user's
            elif template.is_plain:
                stop = []  # the last turn alone has the end of text
        elif not template.writes_special_tokens and ids[-1:] == stop:
            stop = []  # the response has it
        stopped.append({"input_ids": [*ids, *stop], "spans": [turn["spans"][0], len(ids) + len(stop)]})
    return stopped


def _is_in_context_of(turn: LanguageRow, later: LanguageRow) -> bool:
    """Whether a later turn's context contains a turn, token by token, so that one row can train both."""
    _, end = turn["spans"]
    return bool(end <= later["spans"][0] and turn["input_ids"][:end] == later["input_ids"][:end])


def _grouped(turns: Sequence[LanguageRow]) -> list[list[LanguageRow]]:
    """A conversation's turns in groups that one row each trains: a later turn's context contains the earlier turns."""
    groups: list[list[LanguageRow]] = []
    for turn in turns:
        group = next((group for group in groups if _is_in_context_of(group[-1], turn)), None)
        if group is None:
            groups.append(group := [])
        group.append(turn)
    return groups


def _only_group(turns: Sequence[LanguageRow]) -> list[LanguageRow]:
    """The turns of a response, if one row can train all of them."""
    first, *others = _grouped(turns)
    if others:
        raise UnusableRow("a response of several turns, of which the chat template rewrites earlier ones")
    return first


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


def tokenize_continued(
    tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], *, is_whole: bool = False
) -> list[tuple[list[int], int, bool]]:
    """Tokenizes texts that continue prompts; a prompt separately only if its boundary is ambiguous.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: the beginning of each text.
        texts: the texts.
        is_whole: whether the texts already contain all special tokens, as from a chat template.

    Returns:
        Of each text its tokens, how many of these are also the first tokens of the prompt alone, and whether they are all of
        the prompt's, so that its end is an edge between two tokens of the text.
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
        continued.append((ids, n_prompt, n_prompt == len(before)))
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


def n_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common prefix of two sequences."""
    if first == second[: len(first)]:
        return len(first)
    return next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
