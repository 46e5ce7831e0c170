"""Plain text, instructions and conversations, with the language-model loss."""

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from typing_extensions import override

from cola_lightning.data.batches import collate_language, collate_prompts
from cola_lightning.data.chat import encode_conversations
from cola_lightning.data.columns import Kind, find_columns
from cola_lightning.data.encoding import LanguageRow, PromptRow, encode_prompts, encode_responses, encode_texts
from cola_lightning.data.row import Row
from cola_lightning.data.rows import Rows, choose_split, is_on_hub
from cola_lightning.data.source import VALIDATION_SPLITS, SourceDataModule
from cola_lightning.data.streaming import HELD_OUT, stream_loader, stream_splits
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError
from cola_lightning.seeding import derive_seed
from cola_lightning.turns import ChatTemplate, Conversation, assistant_turn, text_of, user_turn

log = logging.getLogger(__name__)

Columns = dict[str, str]  # by part of a row


class TextDataModule(SourceDataModule):
    """Text, instructions or conversations with the language-model loss, as data sets of the hub have them.

    What a row is follows from its columns, in this order: a conversation (``messages``; ``conversations``; ``prompt`` and
    ``completion`` as lists of turns); an instruction (``instruction`` with ``input`` or ``context`` if there is one, and
    ``output`` or ``response``; ``prompt`` with ``completion`` or ``response``; ``question`` with ``answer``; each with
    ``system`` if there is one); ``text``. Other columns are ignored.

    The loss is on all tokens of a text, on the response alone, or on the assistant's turns of a conversation, each with the
    token at which it ends. Instructions are formatted by the tokenizer's chat template if it has one, as a user's turn and the
    assistant's; without one, the response directly follows its prompt. A text longer than ``max_length`` is split into several
    rows; a prompt or a conversation is truncated on the left.

    Predict generates: the response to a prompt (the row's response is the target), the assistant's answer to the last turn of a
    conversation (if the assistant has the last turn, it is the target), or the continuation of a text.

    Args:
        source: a file, a folder of ``train.jsonl`` and so on, or the id of a data set on the hub: see ``SourceDataModule``.
        subset: name of a configuration of a data set on the hub.
        streaming: read the training rows of a data set on the hub while training on them, for one that fits no disk; shuffled
            by a buffer. It needs ``trainer.max_steps``; validation and test take the first ``val_size`` and ``test_size`` rows
            of their split, or of the train split (1,000 each by default).
        columns: the columns to use, by what they hold: ``messages`` (and ``tools``), ``prompt`` (with ``response``, ``input``
            and ``system``), or ``text``; ``null``: found by their names.
        chat_template: whether to format instructions and conversations by the tokenizer's chat template; ``null``: if it has
            one. ``false``: a response directly follows its prompt.
        chat_template_kwargs: variables of the chat template, such as ``{enable_thinking: false}``, in training and generation.
        loss: for conversations: on ``all`` turns of the assistant, or on the ``last`` one alone.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies.
        max_new_tokens: for predict: maximum number of generated tokens per row; at most half of the model's longest sequence.
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
        streaming: bool = False,
        columns: dict[str, str] | None = None,
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
        if streaming and not is_on_hub(source):
            raise UserError(f"data.streaming: expected false for files on this machine, {source!r}, received true")
        for name, size in (("train_size", self.train_size), ("val_size", self.val_size), ("test_size", self.test_size)):
            if streaming and (isinstance(size, float) or (name == "train_size" and size is not None)):
                raise UserError(
                    f"data.{name}: expected no share, and no train_size, of rows that are streamed, received {size}"
                )
        self.streaming = streaming
        self.columns, self.chat_template = columns, chat_template
        self.chat_template_kwargs, self.loss = chat_template_kwargs, loss
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self.decoding = Decoding(max_new_tokens, do_sample, temperature, top_p, stops)
        self.decoding.check("data.")
        self._kind: Kind = "text"  # of the rows that were encoded

    # ------------------------------------------------------------------ rows that are streamed

    @override
    def setup(self, stage: str) -> None:
        if not self.streaming:
            super().setup(stage)
            return
        splits = stream_splits(self.source, self.subset, self.revision)
        train = choose_split(splits, self.train_split, (), "train_split")
        assert train is not None
        own = {
            "val": choose_split(splits, self.val_split, VALIDATION_SPLITS, "val_split"),
            "test": choose_split(splits, self.test_split, ("test",), "test_split"),
        }
        held_out, sizes = dict[str, Rows](), {"val": int(self.val_size or HELD_OUT), "test": int(self.test_size or HELD_OUT)}
        for part, split in own.items():
            if split is not None:
                held_out[part] = split.first(sizes[part])
            else:
                held_out[part] = train.first(train.n_held_out + sizes[part])[train.n_held_out :]
                train.n_held_out += sizes[part]
        self._tell("; ".join(f"{rows.place}: {len(rows)} rows for {part}" for part, rows in held_out.items()))
        if stage == "predict":
            self.test = self._not_empty(self.encode_predicted(held_out["test"].lacking_targets()))
        elif stage == "test":
            self.test = self._not_empty(self.encode(held_out["test"]))
        else:
            self.val = self._not_empty(self.encode(held_out["val"]))
        if stage == "fit":
            if train.n_held_out and (self.num_workers or self._processes[0] > 1):  # each of which would skip other rows
                raise UserError(
                    "data.streaming: expected one process without data.num_workers where validation or test rows are the first "
                    f"of the train split, received {self._processes[0]} and {self.num_workers}"
                )
            rows = train.first(1)
            encode = functools.partial(self._encode, *self._find(rows))
            seed = derive_seed(self.order_seed)
            self.train = train.encoded(encode, rows.columns, seed, *self._processes)

    @override
    def train_dataloader(self) -> Any:
        if not self.streaming:
            return super().train_dataloader()
        options = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        loader = stream_loader(dataset=self.train, collate_fn=self.collate, **options)
        loader.sampler.set_epoch = self.train.set_epoch  # Lightning calls a sampler's
        return loader

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.streaming else super().state_dict()

    @property
    @override
    def can_be_tested(self) -> bool:
        return self.streaming or super().can_be_tested

    # ------------------------------------------------------------------ what a row is

    def _find(self, rows: Rows, *, has_response: bool = True) -> tuple[Kind, Columns]:
        """The kind of the rows and their columns; logs once which were taken, and how rows are formatted."""
        self._kind, columns = find_columns(rows.columns, rows.lists, self.columns, has_response=has_response)
        unused = [name for name in rows.columns if name not in columns.values()]
        *before, last = columns.values()
        taken = f"{', '.join(before)} -> {last}" if "response" in columns else ", ".join(columns.values())
        self._tell(f"rows: {taken}" + (f"; not used: {', '.join(unused)}" if unused else ""))
        self._check_chat_template()
        return self._kind, columns

    def _check_chat_template(self) -> None:
        """Refuses a chat template that is requested but missing, or needed but off; logs how instructions are formatted."""
        has_template, requested = bool(self.tokenizer.chat_template), self.chat_template
        if requested and not has_template:
            raise UserError(
                "data.chat_template: expected null or false for a tokenizer without a chat template (model.model_name), "
                "received true"
            )
        if self._kind == "messages" and requested is False:
            raise UserError("data.chat_template: expected null or true for conversations, received false")
        if self._kind != "text" and self.applies_chat_template:
            self._tell("instructions are formatted by the tokenizer's chat template (data.chat_template: false for none)")
        elif self._kind == "prompt":
            reason = "null, for the tokenizer has none" if requested is None else "false"
            self._tell(f"a response directly follows its prompt, without a chat template (data.chat_template: {reason})")

    @property
    def applies_chat_template(self) -> bool:
        """Whether instructions are formatted by the tokenizer's chat template."""
        return bool(self.tokenizer.chat_template) if self.chat_template is None else self.chat_template

    @property
    @override
    def prompt_format(self) -> dict[str, Any]:
        is_text = self._kind == "text"
        is_chat = not is_text and self.applies_chat_template
        variables = {"chat_template_kwargs": self.chat_template_kwargs} if is_chat and self.chat_template_kwargs else {}
        return {"kind": "text" if is_text else "response", "chat_template": is_chat, **variables}

    @property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_template_kwargs or {})

    @override
    def has_target(self, row: Row) -> bool:
        lists = [name for name, value in row.items() if isinstance(value, list)]
        kind, columns = find_columns([*row], lists, self.columns, has_response=False)
        if kind == "messages":
            return "completion" in columns or bool(row.messages(columns["messages"])[-1]["role"] == "assistant")
        return kind == "text" or not row.is_missing(columns.get("response", ""))

    # ------------------------------------------------------------------ rows

    @override
    def encode(self, rows: Rows) -> Any:
        kind, columns = self._find(rows)
        how = kind, columns, self.applies_chat_template, self.chat_template_kwargs, self.loss
        encode = functools.partial(self._encode, kind, columns)
        return self.map_rows(rows, {"input_ids": ["int32"], "spans": ["int32"]}, *how, encode=encode)

    def _encode(self, kind: Kind, columns: Columns, rows: Sequence[Row]) -> list[LanguageRow]:
        """Encodes rows for training or evaluation."""
        if kind == "text":
            texts = encode_texts(self.tokenizer, [row.text(columns["text"]) for row in rows], self.max_length)
            return list(itertools.chain.from_iterable(texts))
        places = [row.place for row in rows]
        if kind == "messages":
            conversations = [_conversation(row, columns) for row in rows]
            encoded = encode_conversations(self._template, conversations, self.max_length, places, loss=self.loss)
            return list(itertools.chain.from_iterable(encoded))
        responses = [row.answer(columns["response"]) for row in rows]
        if not self.applies_chat_template:
            pairs = [(_prompt(row, columns), response) for row, response in zip(rows, responses, strict=True)]
            return encode_responses(self.tokenizer, pairs, self.max_length, places)
        for response, place in zip(responses, places, strict=True):
            if not response:
                raise UserError(f"{place}: expected a response that adds tokens to its prompt, received {response!r}")
        conversations = [
            Conversation([*_turns(row, columns), assistant_turn(response)])
            for row, response in zip(rows, responses, strict=True)
        ]
        encoded = encode_conversations(self._template, conversations, self.max_length, places, keeps_response=True)
        return list(itertools.chain.from_iterable(encoded))

    @override
    def encode_predicted(self, rows: Rows) -> list[PromptRow]:
        kind, columns = self._find(rows, has_response=False)
        is_chat = kind != "text" and self.applies_chat_template
        template, prompts, texts, targets = self._template, list[Any](), list[str](), list[str | None]()
        for row in rows:
            prompt: Any
            if kind == "messages":
                asked, target = _asked(row, columns)
                prompt = asked.messages
            else:
                prompt = row.text(columns["text"]) if kind == "text" else _prompt(row, columns)
                field = columns.get("response", "")
                target = None if row.is_missing(field) else row.text(field).strip()
                asked = Conversation(_turns(row, columns) if is_chat else ())
            texts.append(template.prompt(asked, row.place) if is_chat else prompt)
            prompts.append(prompt)
            targets.append(target)
        encoded = encode_prompts(self.tokenizer, texts, self._room, is_whole=is_chat)
        for ids, row in zip(encoded, rows, strict=True):
            if not ids:
                raise UserError(f"{row.place}: expected a prompt of at least one token, received {dict(row)}")
        return [PromptRow(*one) for one in zip(encoded, prompts, targets, strict=True)]

    def _fitting_decoding(self) -> Decoding:
        """How predict generates: at most as many tokens as half of the model's longest sequence."""
        room = max(1, int(self.tokenizer.model_max_length) // 2)
        if self.decoding.max_new_tokens > room:
            self._tell(f"data.max_new_tokens: {room}, half of the model's longest sequence")
        return replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, room))

    @property
    def _room(self) -> int:
        """The maximum length of a prompt that leaves room for the response."""
        return min(self._max_length, int(self.tokenizer.model_max_length) - self._fitting_decoding().max_new_tokens)

    @override
    def length(self, row: LanguageRow | PromptRow) -> int:
        return len(row.prompt_ids if isinstance(row, PromptRow) else row["input_ids"])

    @override
    def collate(self, rows: list[Any]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        if not isinstance(rows[0], PromptRow):
            return collate_language(rows, pad)
        ends = self._template.stop_tokens if self.prompt_format["chat_template"] else []
        return collate_prompts(rows, pad, self._fitting_decoding(), ends)


def _prompt(row: Row, columns: Columns) -> str:
    """An instruction as text: the system prompt, the instruction and its input, with an empty line between."""
    texts = [row.text(columns["prompt"])]
    for place, part in ((1, "input"), (0, "system")):
        if not row.is_missing(columns.get(part, "")) and (text := row.text(columns[part])).strip():
            texts.insert(place, text)
    return "\n\n".join(texts)


def _turns(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """An instruction as a user's turn, after the system's if there is one."""
    turns = user_turn(_prompt(row, {part: name for part, name in columns.items() if part != "system"}))
    if row.is_missing(columns.get("system", "")) or not (system := row.text(columns["system"])).strip():
        return turns
    return [{"role": "system", "content": system}, *turns]


def _conversation(row: Row, columns: Columns) -> Conversation:
    """A conversation, in one column or in two, of which the first is given."""
    tools = row.tools(columns.get("tools", ""))
    if "completion" not in columns:
        return Conversation(row.messages(columns["messages"]), tools)
    given = row.messages(columns["prompt"])
    return Conversation([*given, *row.messages(columns["completion"])], tools, len(given))


def _asked(row: Row, columns: Columns) -> tuple[Conversation, str | None]:
    """A conversation to be answered, and the answer that the row has, if any."""
    whole = _conversation(row, columns)
    n_asked = whole.n_prompt or len(whole.messages) - (whole.messages[-1]["role"] == "assistant")
    if not n_asked:
        raise UserError(f"{row.place}: expected a turn for the assistant to answer, received the assistant's alone")
    target = text_of(whole.messages[n_asked]["content"]).strip() if n_asked < len(whole.messages) else None
    return Conversation(whole.messages[:n_asked], whole.tools), target
