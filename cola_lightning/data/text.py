"""Plain text, instructions and conversations, with the language-model loss."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from typing_extensions import override

from cola_lightning.data.batches import collate_language, collate_prompts
from cola_lightning.data.chat import encode_conversations
from cola_lightning.data.encoding import LanguageRow, PromptRow, encode_prompts, encode_responses, encode_texts
from cola_lightning.data.row import Row
from cola_lightning.data.source import SourceDataModule
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError
from cola_lightning.turns import ChatTemplate, Conversation, assistant_turn, text_of, user_turn

log = logging.getLogger(__name__)

T = TypeVar("T")


class TextDataModule(SourceDataModule):
    """Text (``text``), instructions (``prompt``, ``response``) or conversations (``messages``) with the language-model loss.

    The loss is on all tokens of a text, on the response alone, or on the assistant's turns of a conversation, each with its
    stop token. Instructions are formatted by the tokenizer's chat template if it has one, as a user's turn and the
    assistant's; without one, the response directly follows its prompt. A text longer than ``max_length`` is split into several
    rows; a prompt or a conversation is truncated on the left.

    Predict generates: the response to a ``prompt`` (the row's ``response`` is the target), the assistant's answer to the last
    turn of a conversation (if the assistant has the last turn, it is the target), or the continuation of a text.

    Args:
        source: a file, a folder of ``train.jsonl`` and so on, or the id of a data set on the hub: see ``SourceDataModule``.
        subset: name of a configuration of a data set on the hub.
        chat_template: whether to format instructions and conversations by the tokenizer's chat template; ``null``: if it has
            one. ``false``: a response directly follows its prompt.
        chat_template_kwargs: variables of the chat template, such as ``{enable_thinking: false}``, in training and generation.
        loss: for conversations: the loss is on ``all`` turns of the assistant, or on the ``last`` one alone.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies.
        max_new_tokens: for predict: maximum number of generated tokens per row.
        do_sample: for predict: sample tokens, seeded by the run; ``false``: greedy decoding.
        temperature: for predict with ``do_sample``: divides the logits.
        top_p: for predict with ``do_sample``: sample from the most probable tokens whose probabilities add up to this; 1: from
            all.
        stop: for predict: texts at which generation stops; they are not part of the response.
        **rows: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Raises:
        UserError: for invalid files, rows and sizes.
    """

    def __init__(
        self,
        source: str,
        subset: str | None = None,
        *,
        chat_template: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        loss: Literal["all", "last"] = "all",
        max_length: int = 1024,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, max_length=max_length, **rows)
        self.chat_template, self.chat_template_kwargs, self.loss = chat_template, chat_template_kwargs, loss
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self.decoding = Decoding(max_new_tokens, do_sample, temperature, top_p, stops)
        self.decoding.check("data.")
        self._kinds: set[str] = set()  # of the encoded rows

    @property
    def applies_chat_template(self) -> bool:
        """Whether instructions are formatted by the tokenizer's chat template."""
        return bool(self.tokenizer.chat_template) if self.chat_template is None else self.chat_template

    @property
    @override
    def prompt_format(self) -> dict[str, Any]:
        is_text = self._kinds <= {"text"}
        is_chat = not is_text and self.applies_chat_template
        variables = {"chat_template_kwargs": self.chat_template_kwargs} if is_chat and self.chat_template_kwargs else {}
        return {"kind": "text" if is_text else "response", "chat_template": is_chat, **variables}

    @property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_template_kwargs or {})

    @override
    def has_target(self, row: Row) -> bool:
        if "messages" in row:
            return bool(row.messages("messages")[-1]["role"] == "assistant")
        return "text" in row or not row.is_missing("response")

    @override
    def encode(self, rows: Sequence[Row]) -> list[LanguageRow]:
        return self._encode_by_kind(rows, self._encode)

    @override
    def encode_predicted(self, rows: Sequence[Row]) -> list[PromptRow]:
        return self._encode_by_kind(rows, self._encode_prompts)

    def _encode_by_kind(self, rows: Sequence[Row], encode: Callable[[str, Sequence[Row]], list[list[T]]]) -> list[T]:
        """Encodes rows, in order, all rows of a kind at once; one row may become several."""
        kinds = [_kind(row) for row in rows]
        self._check_chat_template({kind: rows[kinds.index(kind)] for kind in dict.fromkeys(kinds)})
        alike = {kind: [row for row, of in zip(rows, kinds, strict=True) if of == kind] for kind in dict.fromkeys(kinds)}
        encoded = {kind: iter(encode(kind, some)) for kind, some in alike.items()}
        return [piece for kind in kinds for piece in next(encoded[kind])]

    def _check_chat_template(self, rows: Mapping[str, Row]) -> None:
        """Refuses a chat template that is requested but missing, or needed but off; logs once how instructions are formatted.

        Args:
            rows: the first row of each kind.
        """
        has_template, requested = bool(self.tokenizer.chat_template), self.chat_template
        if requested and not has_template:
            raise UserError(
                "data.chat_template: expected null or false for a tokenizer without a chat template (model.model_name), "
                "received true"
            )
        if "messages" in rows and requested is False:
            raise UserError(
                f"data.chat_template: expected null or true for conversations ({rows['messages'].place}), received false"
            )
        if not self._kinds - {"text"}:
            if rows.keys() - {"text"} and self.applies_chat_template:
                log.info("instructions are formatted by the tokenizer's chat template (data.chat_template: false for none)")
            elif "prompt" in rows:
                reason = "null, for the tokenizer has none" if requested is None else "false"
                log.info("a response directly follows its prompt, without a chat template (data.chat_template: %s)", reason)
        self._kinds |= rows.keys()

    def _encode(self, kind: str, rows: Sequence[Row]) -> list[list[LanguageRow]]:
        """Encodes rows of one kind for training or evaluation."""
        if kind == "text":
            return encode_texts(self.tokenizer, [row.text("text") for row in rows], self.max_length)
        places = [row.place for row in rows]
        if kind == "messages":
            conversations = [Conversation(row.messages("messages"), row.tools()) for row in rows]
            return encode_conversations(self._template, conversations, self.max_length, places, loss=self.loss)
        pairs = [(row.text("prompt"), row.answer("response")) for row in rows]
        if not self.applies_chat_template:
            return [[row] for row in encode_responses(self.tokenizer, pairs, self.max_length, places)]
        for (_, response), place in zip(pairs, places, strict=True):
            if not response:
                raise UserError(f"{place}: expected a response that adds tokens to its prompt, received {response!r}")
        conversations = [Conversation([*user_turn(prompt), assistant_turn(response)]) for prompt, response in pairs]
        return encode_conversations(self._template, conversations, self.max_length, places, keeps_response=True)

    def _encode_prompts(self, kind: str, rows: Sequence[Row]) -> list[list[PromptRow]]:
        """Encodes rows of one kind as prompts for generation."""
        prompts = [_prompt_and_response(kind, row) for row in rows]
        is_chat = kind == "messages" or (kind == "prompt" and self.applies_chat_template)
        if is_chat:
            template, is_whole = self._template, kind == "messages"
            asked = [
                Conversation(prompt, row.tools()) if is_whole else Conversation(user_turn(prompt))
                for (prompt, _), row in zip(prompts, rows, strict=True)
            ]
            texts = [template.prompt(some, row.place) for some, row in zip(asked, rows, strict=True)]
        else:
            texts = [prompt for prompt, _ in prompts]
        encoded = encode_prompts(self.tokenizer, texts, self._room, is_whole=is_chat)
        for ids, row in zip(encoded, rows, strict=True):
            if not ids:
                raise UserError(f"{row.place}: expected a prompt of at least one token, received {dict(row)}")
        return [[PromptRow(ids, *prompt)] for ids, prompt in zip(encoded, prompts, strict=True)]

    @property
    def _room(self) -> int:
        """The maximum length of a prompt that leaves room for the response."""
        limit, n_new = int(self.tokenizer.model_max_length), self.decoding.max_new_tokens
        if limit - n_new < 1:
            raise UserError(
                f"data.max_new_tokens: expected fewer than {limit} tokens, the longest sequence of the model, received {n_new}"
            )
        return min(self._max_length, limit - n_new)

    @override
    def length(self, row: LanguageRow | PromptRow) -> int:
        return len(row.prompt_ids if isinstance(row, PromptRow) else row["input_ids"])

    @override
    def collate(self, rows: list[Any]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        if not isinstance(rows[0], PromptRow):
            return collate_language(rows, pad)
        ends = self._template.stop_tokens if self.prompt_format["chat_template"] else []
        return collate_prompts(rows, pad, self.decoding, ends)


def _kind(row: Row) -> str:
    """The kind of a row: ``text``, ``messages``, or ``prompt`` with its response."""
    kinds = row.keys() & {"text", "prompt", "response", "messages"}
    if kinds in ({"text"}, {"messages"}):
        return next(iter(kinds))
    if kinds and kinds <= {"prompt", "response"}:
        return "prompt"
    fields = ", ".join(map(repr, row)) or "no field"
    raise UserError(f"{row.place}: expected 'text', 'messages', or 'prompt' and 'response', received {fields}")


def _prompt_and_response(kind: str, row: Row) -> tuple[Any, str | None]:
    """A row's prompt, as in the data, and its response, if any."""
    if kind == "text":
        return row.text("text"), None
    if kind == "prompt":
        return row.text("prompt"), None if row.is_missing("response") else row.text("response").strip()
    *before, last = row.messages("messages")
    if last["role"] != "assistant":
        return [*before, last], None
    if not before:
        raise UserError(f"{row.place}: expected a turn for the assistant to answer, received the assistant's alone")
    return before, text_of(last["content"]).strip()
