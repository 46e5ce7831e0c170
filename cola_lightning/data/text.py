"""Plain text, instructions and conversations, with the language-model loss."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from typing_extensions import override

from cola_lightning.chat_template import (
    ChatTemplate,
    Conversation,
    PlainTemplate,
    find_chat_template,
    plain_text,
    unknown_tokens,
)
from cola_lightning.data.batch import Packs, PromptRow, collate_language, collate_prompts
from cola_lightning.data.columns import Columns, Kind, Reading, check_unpaired, find_columns
from cola_lightning.data.forms import conversation, question
from cola_lightning.data.preprocessing import Preprocessor, Size, TokenPreprocessor
from cola_lightning.data.render import LanguageRow, TooLong, TurnEncoder, encode_prompt, encode_texts
from cola_lightning.data.rows import Row, Rows
from cola_lightning.data.source import Source
from cola_lightning.data.tokenized import TokenizedDataModule
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UnusableRow, UserError, check_name

# ---------------------------------------------------------------------- kinds of rows


TurnLoss = Literal["all", "last"]  # which of the model's turns are learned
TOKENS: dict[str, Any] = {"input_ids": ["int32"], "spans": ["int32"]}  # of a LanguageRow, in Arrow


@dataclass(frozen=True)
class TextRows(TokenPreprocessor):
    """Base class for texts, prompts and conversations.

    Attributes:
        columns: the column in each slot.
        kind: what rows are.
        template: the tokenizer's chat template, or the plain one.
        prompt_format: see :attr:`~cola_lightning.EpochDataModule.prompt_format`.
    """

    columns: Columns
    kind: Kind
    template: ChatTemplate
    prompt_format: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class LanguageRows(TextRows):
    """Base class for rows with the language-model loss.

    Attributes:
        too_long: whether to shorten or to skip a longer row.
    """

    too_long: TooLong = "shorten"
    features = TOKENS

    @override
    def size(self, example: LanguageRow) -> Size:
        spans = example["spans"]
        return Size(len(example["input_ids"]), example.get("lost", 0), sum(spans[1::2]) - sum(spans[::2]))

    @override
    def collate(self, examples: list[LanguageRow]) -> dict[str, Any]:
        return collate_language(examples, self.tokenizer.pad_token_id)


class Texts(LanguageRows):
    """Texts, with the loss on all tokens."""

    @override
    def read(self, row: Row) -> str:
        if not (text := row.text(self.columns["text"])).strip():
            raise UnusableRow("no text")
        return text

    @override
    def encode(self, items: Sequence[str], notes: set[str]) -> list[list[LanguageRow] | UnusableRow]:
        return encode_texts(self.tokenizer, items, self.max_length)


@dataclass(frozen=True)
class Conversations(LanguageRows):
    """Conversations, or prompts with their responses, with the loss on the assistant's turns.

    Attributes:
        loss: on ``all`` turns of the assistant, or on the ``last`` one alone.
    """

    loss: str = "all"

    @override
    def read(self, row: Row) -> Conversation:
        return conversation(row, self.columns, self.loss)

    @override
    def encode(self, items: Sequence[Conversation], notes: set[str]) -> list[list[LanguageRow] | UnusableRow]:
        return TurnEncoder(self.template, self.max_length, notes, self.too_long, self.kind == "prompt").conversations(items)


@dataclass(frozen=True)
class Prompts(TextRows):
    """Texts, prompts or conversations to be answered.

    Attributes:
        decoding: how answers are generated.
    """

    decoding: Decoding = field(default_factory=Decoding)

    @override
    def read(self, row: Row) -> PromptRow:
        asked, target = question(row, self.kind, self.columns)
        if not (ids := encode_prompt(self.template, asked, self.max_length)):
            raise UnusableRow("the prompt has no tokens")
        return PromptRow(ids, asked.messages if self.kind == "messages" else plain_text(asked), target)

    @override
    def encode(self, items: Sequence[PromptRow], notes: set[str]) -> list[list[PromptRow]]:
        return [[prompt] for prompt in items]

    @override
    def size(self, example: PromptRow) -> Size:
        return Size(len(example))

    @override
    def collate(self, examples: list[PromptRow]) -> dict[str, Any]:
        decoding = self.decoding.stopping(self.template.stop_texts)
        return collate_prompts(examples, self.tokenizer.pad_token_id, decoding, self.template.stop_tokens)


# ---------------------------------------------------------------------- the data module


class TextDataModule(TokenizedDataModule):
    """Text, instructions or conversations with the language-model loss, as data sets of the hub have them.

    What a row is follows from its columns, in this order: a conversation (``messages``; ``conversations``; ``prompt`` and
    ``completion`` as lists of turns); a prompt with its response (``instruction``, with ``input`` or ``context``, and
    ``output``; ``prompt`` and ``completion``; ``question`` and ``answer``; and others that docs/data.md lists); ``text``. A
    ``system`` column is the system prompt. Other columns are ignored.

    The loss is on all tokens of a text, on the response alone, or on the assistant's turns of a conversation, each with the
    token at which it ends. Instructions are formatted by the tokenizer's chat template if it has one, as a user's turn and the
    assistant's; without one, the response directly follows its prompt. A text longer than ``max_length`` is split into several
    rows. A longer prompt loses tokens after its system prompt, and then its response loses its end; a longer conversation
    loses its oldest turns.

    Predict generates: the response to a prompt (the row's response is the target), the assistant's answer to the last turn of a
    conversation (if the assistant has the last turn, it is the target), or the continuation of a text.

    Args:
        source: A file, a folder of ``train.jsonl`` and so on, or the id of a data set on the hub: see ``SourceDataModule``.
        subset: Name of a configuration of a data set on the hub.
        columns: Which columns to use, as ``{prompt: ask, response: say}``. The keys are ``messages`` (with ``tools``),
            ``prompt`` (with ``response``, ``input`` and ``system``) or ``text``. ``null`` finds them by their names.
        chat_template: ``true`` formats instructions and conversations by the tokenizer's chat template, and ``false`` puts a
            response directly after its prompt. ``null`` uses the template if the tokenizer has one. ``chatml``, the path of a
            ``.jinja`` file, or the hub id or folder of another model replaces the tokenizer's template, also in checkpoints and
            exports.
        chat_template_kwargs: Variables of the chat template, such as ``{enable_thinking: false}``, for training and generation.
        loss: In conversations, train on ``all`` turns of the assistant, or only on the ``last`` one.
        packing: Fill sequences of ``max_length`` with several training rows, so that there is hardly any padding. A row sees
            only itself. ``batch_size`` then counts these packs, and ``length_grouped`` has no effect.
        max_new_tokens: Predict generates at most this many tokens per row, and at most half of the model's longest sequence.
        do_sample: ``true`` makes predict sample tokens, seeded by the run. ``false`` is greedy decoding.
        temperature: With ``do_sample``, the logits are divided by this.
        top_p: With ``do_sample``, sample only from the most probable tokens whose probabilities add up to this. 1 is all of
            them.
        stop: List of texts at which predict stops to generate. They are not part of the response.
        **rows: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Raises:
        UserError: for invalid files, rows and sizes.
    """

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        columns: dict[str, str] | None = None,
        chat_template: bool | str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        loss: TurnLoss = "all",
        packing: bool = False,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, **rows)
        check_name("data.loss", loss, get_args(TurnLoss))
        self.packing, self.length_grouped = packing, self.length_grouped and not packing
        self.columns, self.chat_template = columns, chat_template
        self.chat_template_kwargs, self.loss = chat_template_kwargs, loss
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self.decoding = Decoding(max_new_tokens, do_sample, temperature, top_p, stops)
        self.decoding.check("data.")

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.template is not None and stage == "fit" and getattr(self.trainer, "datamodule", self) is self:
            self.tokenizer.chat_template = self.template  # that of the trained model, in checkpoints and exports
        if self.packing and stage == "fit":
            self.train = self._packed(self.train)

    @functools.cached_property
    def template(self) -> str | None:
        """The chat template that ``data.chat_template`` names; None: the tokenizer's own."""
        if not isinstance(self.chat_template, str):
            return None
        template = find_chat_template(self.chat_template, self.tokenizer)
        if unknown := unknown_tokens(self.tokenizer, template):
            self._log(f"data.chat_template: not in the vocabulary, and so spelled in pieces: {', '.join(unknown)}")
        return template

    # ------------------------------------------------------------------ what a row is

    @override
    def preprocessor_of(self, rows: Rows, part: str) -> Preprocessor:
        chosen = rows.source_columns or self.columns
        reading = self.read_columns(rows, chosen, has_response=part != "predict")
        kind, columns = reading.kind, reading.columns
        self._log_columns(str(reading), rows.columns, [*columns.values()])
        if kind == "messages" and self.chat_template is False:
            raise UserError("data.chat_template: conversations need a chat template. Set it to null or true.")
        is_chat = kind == "messages" or (kind == "prompt" and self.applies_chat_template)
        if kind != "text":
            form = "formatted by the tokenizer's" if is_chat else "directly followed by responses, without a"
            self._log(f"prompts are {form} chat template (data.chat_template)")
        known: dict[str, Any] = {"tokenizer": self.tokenizer, "kind": kind}
        # Only a chat template renders tools.
        known["columns"] = {slot: name for slot, name in columns.items() if is_chat or slot != "tools"}
        variables, make_template = self.chat_template_kwargs or {}, ChatTemplate if is_chat else PlainTemplate
        known["template"] = make_template(self.tokenizer, variables, self.template)
        known["prompt_format"] = self._prompt_format(kind, is_chat=is_chat)
        if part != "predict":
            return self.trained(max_length=self.max_length, too_long=self.too_long, **known)
        decoding, longest = self._fitting_decoding(), int(self.tokenizer.model_max_length)
        room = min(self._max_length, longest - decoding.max_new_tokens)  # the response has its own
        return Prompts(max_length=room, decoding=decoding, **known)

    def _prompt_format(self, kind: Kind, *, is_chat: bool) -> dict[str, Any]:
        variables = {"chat_template_kwargs": self.chat_template_kwargs} if is_chat and self.chat_template_kwargs else {}
        template = {} if self.template is None else {"template": self.template}
        return {"kind": "text" if kind == "text" else "response", "chat_template": is_chat, **variables, **template}

    def read_columns(self, rows: Rows, chosen: Mapping[str, str] | None, *, has_response: bool) -> Reading:
        """How the rows are read, by the columns that the user has chosen, or by their names."""
        reading = find_columns(rows.columns, rows.lists, chosen, has_response=has_response)
        if chosen is None and has_response:
            check_unpaired(reading, rows.is_boolean)
        return reading

    def trained(self, **known: Any) -> Preprocessor:
        """The preprocessor of rows in training and evaluation, by what is known of them."""
        return Texts(**known) if known["kind"] == "text" else Conversations(**known, loss=self.loss)

    @property
    def applies_chat_template(self) -> bool:
        """Whether instructions are formatted by the tokenizer's chat template."""
        return bool(self.tokenizer.chat_template if self.chat_template is None else self.chat_template)

    def _fitting_decoding(self) -> Decoding:
        """How predict generates: at most as many tokens as half of the model's longest sequence."""
        room = max(1, int(self.tokenizer.model_max_length) // 2)
        if self.decoding.max_new_tokens > room:
            self._log(f"data.max_new_tokens: {room}, half of the model's longest sequence")
        return replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, room))

    # ------------------------------------------------------------------ rows that are packed

    def _packed(self, encoded: Any) -> Packs:
        lengths = self.lengths(encoded)
        packs = Packs(encoded, lengths, self.max_length, self.split_seed, self.tokenizer.pad_token_id)
        share = sum(lengths) / max(1, self.max_length * len(packs))
        self._log(f"packing: {len(lengths)} rows in {len(packs)} packs of {self.max_length} tokens, {share:.1%} full")
        return packs

    @override
    def _order(self) -> dict[str, Any]:
        packed = {"data.packing": self.packing} | ({"data.max_length": self.max_length} if self.packing else {})
        return {**packed, **super()._order()}
