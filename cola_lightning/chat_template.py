"""Conversations in a tokenizer's chat template; the tokens with which a turn or a text ends."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from cola_lightning import hub
from cola_lightning.errors import UnusableRow, UserError, one_line

Message = dict[str, Any]  # role, content and whatever else the template renders: reasoning_content, tool_calls

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ (message['content'] or '') ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
NAMED_TOKEN = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|</?\w+>")  # as templates write special tokens

QUESTION, ANSWER = "Is it old?", "It is."  # a conversation that shows how a template ends a turn
MODE = "enable_thinking"  # the template variable by which a generation prompt opens a thought or does not
MARKS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}  # before each turn of a conversation that is one text


@dataclass(frozen=True)
class Conversation:
    """Messages of a conversation.

    Attributes:
        messages: the turns.
        tools: JSON schemas of the functions that the assistant may call.
        trained: the places of the messages that have a loss, in order; each is a turn of the assistant's.
        is_marked: whether the data has the turns as one text with :data:`MARKS`, which a model without a template keeps.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    trained: tuple[int, ...] = ()
    is_marked: bool = False

    def until(self, place: int) -> "Conversation":
        """The messages before one of them."""
        return replace(self, messages=self.messages[:place])

    def without(self, start: int, end: int) -> "Conversation":
        """The conversation without the messages from ``start`` to before ``end``."""
        trained = (place - (end - start) * (place >= end) for place in self.trained if not start <= place < end)
        return replace(self, messages=[*self.messages[:start], *self.messages[end:]], trained=tuple(trained))

    def replaced(self, place: int, content: str) -> "Conversation":
        """The conversation with another content of one message."""
        messages = list(self.messages)
        messages[place] = messages[place] | {"content": content}
        return replace(self, messages=messages)


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt.

    Attributes:
        prompt: the turns that both have in common.
        chosen: the turns of the preferred response, of which the first is the assistant's.
        rejected: those of the other response.
    """

    prompt: Conversation
    chosen: Sequence[Message]
    rejected: Sequence[Message]

    def conversations(self) -> list[Conversation]:
        """The prompt with each response, whose assistant turns have a loss."""
        n = len(self.prompt.messages)
        wholes = [[*self.prompt.messages, *response] for response in (self.chosen, self.rejected)]
        trained = [tuple(k for k, turn in enumerate(whole) if k >= n and turn["role"] == "assistant") for whole in wholes]
        return [replace(self.prompt, messages=whole, trained=k) for whole, k in zip(wholes, trained, strict=True)]


def user_turn(prompt: str) -> list[Message]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": prompt}]


def assistant_turn(response: str) -> Message:
    """The assistant's turn."""
    return {"role": "assistant", "content": response}


def text_of(content: Any) -> str:
    """A message's content as text: a text, a list of text parts, or None for tool calls alone.

    Example:
        >>> text_of([{"type": "text", "text": "It "}, {"type": "text", "text": "is."}]), text_of(None)
        ('It is.', '')
    """
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def find_chat_template(name: str, tokenizer: Any) -> str:
    """The text of a chat template.

    Args:
        name: ``chatml``, the path of a ``.jinja`` file, or the model, by its hub id or folder, whose template it is.
        tokenizer: the tokenizer for which it is: if it begins a text with a token, so does ``chatml``.

    Raises:
        UserError: if there is no such file or model, or the model has no chat template.
    """
    if name == "chatml":
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return "{{- bos_token }}" * begins + CHATML
    try:
        if name.endswith(".jinja"):
            return Path(name).expanduser().read_text(encoding="utf-8")
        from transformers import AutoTokenizer

        with hub.needed_for(f"data.chat_template: {name!r}"):
            found = AutoTokenizer.from_pretrained(str(Path(name).expanduser())).chat_template
    except (OSError, ValueError) as error:
        raise UserError(f"data.chat_template: {name!r} cannot be read: {one_line(str(error))}") from error
    if isinstance(found, Mapping):  # several, by name
        found = found.get("default")
    if not found:
        raise UserError(f"data.chat_template: the tokenizer of {name!r} has no chat template")
    return str(found)


def unknown_tokens(tokenizer: Any, template: str) -> list[str]:
    """The special tokens that a chat template names and a tokenizer's vocabulary lacks."""
    vocabulary = tokenizer.get_vocab()
    return [token for token in dict.fromkeys(NAMED_TOKEN.findall(template)) if token not in vocabulary]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        kwargs: variables of the template, such as ``enable_thinking``.
        text: the template; None: the tokenizer's.

    Attributes:
        writes_special_tokens: whether what it renders has all special tokens, so that the tokenizer adds none.
    """

    tokenizer: Any = field(repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None

    writes_special_tokens: ClassVar[bool] = True

    @property
    def template(self) -> str | None:
        """The template that renders."""
        return self.text or self.tokenizer.chat_template

    @property
    def modes(self) -> tuple[bool, ...]:
        """The values of ``enable_thinking`` that may be tried, if the template has it and the user has not set it."""
        return (False, True) if MODE in str(self.template) and MODE not in self.kwargs else ()

    def prompt(self, conversation: Conversation) -> str:
        """A conversation with the generation prompt of the assistant's next turn."""
        return self.render(conversation, is_open=True)

    def render(self, conversation: Conversation, *, is_open: bool, **mode: Any) -> str:
        """A conversation as text.

        Args:
            conversation: its contents may be text or lists of text parts, whichever of the two the template renders.
            is_open: whether the generation prompt follows.
            **mode: variables of the template, besides ``kwargs``.

        Raises:
            UnusableRow: if the template raises an error, as for a system prompt that it does not support.
            UserError: if the tokenizer has no chat template.
        """
        messages = [_with_content(turn, is_parts=self._answered[0]) for turn in conversation.messages]
        text: str = self._apply(messages, tools=conversation.tools, add_generation_prompt=is_open, **mode)
        return text

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        if not self.template:
            raise UserError("model.model_name: its tokenizer has no chat template. TextDataModule can set data.chat_template")
        import jinja2

        try:
            options = {"tokenize": False, "chat_template": self.text} | options
            return self.tokenizer.apply_chat_template(messages, **options, **self.kwargs)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:  # the latter three: of its expressions
            raise UnusableRow(f"the chat template refuses the turns: {error}") from error

    @cached_property
    def _answered(self) -> tuple[bool, str, str]:
        """Whether contents must be lists of parts; what follows an answer at the end of a conversation, and inside one."""
        begin = {"role": "system", "content": "Be brief."}  # some templates need one
        for n_begin, is_parts in itertools.product((0, 1), (False, True)):
            turns = [*[begin] * n_begin, *user_turn(QUESTION), assistant_turn(ANSWER), *user_turn(QUESTION)]
            turns = [_with_content(turn, is_parts=is_parts) for turn in turns]
            try:
                last, inside = self._apply(turns[:-1]), self._apply(turns)
            except UnusableRow:
                continue
            if ANSWER in last:
                return is_parts, last.rpartition(ANSWER)[2], inside.rpartition(ANSWER)[2]
        return False, "", ""  # each row is refused, by its name

    @cached_property
    def special_ids(self) -> set[int]:
        """The tokenizer's special and added tokens, without those that are white space."""
        added = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        return added.union(self.tokenizer.all_special_ids)

    @cached_property
    def _ending(self) -> tuple[list[int], int | None]:
        """The stop token, if any, and how many special tokens follow it in a rendering; None: it is the next turn's first."""
        closing, following = (
            [token for token in self.tokenizer(text, add_special_tokens=False)["input_ids"] if token in self.special_ids]
            for text in self._answered[1:]
        )
        if not closing:
            return following[:1], None
        # What a last turn alone is followed by, an end of text, is no part of it.
        shared = (n for n in range(len(closing), 0, -1) if closing[:n] == following[:n])
        n_after = len(closing) - next(shared, len(closing))
        return [closing[-1 - n_after]], n_after

    @property
    def stop_tokens(self) -> list[int]:
        """The token with which the assistant's turn ends, if special or added; it need not be the tokenizer's end of text.

        Where the template has none, it is the token with which the next turn begins, or else the tokenizer's end of text.
        """
        end = end_of_text(self.tokenizer)
        return self._ending[0] or ([] if end is None else [end])

    @property
    def is_plain(self) -> bool:
        """Whether no special token ends the assistant's turn or begins the next one, so that only text does."""
        return not self._ending[0]

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The text at which generation stops if the template is plain: with it, the assistant's turn ends."""
        end = self._answered[1].strip()
        return (end,) if self.is_plain and end else ()

    @property
    def n_after_stop(self) -> int | None:
        """How many special tokens follow the last turn's stop token in a rendering; None: the rendering lacks that token."""
        return self._ending[1]


class PlainTemplate(ChatTemplate):
    """The template of a model that has none: the prompt as it is, directly followed by the response, and the end of text.

    An empty line follows the system prompt. Spaces at a prompt's end are the response's first, because in generation a prompt
    has none.
    """

    writes_special_tokens = False
    modes = ()
    _answered = (False, "", "")  # nothing but the end of text ends a turn

    @override
    def render(self, conversation: Conversation, *, is_open: bool, **mode: Any) -> str:
        text = plain_text(conversation)
        return text.rstrip(" ") if is_open else text


def plain_text(conversation: Conversation) -> str:
    """The text of a conversation for a model without a chat template; that of marked turns ends with the next turn's mark."""

    def written(turn: Message) -> str:
        text = text_of(turn["content"])
        if turn["role"] == "system":
            return f"{text}\n\n"
        return f"{MARKS[turn['role']]} {text.lstrip()}" if conversation.is_marked else text

    ends_with_user = conversation.is_marked and conversation.messages[-1]["role"] == "user"
    return "".join(map(written, conversation.messages)) + MARKS["assistant"] * ends_with_user


def _with_content(turn: Message, *, is_parts: bool) -> Message:
    """A message whose content is a list of parts, or a text."""
    content = turn["content"]
    if is_parts:
        return turn | {"content": [{"type": "text", "text": content or ""}] if not isinstance(content, list) else content}
    return turn | {"content": text_of(content)}


def n_appended(tokenizer: Any) -> int:
    """How many tokens a tokenizer appends to each text: ``</s>``, or BERT's ``[SEP]``."""
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return next((k for k, is_special in enumerate(reversed(mask)) if not is_special), 0)


def end_of_text(tokenizer: Any) -> int | None:
    """The token that ends a text: the tokenizer's end of text or, where it has none, what it appends; None for neither."""
    if tokenizer.eos_token_id is not None or not n_appended(tokenizer):
        return tokenizer.eos_token_id  # type: ignore[no-any-return]
    return int(tokenizer("a")["input_ids"][-1])


def end_tokens(ends: int | Sequence[int] | None, tokenizer: Any) -> list[int]:
    """The tokens at which a text ends: the tokenizer's end of text, and ``eos_token_id`` of the model's generation config."""
    return sorted({end_of_text(tokenizer), *(ends if isinstance(ends, Sequence) else [ends])} - {None})
