"""Prompts with their options, and their tokens."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from cola_lightning.conventions import MAX_NEW_TOKENS
from cola_lightning.data.encoding import n_common, truncate_left
from cola_lightning.data.rows import SkippedRows
from cola_lightning.data.tokens import tokenize
from cola_lightning.errors import UnusableRow, UserError
from cola_lightning.turns import ChatTemplate, Conversation, user_turn


@dataclass(frozen=True)
class Example:
    """A prompt, the options to choose from, and which one is right; or a prompt whose answer is generated.

    Attributes:
        prompt: the text before each option.
        options: appended to the prompt, without spaces at their ends; if the answer is generated: the answer that is trained
            on, or none if it is not known.
        answer: the index of the right option; None if it is not known, as in rows to be predicted.
        place: where the row is from, for messages.
        accepted: indices of all options that count as right, if there are several.
        references: if the answer is generated: the answers it is compared with.

    Raises:
        UnusableRow: if there is no option, or if two are equal.
        UserError: if the answer is not the index of an option.

    Example:
        >>> Example("The film was dull. It was", (" terrible", " great"), answer=0).right().options
        (' terrible',)
    """

    prompt: str
    options: tuple[str, ...]
    answer: int | None
    place: str = "an example"
    accepted: tuple[int, ...] = ()
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.answer is None and not self.options:  # to be generated
            return
        if not self.options:
            raise UnusableRow(f"{self.place}: expected options to choose from, received none")
        if len(set(self.options)) < len(self.options):
            twice = next(option for option in self.options if self.options.count(option) > 1)
            raise UnusableRow(f"{self.place}: expected options that differ, received {twice!r} twice")
        if self.answer is not None and not 0 <= self.answer < len(self.options):
            raise UserError(
                f"{self.place}: expected the index of one of {len(self.options)} options as the answer, received {self.answer}"
            )

    @property
    def is_generated(self) -> bool:
        """Whether the answer is generated, not chosen among options."""
        return bool(self.references) or not self.options

    def right(self) -> "Example":
        """The example with only the right option, and no references: what the language-model loss needs."""
        assert self.answer is not None, "a row that is trained on has an answer"
        return replace(self, options=(self.options[self.answer],), answer=0, accepted=(), references=())


@dataclass(frozen=True)
class EncodedExample:
    """An example in tokens.

    Attributes:
        example: what was encoded.
        prefixes: the tokens before an option's last token, once for all options that share them, so that options of one token
            need one forward pass.
        prefix_of: for each option, its index in ``prefixes``.
        option_ids: for each option, its tokens.
        prompt_ids: the prompt, with room left for the answer, if the answer is generated; else empty. Without an option, all
            other token fields are empty.
        n_shared: length of the common prefix of all prefixes, without positions at which an option's tokens are predicted.
    """

    example: Example
    prefixes: list[list[int]]
    prefix_of: list[int]
    option_ids: list[list[int]]
    prompt_ids: list[int]
    n_shared: int

    def __len__(self) -> int:
        return max(map(len, self.prefixes), default=len(self.prompt_ids))


def encode_examples(
    tokenizer: Any,
    examples: Sequence[Example],
    max_length: int,
    *,
    is_chat: bool = False,
    is_learned: bool = False,
    skipped: SkippedRows | None = None,
) -> list[EncodedExample]:
    """Tokenizes prompt and option as one text; the option's tokens are those that the prompt alone does not have.

    White space before a prompt is removed, and so are spaces at the end of a prompt and of an option (not in a chat template):
    a space between the two belongs to the option. A text that is too long is truncated on the left; a beginning-of-sentence
    token stays. No option is truncated. If the answer is generated, prompt and option have 50 tokens fewer, the maximum that is
    generated.

    Args:
        tokenizer: a Hugging Face tokenizer.
        examples: the examples to encode.
        max_length: of prompt and option, in tokens.
        is_chat: whether a prompt is a user's turn in the tokenizer's chat template, and its option the assistant's turn.
        is_learned: whether to encode only the right options, for the language-model loss.
        skipped: records the examples that cannot be encoded; None: the first one is an error.

    Raises:
        UnusableRow: if an option alone is too long, or adds no token to its prompt, or differs from another only in spaces.
        UserError: if ``max_length`` leaves no room.

    Source: princeton-nlp/MeZO, large_models/utils.py, encode_prompt.
    """
    if max_length <= MAX_NEW_TOKENS + 1 and any(example.is_generated for example in examples):
        raise UserError(
            f"data.max_length: expected more than {MAX_NEW_TOKENS + 1}, for a generated answer takes up to "
            f"{MAX_NEW_TOKENS} tokens, received {max_length}"
        )
    rooms = [max_length - MAX_NEW_TOKENS if example.is_generated else max_length for example in examples]
    if is_learned:
        examples = [example.right() for example in examples]
    befores = [example.prompt for example in examples]
    if is_chat:
        template = ChatTemplate(tokenizer)
        befores = [template.prompt(Conversation(user_turn(example.prompt)), example.place) for example in examples]
    afters = [before + option for before, example in zip(befores, examples, strict=True) for option in example.options]
    if not is_chat:
        befores, afters = ([text.lstrip().rstrip(" ") for text in some] for some in (befores, afters))
    prompts, texts = (tokenize(tokenizer, some, is_whole=is_chat) for some in (befores, afters))
    encoded = []
    position = 0
    for example, prompt, room in zip(examples, prompts, rooms, strict=True):
        own = slice(position, position + len(example.options))
        position = own.stop
        with skipped.if_unusable() if skipped else nullcontext():
            if len(set(afters[own])) < len(example.options):
                raise UnusableRow(
                    f"{example.place}: expected options that differ in more than spaces, received {example.options}"
                )
            if not prompt:
                raise UnusableRow(f"{example.place}: expected a prompt of at least one token, received {example.prompt!r}")
            for ids in texts[own]:
                _check_option(example, len(ids) - len(prompt), room, max_length)
            encoded.append(_encode(example, prompt, texts[own], room, tokenizer.bos_token_id))
    return encoded


def _encode(example: Example, prompt: list[int], texts: list[list[int]], room: int, bos: int | None) -> EncodedExample:
    """Encodes an example, given the tokens of its prompt, and of the prompt with each option."""
    prefixes: list[list[int]] = []
    prefix_of, option_ids = [], []
    for text in texts:
        cut = truncate_left(text, room, bos)
        if cut[:-1] not in prefixes:
            prefixes.append(cut[:-1])
        prefix_of.append(prefixes.index(cut[:-1]))
        option_ids.append(cut[len(prompt) - len(text) :])
    prompt_ids = truncate_left(prompt, room, bos) if example.is_generated else []
    if not texts:
        return EncodedExample(example, [], [], [], prompt_ids, 0)
    n_free = min(len(prefixes[k]) - len(ids) for k, ids in zip(prefix_of, option_ids, strict=True))
    n_shared = min(n_free, *(n_common(prefixes[0], prefix) for prefix in prefixes))
    return EncodedExample(example, prefixes, prefix_of, option_ids, prompt_ids, max(n_shared, 0))


def _check_option(example: Example, n_option: int, room: int, max_length: int) -> None:
    if n_option < 1:
        raise UnusableRow(f"{example.place}: expected options that add tokens to the prompt, received {example.options}")
    if n_option >= room:  # one token of the prompt must stay
        of = "data.max_length" if room == max_length else f"data.max_length less {MAX_NEW_TOKENS}, for an answer is generated"
        raise UnusableRow(f"{example.place}: expected options of fewer than {room} tokens ({of}), received one of {n_option}")
