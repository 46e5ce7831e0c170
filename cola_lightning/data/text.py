"""Plain text, instructions and conversations, with the language-model loss."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from typing_extensions import override

from cola_lightning.chat_template import ChatTemplate, find_chat_template, unknown_tokens
from cola_lightning.data.chat import encode_conversations, fit_prompt
from cola_lightning.data.columns import Columns, Kind, Reading, check_unpaired, find_columns
from cola_lightning.data.conversations import Question, conversation, pair, question
from cola_lightning.data.encoding import (
    LanguageRow,
    PromptRow,
    collate_language,
    collate_prompts,
    encode_prompt,
    encode_responses,
    encode_texts,
)
from cola_lightning.data.packing import Packs, collate_packs
from cola_lightning.data.report import RowReport
from cola_lightning.data.rows import Row, Rows, each, together
from cola_lightning.data.source import Source, SourceDataModule
from cola_lightning.data.splits import Splits, is_on_hub
from cola_lightning.data.streaming import EncodedStream, stream_splits
from cola_lightning.decoding import Decoding
from cola_lightning.errors import HubError, UnusableRow, UserError


class TextDataModule(SourceDataModule):
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
        streaming: Read the training rows of a data set on the hub during training, if it does not fit on the disk. A buffer
            shuffles them. It needs ``trainer.max_steps``. Validation uses the first ``val_size`` rows (by default 1,000) of its
            split or, if there is none, of the train split. Test uses the first ``test_size`` rows of its split (by default
            1,000) or, if ``test_size`` asks for them, of the train split.
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
        max_length: Maximum length of a sequence, in tokens. The model's own limit also applies.
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

    features: ClassVar[dict[str, Any]] = {"input_ids": ["int32"], "spans": ["int32"]}  # types of the columns of encoded rows

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        streaming: bool = False,
        columns: dict[str, str] | None = None,
        chat_template: bool | str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        loss: Literal["all", "last"] = "all",
        packing: bool = False,
        max_length: int = 1024,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, max_length=max_length, **rows)
        self.streaming = streaming
        has_shares = any(isinstance(size, float) and 0 < size <= 1 for size in (self.val_size, self.test_size))
        can_stream = isinstance(source, str) and is_on_hub(source) and self.train_size is None
        if streaming and (packing or has_shares or not can_stream):
            raise UserError("data.streaming needs a single hub data set. Remove data.packing, train_size and fractional sizes")
        self.packing, self.length_grouped = packing, self.length_grouped and not packing
        self.columns, self.chat_template = columns, chat_template
        self.chat_template_kwargs, self.loss = chat_template_kwargs, loss
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self.decoding = Decoding(max_new_tokens, do_sample, temperature, top_p, stops)
        self.decoding.check("data.")
        self._kind: Kind = "text"  # of the rows that were encoded

    # ------------------------------------------------------------------ what a row is

    def _find_columns(self, rows: Rows, *, has_response: bool = True) -> tuple[Kind, Columns]:
        """The kind of the rows and their columns; logs once which were taken, and how rows are formatted."""
        chosen = rows.source_columns or self.columns
        reading = self._read_columns(rows, chosen, has_response=has_response)
        kind, columns = reading.kind, reading.columns
        self._kind = self._kind if kind == "text" else kind  # of several sources, one may be of texts
        self._log_columns(str(reading), rows.columns, [*columns.values(), *reading.others])
        if kind == "messages" and self.chat_template is False:
            raise UserError("data.chat_template: conversations need a chat template. Set it to null or true.")
        if kind != "text":
            form = "formatted by the tokenizer's" if self.applies_chat_template else "directly followed by responses, without a"
            self._log(f"prompts are {form} chat template (data.chat_template)")
        return kind, columns

    def _read_columns(self, rows: Rows, chosen: Mapping[str, str] | None, *, has_response: bool) -> Reading:
        """How the rows are read, by the columns that the user has chosen, or by their names."""
        reading = find_columns(rows.columns, rows.lists, chosen, has_response=has_response)
        if chosen is None and has_response:
            check_unpaired(reading, rows.booleans)
        return reading

    def _question(self, row: Row, kind: Kind, columns: Columns) -> Question:
        """The prompt of a row, for predict."""
        return question(row, kind, columns)

    @property
    def applies_chat_template(self) -> bool:
        """Whether instructions are formatted by the tokenizer's chat template."""
        return bool(self.tokenizer.chat_template if self.chat_template is None else self.chat_template)

    @property
    @override
    def prompt_format(self) -> dict[str, Any]:
        is_text = self._kind == "text"
        is_chat = not is_text and self.applies_chat_template
        variables = {"chat_template_kwargs": self.chat_template_kwargs} if is_chat and self.chat_template_kwargs else {}
        template = {"template": self.tokenizer.chat_template} if isinstance(self.chat_template, str) else {}
        return {"kind": "text" if is_text else "response", "chat_template": is_chat, **variables, **template}

    @property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_template_kwargs or {})

    # ------------------------------------------------------------------ rows

    @override
    def set_tokenizer(self) -> None:
        super().set_tokenizer()
        if isinstance(self.chat_template, str):
            try:
                self.tokenizer.chat_template = find_chat_template(self.chat_template, self.tokenizer)
            except (HubError, UserError):
                if getattr(self.trainer and self.trainer.lightning_module, "trained_template", None) is None:
                    raise
                self._log(f"data.chat_template: {self.chat_template!r} cannot be read, so that of the checkpoint is used")
            if unknown := unknown_tokens(self.tokenizer):
                self._log(f"data.chat_template: not in the vocabulary, and so spelled in pieces: {', '.join(unknown)}")

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.packing and stage == "fit":
            self.train = self._packed(self.train)

    @override
    def encode(self, rows: Any, part: str) -> tuple[Any, RowReport]:
        if part == "predict":
            return self._encode_prompts(rows)
        kind, columns = self._find_columns(rows)
        options = kind, columns, self.applies_chat_template, self.chat_template_kwargs, self.loss, self.too_long
        return self.map_rows(rows, self.features, *options, encode=functools.partial(self._encode, kind, columns))

    def _packed(self, encoded: Any) -> Packs:
        lengths = self.lengths(encoded)
        packs = Packs(encoded, lengths, self.max_length, self.split_seed)
        share = sum(lengths) / max(1, self.max_length * len(packs))
        self._log(f"packing: {len(lengths)} rows in {len(packs)} packs of {self.max_length} tokens, {share:.1%} full")
        return packs

    def _encode(
        self, kind: Kind, columns: Columns, rows: Sequence[Row], notes: set[str]
    ) -> Sequence[list[LanguageRow] | UnusableRow]:
        """Encodes rows for training or evaluation."""
        tokenizer, max_length, too_long = self.tokenizer, self.max_length, self.too_long
        if kind == "text":
            texts = each(lambda row: _words(row.text(columns["text"])), rows)
            return together(lambda usable: encode_texts(tokenizer, usable, max_length), texts)
        if kind == "prompt" and not self.applies_chat_template:
            pairs = each(lambda row: pair(row, columns), rows)
            return together(lambda usable: encode_responses(tokenizer, usable, max_length, too_long), pairs)
        options: Any = {"too_long": too_long, "shortens_response": kind == "prompt"}
        template, conversations = self._template, each(lambda row: conversation(row, columns, self.loss), rows)
        return together(lambda usable: encode_conversations(template, usable, max_length, notes, **options), conversations)

    def _encode_prompts(self, rows: Rows) -> tuple[list[PromptRow], RowReport]:
        """Encodes what is to be answered."""
        kind, columns = self._find_columns(rows, has_response=False)
        is_chat, template = kind != "text" and self.applies_chat_template, self._template
        # It leaves room for the response.
        room = min(self._max_length, int(self.tokenizer.model_max_length) - self._fitting_decoding().max_new_tokens)

        def prompt_row(row: Row) -> PromptRow:
            prompt, turns, target, head = self._question(row, kind, columns)
            text = fit_prompt(template, turns, room) if is_chat else prompt
            if not (ids := encode_prompt(self.tokenizer, text, room, head * (not is_chat), is_whole=is_chat)):
                raise UnusableRow("the prompt has no tokens")
            return PromptRow(ids, prompt, target)

        prompts, report = rows.encoded(lambda some_rows: each(prompt_row, some_rows))
        report.n_tokens = sum(map(len, prompts))
        return prompts, report

    def _fitting_decoding(self) -> Decoding:
        """How predict generates: at most as many tokens as half of the model's longest sequence."""
        room = max(1, int(self.tokenizer.model_max_length) // 2)
        if self.decoding.max_new_tokens > room:
            self._log(f"data.max_new_tokens: {room}, half of the model's longest sequence")
        return replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, room))

    @override
    def collate(self, rows: list[Any]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        if isinstance(rows[0], list):
            return collate_packs(rows, pad)
        if not isinstance(rows[0], PromptRow):
            return collate_language(rows, pad)
        template, decoding = self._template, self._fitting_decoding()
        if not self.prompt_format["chat_template"]:
            return collate_prompts(rows, pad, decoding, [])
        return collate_prompts(rows, pad, decoding.stopping(template.stop_texts), template.stop_tokens)

    # ------------------------------------------------------------------ rows that are streamed

    @override
    def splits_of(self, source: Source) -> Splits[Any]:
        if self.streaming:
            return stream_splits(source.source, source.subset, source.revision)
        return super().splits_of(source)

    @override
    def train_dataloader(self) -> Any:
        if not isinstance(self.train, EncodedStream):
            return super().train_dataloader()
        options = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return self.train.loader(self.collate, self.order_seed, self._processes, self.check_skipped, **options)

    @override
    def _order(self) -> dict[str, Any]:
        packed = {"data.packing": self.packing} | ({"data.max_length": self.max_length} if self.packing else {})
        return {**packed, **super()._order()}


def _words(text: str) -> str:
    """A text, unless it is blank."""
    if not text.strip():
        raise UnusableRow("no text")
    return text
