"""Plain text, instructions and conversations, with the language-model loss."""

import contextlib
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from typing_extensions import override

from cola_lightning.chat_template import (
    ChatTemplate,
    Conversation,
    Message,
    assistant_turn,
    find_chat_template,
    text_of,
    unknown_tokens,
    user_turn,
)
from cola_lightning.data.chat import encode_conversations
from cola_lightning.data.encoding import (
    LanguageRow,
    PromptRow,
    collate_language,
    collate_prompts,
    encode_prompts,
    encode_responses,
    encode_texts,
)
from cola_lightning.data.packing import Packs, collate_packs
from cola_lightning.data.rows import Row, Rows
from cola_lightning.data.source import Source, SourceDataModule
from cola_lightning.data.splits import Splits, is_on_hub
from cola_lightning.data.streaming import Stream, stream_loader, stream_splits
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError

Kind = Literal["messages", "prompt", "text"]
Columns = dict[str, str]  # by part of a row

SYSTEM = {"system": ["system"]}


# By part of a row, the names of columns that people use together; in order: those of one list have the same rank.
CONVENTIONS: list[list[tuple[Kind, dict[str, list[str]]]]] = [
    [
        ("messages", {"messages": ["messages"], "tools": ["tools"]}),
        ("messages", {"messages": ["conversations"], "tools": ["tools"]}),
        ("messages", {"prompt": ["prompt"], "completion": ["completion"], "tools": ["tools"]}),
    ],
    [
        ("prompt", {"prompt": ["instruction"], "input": ["input", "context"], "response": ["output", "response"], **SYSTEM}),
        ("prompt", {"prompt": ["prompt"], "response": ["completion", "response"], **SYSTEM}),
        ("prompt", {"prompt": ["question"], "response": ["answer"], **SYSTEM}),
    ],
    [("text", {"text": ["text"]})],
]
OPTIONAL = {"tools", "input", "system"}  # and the response in rows to be predicted
PARTS = ("messages", "tools", "prompt", "input", "response", "system", "text")


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
            by a buffer. It needs ``trainer.max_steps``. Validation takes the first ``val_size`` rows (by default 1,000) of its
            split or, where there is none, of the train split; test takes the first ``test_size`` rows of its split (by default
            1,000) or, if ``test_size`` asks for them, of the train split.
        columns: the columns to use, by what they hold: ``messages`` (and ``tools``), ``prompt`` (with ``response``, ``input``
            and ``system``), or ``text``; ``null``: found by their names.
        chat_template: whether to format instructions and conversations by the tokenizer's chat template; ``null``: if it has
            one. ``false``: a response directly follows its prompt. A text names a template that replaces the tokenizer's, in
            checkpoints and exports, too: ``chatml``, the path of a ``.jinja`` file, or the hub id or folder of another model.
        chat_template_kwargs: variables of the chat template, such as ``{enable_thinking: false}``, in training and generation.
        loss: for conversations: on ``all`` turns of the assistant, or on the ``last`` one alone.
        packing: put training rows together up to ``max_length``, so that there is hardly any padding; a row sees itself alone.
            ``batch_size`` then counts these packs, and ``length_grouped`` has no effect.
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

    takes_columns = True

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
        if streaming and (not isinstance(source, str) or not is_on_hub(source) or self.train_size is not None):
            raise UserError(f"data.streaming: expected one data set on the hub, without data.train_size, received {source!r}")
        if streaming and any(isinstance(size, float) and 0 < size <= 1 for size in (self.val_size, self.test_size)):
            raise UserError("data.streaming: expected data.val_size and data.test_size as numbers of rows, received a share")
        if streaming and packing:
            raise UserError("data.packing: rows of a stream cannot be packed. Set data.packing or data.streaming to false.")
        self.packing, self.length_grouped = packing, self.length_grouped and not packing
        self.columns, self.chat_template = columns, chat_template
        self.chat_template_kwargs, self.loss = chat_template_kwargs, loss
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self.decoding = Decoding(max_new_tokens, do_sample, temperature, top_p, stops)
        self.decoding.check("data.")
        self._kind: Kind = "text"  # of the rows that were encoded

    # ------------------------------------------------------------------ what a row is

    def _find(self, rows: Rows, *, has_response: bool = True) -> tuple[Kind, Columns]:
        """The kind of the rows and their columns; logs once which were taken, and how rows are formatted."""
        given = rows.columns_given or self.columns
        kind, columns = find_columns(rows.columns, rows.lists, given, has_response=has_response)
        self._kind = self._kind if kind == "text" else kind  # of several sources, one may be of texts
        *before, last = columns.values()
        taken = f"{', '.join(before)} -> {last}" if "response" in columns else ", ".join(columns.values())
        self._log_columns(taken, rows.columns, columns.values())
        if kind == "messages" and self.chat_template is False:
            raise UserError("data.chat_template: expected null or true for conversations, received false")
        if kind != "text":
            how = "formatted by the tokenizer's" if self.applies_chat_template else "directly followed by responses, without a"
            self._log(f"prompts are {how} chat template (data.chat_template)")
        return kind, columns

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
        own = {"template": self.tokenizer.chat_template} if isinstance(self.chat_template, str) else {}
        return {"kind": "text" if is_text else "response", "chat_template": is_chat, **variables, **own}

    @property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_template_kwargs or {})

    # ------------------------------------------------------------------ rows

    @override
    def setup(self, stage: str) -> None:
        if isinstance(self.chat_template, str):
            self.tokenizer.chat_template = find_chat_template(self.chat_template, self.tokenizer)
            if unknown := unknown_tokens(self.tokenizer):
                self._log(f"data.chat_template: not in the vocabulary, and so spelled in pieces: {', '.join(unknown)}")
        super().setup(stage)
        if self.packing and stage == "fit":
            self.train = self._packed(self.train)

    @override
    def encode(self, rows: Any, part: str) -> Any:
        if part == "predict":
            return self._encode_prompts(rows)
        if isinstance(rows, Stream):
            first = rows.first(1)
            encode = functools.partial(self._encode, *self._find(first))
            return rows.encoded(encode, first.columns, self.order_seed, *self._processes, self.num_workers)
        found = self._find(rows)
        how = *found, self.applies_chat_template, self.chat_template_kwargs, self.loss
        features = {"input_ids": ["int32"], "spans": ["int32"]}
        return self.map_rows(rows, features, *how, encode=functools.partial(self._encode, *found))

    def _packed(self, encoded: Any) -> Packs:
        lengths = self.lengths(encoded)
        packs = Packs(encoded, lengths, self.max_length, self.split_seed)
        share = sum(lengths) / max(1, self.max_length * len(packs))
        self._log(f"packing: {len(lengths)} rows in {len(packs)} packs of {self.max_length} tokens, {share:.1%} full")
        return packs

    def _encode(self, kind: Kind, columns: Columns, rows: Sequence[Row]) -> list[LanguageRow]:
        """Encodes rows for training or evaluation."""
        places = [row.place for row in rows]
        if kind == "text":
            encoded = encode_texts(self.tokenizer, [row.text(columns["text"]) for row in rows], self.max_length)
        elif kind == "prompt" and not self.applies_chat_template:
            pairs = [(prompt_text(row, columns), response(row, columns)) for row in rows]
            return encode_responses(self.tokenizer, pairs, self.max_length, places)
        else:
            turns = [conversation(row, columns) for row in rows]
            how: Any = {"loss": self.loss, "keeps_response": kind == "prompt"}
            encoded = encode_conversations(self._template, turns, self.max_length, places, **how)
        return list(itertools.chain.from_iterable(encoded))

    def _encode_prompts(self, rows: Rows) -> list[PromptRow]:
        """Encodes what is to be answered."""
        kind, columns = self._find(rows, has_response=False)
        is_chat, template = kind != "text" and self.applies_chat_template, self._template
        texts, prompts, targets = list[str](), list[Any](), list[str | None]()
        for row in rows:
            prompt, turns, target = asked(row, kind, columns)
            texts.append(template.prompt(turns, row.place) if is_chat else prompt)
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
            self._log(f"data.max_new_tokens: {room}, half of the model's longest sequence")
        return replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, room))

    @property
    def _room(self) -> int:
        """The maximum length of a prompt that leaves room for the response."""
        return min(self._max_length, int(self.tokenizer.model_max_length) - self._fitting_decoding().max_new_tokens)

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

    @functools.cached_property
    def _splits(self) -> list[Splits[Any]]:
        if not self.streaming:
            return super()._splits
        return [stream_splits(one.source, one.subset, one.revision) for one in self.sources]

    @override
    def parts(self, stage: str) -> dict[str, list[Any]]:
        if not self.streaming:
            return super().parts(stage)
        (splits,) = self._splits
        train, own = self._train(splits), {part: self._own(splits, part) for part in ("val", "test")}
        sizes = {"val": self.val_size, "test": self.test_size or (None if own["test"] and self.test_size is None else 0)}
        parts = {part: (own[part] or train).held_out(size) for part, size in sizes.items() if size != 0}
        self._log("; ".join(f"{rows.place}: {len(rows)} rows for {part}" for part, rows in parts.items()))
        if stage == "predict":
            return {"test": [parts.get("test", parts.get("val", train.held_out(None))).lacking_targets()]}
        return {part: [rows] for part, rows in {"train": train, **parts}.items()}

    @override
    def train_dataloader(self) -> Any:
        if not self.streaming:
            return super().train_dataloader()
        return stream_loader(self.train, self.collate, self.batch_size, self.num_workers)

    @override
    def _order(self) -> dict[str, Any]:
        return {"data.packing": self.packing, **super()._order()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.streaming else super().state_dict()

    @property
    @override
    def can_be_tested(self) -> bool:
        if self.streaming:
            return bool(self.test_size) or (self.test_size is None and self._own(self._splits[0], "test") is not None)
        return super().can_be_tested


# ---------------------------------------------------------------------- columns


def find_columns(
    names: Sequence[str], lists: Collection[str], given: Mapping[str, str] | None, *, has_response: bool = True
) -> tuple[Kind, Columns]:
    """The kind of a data set's rows, and the column of each part of a row.

    Args:
        names: the data set's columns.
        lists: those that hold lists.
        given: ``data.columns``: the column of each part; None: found by their names.
        has_response: whether a prompt needs a column with its response.

    Raises:
        UserError: if no convention fits, or two of the same rank; it lists the columns.

    Example:
        >>> find_columns(["instruction", "input", "output", "text"], [], None)
        ('prompt', {'prompt': 'instruction', 'input': 'input', 'response': 'output'})
    """
    if given is not None:
        return _given_columns(names, given, has_response=has_response)
    if not has_response:  # the same columns as in training, if there are those
        with contextlib.suppress(UserError):
            return find_columns(names, lists, None)
    received = "none"
    for rank in CONVENTIONS:
        fits = [(kind, found) for kind, parts in rank if (found := _fit(kind, parts, names, lists, has_response))]
        if len(fits) == 1 and not any(len(columns) > 1 for columns in fits[0][1].values()):
            return fits[0][0], {part: columns[0] for part, columns in fits[0][1].items()}
        if fits:
            both = " and ".join(dict.fromkeys(name for _, found in fits for columns in found.values() for name in columns))
            received = f"{both}, of which each could be meant"
            break
    raise UserError(
        "data.columns: expected a conversation (messages), a prompt with its response, or text among the columns "
        f"{', '.join(names)}, received {received}: name them by --data.columns '{{prompt: {names[0]}, response: {names[-1]}}}'"
    )


def _fit(
    kind: Kind, parts: Mapping[str, Sequence[str]], names: Sequence[str], lists: Collection[str], has_response: bool
) -> dict[str, list[str]] | None:
    """The columns of each part; None if one that is needed is not there."""
    found = {}
    for part, wanted in parts.items():
        is_either = part == "tools"  # or their JSON
        if some := [name for name in wanted if name in names and (is_either or (name in lists) is (kind == "messages"))]:
            found[part] = some
    needed = parts.keys() - OPTIONAL - (set() if has_response else {"response"})
    return found if needed <= found.keys() else None


def _given_columns(names: Sequence[str], given: Mapping[str, str], *, has_response: bool) -> tuple[Kind, Columns]:
    if unknown := [part for part in given if part not in PARTS]:
        raise UserError(f"data.columns: expected parts of a row, {', '.join(PARTS)}, received {unknown[0]!r}")
    if missing := [name for name in given.values() if name not in names]:
        raise UserError(f"data.columns: expected columns of the data, {', '.join(names)}, received {missing[0]!r}")
    kinds = [kind for kind in get_args(Kind) if kind in given]
    if len(kinds) != 1 or (kinds == ["prompt"] and has_response and "response" not in given):
        raise UserError(f"data.columns: expected messages, prompt and response, or text, received {', '.join(given) or 'none'}")
    return kinds[0], dict(given)


# ---------------------------------------------------------------------- what they hold


def prompt_text(row: Row, columns: Columns) -> str:
    """An instruction as text: the system prompt, the instruction and its input, with an empty line between."""
    before, after = ([text] * bool(text) for text in (_optional(row, columns, part) for part in ("system", "input")))
    return "\n\n".join([*before, row.text(columns["prompt"]), *after])


def response(row: Row, columns: Columns) -> str:
    """The response to an instruction."""
    if not (text := row.text(columns["response"])):
        raise UserError(f"{row.place}: expected a response that adds tokens to its prompt, received {text!r}")
    return text


def conversation(row: Row, columns: Columns) -> Conversation:
    """A conversation, in one column or in two, of which the first is given; or an instruction with its response."""
    if "messages" not in columns and "completion" not in columns:
        return Conversation([*_turns(row, columns), assistant_turn(response(row, columns))])
    tools = row.tools(columns.get("tools", ""))
    if "messages" in columns:
        return Conversation(row.messages(columns["messages"]), tools)
    given = row.messages(columns["prompt"])
    return Conversation([*given, *row.messages(columns["completion"])], tools, len(given))


def asked(row: Row, kind: Kind, columns: Columns) -> tuple[Any, Conversation, str | None]:
    """What is to be answered, as the data has it and as turns; and the answer that the row has, if any."""
    if kind == "text":
        return row.text(columns["text"]), Conversation(()), None
    if kind == "prompt":
        field = columns.get("response", "")
        target = None if row.get(field) is None else row.text(field).strip()
        return prompt_text(row, columns), Conversation(_turns(row, columns)), target
    whole = conversation(row, columns)
    n_asked = whole.n_prompt or len(whole.messages) - (whole.messages[-1]["role"] == "assistant")
    target = text_of(whole.messages[n_asked]["content"]).strip() if n_asked < len(whole.messages) else None
    return whole.messages[:n_asked], Conversation(whole.messages[:n_asked], whole.tools), target


def _turns(row: Row, columns: Columns) -> list[Message]:
    """An instruction as a user's turn, after the system's if there is one."""
    turns = user_turn(prompt_text(row, {part: name for part, name in columns.items() if part != "system"}))
    system = _optional(row, columns, "system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _optional(row: Row, columns: Columns, part: str) -> str:
    """A text that a row may lack; empty if it is blank."""
    field = columns.get(part, "")
    text = "" if row.get(field) is None else row.text(field)
    return text if text.strip() else ""
