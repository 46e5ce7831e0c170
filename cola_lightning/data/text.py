"""Data for language models: base classes, and plain text or instructions with a language-model loss."""

import functools
import logging
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast

from typing_extensions import override

from cola_lightning.data.base import EpochDataModule, check_shares
from cola_lightning.data.batches import collate_language, collate_prompts
from cola_lightning.data.chat import encode_conversations
from cola_lightning.data.encoding import LanguageRow, PromptRow, encode_prompts, encode_responses, encode_texts
from cola_lightning.data.row import Row
from cola_lightning.data.rows import (
    check_source,
    draw,
    fill_cache,
    first_row,
    has_split,
    in_order_of,
    is_file,
    let_lack_targets,
    read_rows,
    rows_of,
)
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError
from cola_lightning.turns import as_prompt, assistant_turn, end_of_turn, user_turn

log = logging.getLogger(__name__)

T = TypeVar("T")
DRAWN_SHARE = 0.1  # of the rows of one file, each for validation and test


class TokenizedDataModule(EpochDataModule):
    """Rows that the module's tokenizer tokenizes.

    Args:
        batch_size: rows per training batch.
        eval_batch_size: rows per batch in validation, test and predict; ``null``: as in training.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies.
        split_seed: seed of the split into training, validation and test rows.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.
        length_grouped: group rows of similar length into training batches, to reduce padding, and shuffle the batches;
            ``false``: shuffle the rows.
    """

    def __init__(
        self,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 2048,
        split_seed: int = 0,
        num_workers: int = 0,
        length_grouped: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, split_seed, num_workers)
        self.length_grouped = length_grouped
        if max_length < 2:
            raise UserError(f"data.max_length: expected at least 2 tokens, received {max_length}")
        self._max_length = max_length
        self._tokenizer_of_worker: Any = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | ({"_tokenizer_of_worker": self.tokenizer} if self.trainer else {})

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the module that is trained."""
        if self.trainer is None and self._tokenizer_of_worker is not None:
            return self._tokenizer_of_worker
        module = self.trainer and self.trainer.lightning_module
        if "tokenizer" not in dir(module):  # not getattr: an error inside a property of that name must not be hidden
            raise UserError(f"model: expected a module with a tokenizer, received {type(module).__name__}")
        return cast(Any, module).tokenizer

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: the smaller of the requested length and the model's limit."""
        return int(min(self._max_length, self.tokenizer.model_max_length))


def draw_parts(
    rows: Sequence[Row],
    sizes: Mapping[str, float | None],
    seed: int,
    what: str,
    groups: Sequence[object] | None = None,
) -> list[list[Row]]:
    """Disjoint parts of the rows, see :func:`~cola_lightning.data.rows.draw`; in their order if one part takes all.

    Args:
        rows: the rows to draw from.
        sizes: each part's size, by option: a number of rows, a share below 1, 0 for an empty part; None: the rest.
        seed: the permutation's seed.
        what: names the rows in the message.
        groups: each row's group.

    Raises:
        UserError: if there are fewer rows than the parts need.
    """
    counts = {name: size and rows_of(size, len(rows)) for name, size in sizes.items()}
    rest = max(len(rows) - sum(count or 0 for count in counts.values()), 1)
    wanted = [rest if count is None else count for count in counts.values()]
    if sum(map(bool, wanted)) == 1 and None in counts.values():
        return [list(rows) if count else [] for count in wanted]
    fields = " + ".join(f"data.{name}" for name, count in zip(counts, wanted, strict=True) if count)
    parts = iter(draw(rows, [count for count in wanted if count], seed, f"{fields}, of {what}", groups))
    return [next(parts) if count else [] for count in wanted]


class SourceDataModule(TokenizedDataModule):
    """Rows of a data set from a file, a folder or the hub, in its own splits or in drawn ones.

    Args:
        source: a file of rows (``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.parquet``; all but the last also ``.gz``), a
            folder with such a file for each split (``train.csv``, ``validation.csv``, ``test.csv``), or the id of a data set
            on the hub. The rows of a single file are split by ``split_seed``; ``predict`` takes all of them.
        subset: name of a configuration of a data set on the hub.
        batch_size: rows per training batch.
        eval_batch_size: rows per batch in validation, test and predict; ``null``: as in training.
        max_length: maximum length of a sequence, in tokens; the model's own limit also applies.
        train_size: number of training rows or, below 1, their share of the rows, drawn by ``split_seed``; ``null``: all that
            remain.
        val_size: number or share of validation rows, drawn from the train split together with the training rows; ``null``: the
            validation split, or a share of 0.1 if there is none.
        test_size: number or share of test rows, drawn in the same way; ``null``: the test split, or a share of 0.1 if there is
            none.
        test_split: the split that test and predict read; ``null``: ``test`` if a folder has it, else ``validation``.
        split_seed: seed by which rows are drawn.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.
        length_grouped: group rows of similar length into training batches, to reduce padding, and shuffle the batches;
            ``false``: shuffle the rows, as in the paper's runs.
    """

    def __init__(
        self,
        source: str,
        subset: str | None = None,
        *,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        test_split: str | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
        length_grouped: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, max_length, split_seed, num_workers, length_grouped)
        check_shares(train_size=train_size, val_size=val_size, test_size=test_size)
        check_source(source, subset)
        if None not in (test_size, test_split):
            raise UserError(f"data.test_split: expected null beside data.test_size, received {test_split!r}")
        self.source, self.subset, self.test_split = source, subset, test_split
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size

    @property
    def _val_split(self) -> str | None:
        """The validation split's name; None: validation rows are drawn from the train split."""
        return "validation" if self.val_size is None and has_split(self.source, "validation") else None

    @property
    def _test_split(self) -> str | None:
        """The test split's name; None: test rows are drawn from the train split."""
        if self.test_split is not None and is_file(self.source):
            raise UserError(
                f"data.test_split: expected null where data.source is a file, {self.source!r}, received {self.test_split!r}"
            )
        if self.test_size is not None or self.test_split is not None:
            return self.test_split
        return next((split for split in ("test", "validation") if has_split(self.source, split)), None)

    @override
    def prepare_data(self) -> None:
        if not is_file(self.source):
            fill_cache(self.source, self.subset, {"train", *filter(None, (self._val_split, self._test_split))})

    @override
    def setup(self, stage: str) -> None:
        read = functools.cache(lambda split: read_rows(self.source, split, self.subset))
        if stage == "fit" or (self.needs_train_rows and has_split(self.source, "train")):
            self.look_at(read("train"))
        if stage == "predict":
            self.test = self._known(self.encode_predicted(self._predicted(read)))
            return
        if stage == "test":
            rows = read(self._test_split) if self._test_split else self._drawn(read("train"))[2]
            self.test = self._known(self.encode(rows))
            return
        train, val, _ = self._drawn(read("train")) if stage == "fit" or self._val_split is None else ([], [], [])
        self.val = self._known(self.encode(read(self._val_split) if self._val_split else val))
        if stage == "fit":
            self.train = self._known(self.encode_train(train))

    def _predicted(self, read: Callable[[str], list[Row]]) -> Sequence[Row]:
        """The rows to be predicted, whose labels or answers may be missing: the test rows, or all rows of a file."""
        if is_file(self.source):
            return let_lack_targets(read("train"))
        if self._test_split:
            return let_lack_targets(read(self._test_split))
        rows = let_lack_targets(read("train"))
        return in_order_of(rows, self._drawn(rows)[2])

    def _drawn(self, rows: list[Row]) -> list[list[Row]]:
        """Splits the rows of the train split into training, validation and test rows."""
        sizes = {
            "train_size": self.train_size,
            "val_size": 0 if self._val_split else self.val_size or DRAWN_SHARE,
            "test_size": 0 if self._test_split else self.test_size or DRAWN_SHARE,
        }
        # One file, in a folder or alone, is stratified; other sources are drawn purely at random, as in earlier releases.
        is_alone = not any(has_split(self.source, split) for split in ("validation", "test"))
        groups = [self.group(row) for row in rows] if is_alone else None
        where = self.source if is_file(self.source) else f"{self.source}, train"
        parts = draw_parts(rows, sizes, self.split_seed, where, groups)
        if is_alone:
            counts = [len(part) for part in parts]
            log.info("%s: %d rows for training, %d for validation and %d for test, by data.split_seed", where, *counts)
        return parts

    def _known(self, encoded: Sequence[Any]) -> Sequence[Any]:
        if not encoded:
            raise UserError(f"data.source: expected rows of at least two tokens, received none in {self.source!r}")
        return encoded

    @property
    def target_field(self) -> str | None:
        """The field with a row's target, a label or an answer; None: the row as a whole."""
        return None

    @property
    @override
    def can_be_tested(self) -> bool:
        if self._test_split is None:
            return True
        row = first_row(self.source, self._test_split, self.subset)
        return row is not None and self.has_target(let_lack_targets([row])[0])

    def has_target(self, row: Row) -> bool:
        """Whether a row that may lack its target has one."""
        return self.target_field is None or row.has_target(self.target_field)

    @property
    def needs_train_rows(self) -> bool:
        """Whether :meth:`look_at` is also called for other stages than fit."""
        return False

    def look_at(self, rows: list[Row]) -> None:
        """Inspects all rows of the train split, before any is drawn or encoded: for their labels."""

    def group(self, row: Row) -> Hashable:
        """The group, such as the label, of which each part of a split file has the same share."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Sequence[Any]:
        """Encodes rows for ``collate``."""

    def encode_train(self, rows: Sequence[Row]) -> Sequence[Any]:
        """Encodes training rows."""
        return self.encode(rows)

    def encode_predicted(self, rows: Sequence[Row]) -> Sequence[Any]:
        """Encodes rows to be predicted, none of which may be omitted: a prediction's index is its row's."""
        return self.encode(rows)


class TextDataModule(SourceDataModule):
    """Text (``text``), instructions (``prompt``, ``response``) or conversations (``messages``) with the language-model loss.

    The loss is on all tokens of a text, on the response alone, or on the assistant's turns of a conversation, each with its
    end-of-text token. Instructions are formatted by the tokenizer's chat template if it has one, as a user's turn and the
    assistant's; without one, the response directly follows its prompt. A text longer than ``max_length`` is split into several
    rows; a prompt or a conversation is truncated on the left.

    Predict generates: the response to a ``prompt`` (the row's ``response`` is the target), the assistant's answer to the last
    turn of a conversation (if the assistant has the last turn, it is the target), or the continuation of a text.

    Args:
        source: a file, a folder of ``train.jsonl`` and so on, or the id of a data set on the hub: see ``SourceDataModule``.
        subset: name of a configuration of a data set on the hub.
        chat_template: whether to format instructions and conversations by the tokenizer's chat template; ``null``: if it has
            one. ``false``: a response directly follows its prompt.
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
        max_length: int = 1024,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, max_length=max_length, **rows)
        self.chat_template = chat_template
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
        return {"kind": "text" if is_text else "response", "chat_template": not is_text and self.applies_chat_template}

    @override
    def has_target(self, row: Row) -> bool:
        if "messages" in row:
            return row.messages("messages")[-1]["role"] == "assistant"
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
            conversations = [row.messages("messages") for row in rows]
            return [[row] for row in encode_conversations(self.tokenizer, conversations, self.max_length, places)]
        pairs = [(row.text("prompt"), row.answer("response")) for row in rows]
        if not self.applies_chat_template:
            return [[row] for row in encode_responses(self.tokenizer, pairs, self.max_length, places)]
        for (_, response), place in zip(pairs, places, strict=True):
            if not response:
                raise UserError(f"{place}: expected a response that adds tokens to its prompt, received {response!r}")
        turns = [[*user_turn(prompt), assistant_turn(response)] for prompt, response in pairs]
        return [[row] for row in encode_conversations(self.tokenizer, turns, self.max_length, places, keeps_response=True)]

    def _encode_prompts(self, kind: str, rows: Sequence[Row]) -> list[list[PromptRow]]:
        """Encodes rows of one kind as prompts for generation."""
        prompts = [_prompt_and_response(kind, row) for row in rows]
        is_chat = kind == "messages" or (kind == "prompt" and self.applies_chat_template)
        if is_chat:
            turns = [prompt if kind == "messages" else user_turn(prompt) for prompt, _ in prompts]
            texts = [as_prompt(self.tokenizer, some, row.place) for some, row in zip(turns, rows, strict=True)]
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
        ends = end_of_turn(self.tokenizer) if self.prompt_format["chat_template"] else []
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
    return before, last["content"].strip()
