"""Rows with options or a generated answer: their tokens and batches, their preprocessor, and their data modules' base."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from typing_extensions import override

from cola_lightning.chat_template import ChatTemplate, Conversation, user_turn
from cola_lightning.constants import IGNORE_INDEX, MAX_NEW_TOKENS
from cola_lightning.data.batch import pad_left
from cola_lightning.data.preprocessing import Size, TokenPreprocessor
from cola_lightning.data.render import TOO_LONG, TooLong, encode_prompt, room_for_prompt, tokenize
from cola_lightning.data.rows import Row, each, together
from cola_lightning.errors import UnusableRow, UserError

Loss = Literal["options", "answer"]


@dataclass(frozen=True)
class Example:
    """A prompt, the options to choose from, and which one is right; or a prompt whose answer is generated.

    Attributes:
        prompt: the text before each option.
        options: appended to the prompt, without spaces at their ends; if the answer is generated: the answer that is trained
            on, or none if it is not known.
        answer: the index of the right option; None if it is not known, as in rows to be predicted.
        accepted: indices of all options that count as right, if there are several.
        references: if the answer is generated: the answers it is compared with.

    Example:
        >>> Example("The film was dull. It was", (" terrible", " great"), answer=0).right().options
        (' terrible',)
    """

    prompt: str
    options: tuple[str, ...]
    answer: int | None
    accepted: tuple[int, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def is_generated(self) -> bool:
        """Whether the answer is generated, not chosen among options."""
        return bool(self.references) or not self.options

    def right(self) -> "Example":
        """The example with only the right option, and no references: what the language-model loss needs."""
        assert self.answer is not None, "a row that is trained on has an answer"
        return replace(self, options=(self.options[self.answer],), answer=0, accepted=(), references=())


def generated(prompt: str, answers: tuple[str, ...], delimiter: str = " ") -> Example:
    """A prompt whose answer is generated, and compared with each of the given answers, if any; the first is trained on."""
    if not answers:
        return Example(prompt, (), None)
    return Example(prompt, (f"{delimiter}{answers[0]}\n",), 0, references=answers)


@dataclass(frozen=True)
class EncodedExample:
    """An example in tokens.

    Attributes:
        example: what was encoded.
        prefixes: the tokens before an option's last token, once for all options that share them, so that options of one token
            need one forward pass.
        prefix_of: for each option, its index in ``prefixes``.
        option_ids: for each option, its tokens.
        prompt_ids: the prompt, with room left for the answer, if an answer is to be generated; else empty. Without an option,
            all other token fields are empty.
        n_lost: how many tokens were too many, and are left out.
    """

    example: Example
    prefixes: list[list[int]]
    prefix_of: list[int]
    option_ids: list[list[int]]
    prompt_ids: list[int]
    n_lost: int = 0

    def __len__(self) -> int:
        return max(map(len, self.prefixes), default=len(self.prompt_ids))


# ---------------------------------------------------------------------- tokens


def encode_examples(
    tokenizer: Any,
    examples: Sequence[Example],
    max_length: int,
    *,
    is_chat: bool = False,
    is_learned: bool = False,
    too_long: TooLong = "shorten",
) -> list[EncodedExample | UnusableRow]:
    """Tokenizes prompt and option as one text; the option's tokens are those that the prompt alone does not have.

    White space before a prompt is removed, and so are spaces at the end of a prompt and of an option (not in a chat template):
    a space between the two belongs to the option. A prompt that is too long loses its beginning; a beginning-of-sentence token
    stays. An answer that is too long loses its end; an option to choose does not. If the answer is generated, prompt and option
    have 50 tokens fewer, the maximum that is generated.

    Args:
        tokenizer: a Hugging Face tokenizer.
        examples: the examples to encode.
        max_length: of prompt and option, in tokens.
        is_chat: whether a prompt is a user's turn in the tokenizer's chat template, and its option the assistant's turn.
        is_learned: whether to encode only the right options, for the language-model loss.
        too_long: whether to shorten or to skip a longer prompt or answer.

    Returns:
        Each example in tokens, or the reason why it cannot be used: an option that is too long, that adds no token to its
        prompt, or that equals another, or differs from it only in spaces.

    Raises:
        UserError: if ``max_length`` leaves no room.

    Source: princeton-nlp/MeZO, large_models/utils.py, encode_prompt.
    """
    if max_length <= MAX_NEW_TOKENS + 1 and any(example.is_generated for example in examples):
        raise UserError(f"data.max_length must be above {MAX_NEW_TOKENS + 1} if answers are generated, got {max_length}")
    template = ChatTemplate(tokenizer) if is_chat else None

    def texts(example: Example) -> list[str]:
        """The prompt, and the prompt with each option."""
        options = [option if is_chat else option.rstrip(" ") for option in example.options]
        if len({*options}) < len(options):
            raise UnusableRow("two options are equal, or differ only in spaces")
        used = example.right() if is_learned else example
        prompt = template.prompt(Conversation(user_turn(used.prompt))) if template else used.prompt
        begin = str.lstrip if is_chat and example.is_generated else str  # an answer is then the assistant's whole turn
        written = [prompt, *(prompt + begin(option) for option in used.options)]
        return written if is_chat else [text.lstrip().rstrip(" ") for text in written]

    def tokens(several: list[list[str]]) -> Iterator[list[list[int]]]:
        ids = iter(tokenize(tokenizer, [*itertools.chain.from_iterable(several)], is_whole=is_chat))
        return (list(itertools.islice(ids, len(written))) for written in several)

    def encode(example_and_tokens: tuple[Example, Any]) -> EncodedExample:
        example, tokenized = example_and_tokens
        if isinstance(tokenized, UnusableRow):
            raise tokenized
        prompt, *wholes = tokenized
        befores, options = [ids[: len(prompt)] for ids in wholes], [ids[len(prompt) :] for ids in wholes]
        if not prompt or not all(options):
            raise UnusableRow("the prompt, or an option, adds no tokens")
        room = max_length - MAX_NEW_TOKENS if example.is_generated else max_length
        n_option = max(map(len, options), default=0)
        n_lost = max(len(prompt) + n_option - room, 0)
        if n_lost and too_long == "skip":
            raise UnusableRow(TOO_LONG)
        if n_option >= room:  # one token of the prompt must stay
            if not example.is_generated:
                raise UnusableRow(f"an option is {TOO_LONG}")
            n_option = max(1, room - max(2, room_for_prompt(room, n_option)))
            options = [ids[:n_option] for ids in options]
        if n_lost and template:  # the template's tokens around the prompt stay
            prompt = encode_prompt(template, Conversation(user_turn(example.prompt)), room - n_option)
            befores = [prompt for _ in options]
        used = example.right() if is_learned else example
        prompt_ids = truncate_left(prompt, room, tokenizer) if used.is_generated else []
        sequences = [truncate_left(before + ids, room, tokenizer) for before, ids in zip(befores, options, strict=True)]
        return _with_prefixes(EncodedExample(used, [], [], options, prompt_ids, n_lost), sequences)

    return each(encode, zip(examples, together(tokens, each(texts, examples)), strict=True))


def truncate_left(ids: list[int], max_length: int, tokenizer: Any) -> list[int]:
    """The last tokens; a beginning-of-sentence token stays in front of them."""
    if len(ids) <= max_length:
        return ids
    n_head = int(ids[0] == tokenizer.bos_token_id)
    return ids[:n_head] + ids[len(ids) - max_length + n_head :]


def _with_prefixes(encoded: EncodedExample, sequences: list[list[int]]) -> EncodedExample:
    """The encoded example with its prefixes: of each option, what its sequence has before the last token."""
    if not sequences:
        return encoded
    befores = [ids[:-1] for ids in sequences]
    prefixes = [ids for k, ids in enumerate(befores) if ids not in befores[:k]]
    prefix_of = [prefixes.index(ids) for ids in befores]
    return replace(encoded, prefixes=prefixes, prefix_of=prefix_of)


# ---------------------------------------------------------------------- batches


def collate_options(
    rows: Sequence[EncodedExample], pad: int, loss: str = "options", metric: str | None = None
) -> dict[str, Any]:
    """An option batch, padded on the left to its longest prefix: see :class:`~cola_lightning.COLACausalLM` for its parts."""
    batch: dict[str, Any] = {"loss": loss} | ({"metric": metric} if metric else {})
    batch |= {"prompt": [row.example.prompt for row in rows], "options": [list(row.example.options) for row in rows]}
    if rows[0].example.is_generated:
        batch["references"] = [list(row.example.references) for row in rows]
        batch["prompt_ids"] = pad_left([row.prompt_ids for row in rows], pad)
        batch["prompt_mask"] = pad_left([[1] * len(row.prompt_ids) for row in rows], 0)
    if not all(row.prefixes for row in rows):  # the answers are unknown and will be generated
        return batch
    prefixes = [prefix for row in rows for prefix in row.prefixes]
    n_options = max(len(row.option_ids) for row in rows)
    option_ids, option_rows, first = list[list[int]](), torch.zeros(len(rows), n_options, dtype=torch.long), 0
    for i, row in enumerate(rows):
        n = len(row.option_ids)
        option_ids += [*row.option_ids, *[[]] * (n_options - n)]
        option_rows[i, :n] = torch.tensor(row.prefix_of) + first
        first += len(row.prefixes)
    if any(row.example.accepted for row in rows):
        right = [row.example.accepted or [row.example.answer] for row in rows]
        batch["accepted"] = torch.tensor([[k in places for k in range(n_options)] for places in right])
    return batch | {
        "input_ids": pad_left(prefixes, pad),
        "attention_mask": pad_left([[1] * len(prefix) for prefix in prefixes], 0),
        "option_ids": pad_left(option_ids, IGNORE_INDEX).view(len(rows), n_options, -1),
        "option_rows": option_rows,
        "answer": torch.tensor([IGNORE_INDEX if row.example.answer is None else row.example.answer for row in rows]),
    }


@dataclass(frozen=True)
class OptionRows(TokenPreprocessor):
    """Rows with options to choose from, or with an answer to be generated.

    Attributes:
        example: makes the example of a row.
        loss: over all ``options``, or the language-model loss on the right ``answer`` only.
        metric: the metric; None: accuracy of options, F1 and exact match of generated answers.
        is_chat: whether prompts are a user's turn in the tokenizer's chat template.
        is_trained: whether these are training rows, of which the language-model loss needs the right option alone.
        too_long: whether to shorten or to skip a longer prompt or answer.
        templates: the prompt, and the options (or the name of the field that lists them), with a row's fields in braces; None
            for what is not made from a template.
        seen: the different options of the rows so far; None: of those whose answer is generated.
    """

    example: Callable[[Row], Example]
    loss: Loss = "options"
    metric: str | None = None
    is_chat: bool = False
    is_trained: bool = False
    too_long: TooLong = "shorten"
    templates: tuple[str | None, list[str] | str | None] = (None, None)
    seen: set[tuple[str, ...] | None] = field(default_factory=set)

    @override
    def read(self, row: Row) -> Example:
        return self.example(row)

    @override
    def encode(self, items: Sequence[Example], notes: set[str]) -> list[list[EncodedExample] | UnusableRow]:
        self.seen.update(None if example.is_generated else example.options for example in items)
        options: Any = {"is_chat": self.is_chat, "is_learned": self.is_trained and self.loss == "answer"}
        encoded = encode_examples(self.tokenizer, items, self.max_length, too_long=self.too_long, **options)
        return each(lambda example: [example], encoded)

    @override
    def size(self, example: EncodedExample) -> Size:
        return Size(sum(len(prefix) + 1 for prefix in example.prefixes), example.n_lost)

    @override
    def collate(self, examples: list[EncodedExample]) -> dict[str, Any]:
        return collate_options(examples, self.tokenizer.pad_token_id, self.loss, self.metric)

    @property
    def prompt_format(self) -> dict[str, Any]:  # type: ignore[override]
        """See :attr:`~cola_lightning.EpochDataModule.prompt_format`; empty before rows are encoded."""
        prompt, options = self.templates
        if None in self.seen:
            return {"kind": "answer", "chat_template": self.is_chat, "prompt": prompt}
        if options is None and len(self.seen) == 1:
            options = [option.replace("{", "{{").replace("}", "}}") for some in self.seen for option in some or ()]
        known = {"kind": "options", "chat_template": self.is_chat, "prompt": prompt, "options": options}
        return known if self.seen else {}
