"""Data for language models: what its data modules share, and plain text or instructions with a language-model loss."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

from typing_extensions import override

from cola_lightning.data.base import EpochDataModule, check_sizes
from cola_lightning.data.batches import collate_language
from cola_lightning.data.chat import encode_conversations
from cola_lightning.data.encoding import LanguageRow, encode_responses, encode_texts
from cola_lightning.data.rows import Row, check_subset, draw, fill_cache, read_rows
from cola_lightning.errors import UserError


class TokenizedDataModule(EpochDataModule):
    """Rows that the module's tokenizer makes into tokens.

    Args:
        batch_size: rows in a training batch.
        eval_batch_size: rows in a batch of validation, test and predict; None: as in training.
        max_length: of a sequence, in tokens; the model's own limit holds too.
        split_seed: which rows are in which part.
        num_workers: processes that prepare batches beside the training; 0: none.
        length_grouped: training batches of rows of like length, so that little is padding; their order is by chance.
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

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the module that is trained."""
        module = self.trainer and self.trainer.lightning_module
        if "tokenizer" not in dir(module):  # not getattr: what a property of that name raises is to be seen
            raise UserError(f"model: expected a module with a tokenizer, received {type(module).__name__}")
        return cast(Any, module).tokenizer

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: what was asked for, or what the model can take."""
        return int(min(self._max_length, self.tokenizer.model_max_length))


class SourceDataModule(TokenizedDataModule):
    """Rows of a data set, in the splits that it has, from a folder or from the hub.

    Args:
        source: a folder of ``train.jsonl`` and so on, one JSON object a line, or the id of a data set on the hub.
        subset: on the hub, the name of a configuration.
        batch_size: rows in a training batch.
        eval_batch_size: rows in a batch of validation, test and predict; None: as in training.
        max_length: of a sequence, in tokens; the model's own limit holds too.
        train_size: rows of training, drawn by ``split_seed``; None: all.
        val_size: rows of validation, drawn together with those of training from the train split; None: the validation split.
        test_split: the split that test and predict read.
        split_seed: which rows are drawn.
        num_workers: processes that prepare batches beside the training; 0: none.
        length_grouped: training batches of rows of like length, so that little is padding; their order is by chance.
    """

    def __init__(
        self,
        source: str,
        subset: str | None = None,
        *,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        train_size: int | None = None,
        val_size: int | None = None,
        test_split: str = "validation",
        split_seed: int = 0,
        num_workers: int = 0,
        length_grouped: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, max_length, split_seed, num_workers, length_grouped)
        check_sizes(train_size=train_size, val_size=val_size)
        check_subset(source, subset)
        self.source, self.subset, self.test_split = source, subset, test_split
        self.train_size, self.val_size = train_size, val_size

    @override
    def prepare_data(self) -> None:
        own = ["validation"] if self.val_size is None else []
        fill_cache(self.source, self.subset, {"train", *own, self.test_split})

    @override
    def setup(self, stage: str) -> None:
        if stage in ("test", "predict"):
            rows = read_rows(self.source, self.test_split, self.subset)
            self.test = self._known(self.encode(rows) if stage == "test" else self.encode_predicted(rows))
            return
        rows = read_rows(self.source, "train", self.subset) if stage == "fit" or self.val_size else []
        if self.val_size is None:
            val = read_rows(self.source, "validation", self.subset)
            train = rows
            if self.train_size and rows:
                (train,) = draw(rows, [self.train_size], self.split_seed, f"data.train_size, of {self.source}, train")
        else:
            sizes = [self.train_size or max(len(rows) - self.val_size, 1), self.val_size]
            train, val = draw(rows, sizes, self.split_seed, f"data.train_size + data.val_size, of {self.source}, train")
        self.val = self._known(self.encode(val))
        if stage == "fit":
            self.train = self._known(self.encode_train(train))

    def _known(self, encoded: Sequence[Any]) -> Sequence[Any]:
        if not encoded:
            raise UserError(f"data.source: expected rows of at least two tokens, received none in {self.source!r}")
        return encoded

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Sequence[Any]:
        """Makes rows into what ``collate`` takes."""

    def encode_train(self, rows: Sequence[Row]) -> Sequence[Any]:
        """The same, of rows to be trained on."""
        return self.encode(rows)

    def encode_predicted(self, rows: Sequence[Row]) -> Sequence[Any]:
        """The same, of rows to be predicted, none of which may be left out: the place of a prediction is that of its row."""
        return self.encode(rows)


class TextDataModule(SourceDataModule):
    """Text (``text``), instructions (``prompt``, ``response``) or conversations (``messages``) with the language-model loss.

    The loss is on all tokens of a text, on those of the response alone, which follows its prompt as it stands, or on what the
    assistant says in a conversation, in the tokenizer's chat template; an end-of-text token is learned too. A text beyond
    ``max_length`` becomes several rows; a prompt, and a conversation, loses its beginning.

    Raises:
        UserError: for files, rows and sizes that cannot be.
    """

    @override
    def encode(self, rows: Sequence[Row]) -> list[LanguageRow]:
        kinds = [_kind(row) for row in rows]
        alike = {kind: [row for row, of in zip(rows, kinds, strict=True) if of == kind] for kind in dict.fromkeys(kinds)}
        encoded = {kind: iter(self._encode(kind, some)) for kind, some in alike.items()}
        return [piece for kind in kinds for piece in next(encoded[kind])]

    def _encode(self, kind: str, rows: Sequence[Row]) -> list[list[LanguageRow]]:
        """Rows of one kind, all at once; a text may become several."""
        if kind == "text":
            return encode_texts(self.tokenizer, [row.text("text") for row in rows], self.max_length)
        places = [row.place for row in rows]
        if kind == "messages":
            conversations = [row.messages("messages") for row in rows]
            return [[row] for row in encode_conversations(self.tokenizer, conversations, self.max_length, places)]
        pairs = [(row.text("prompt"), row.text("response")) for row in rows]
        return [[row] for row in encode_responses(self.tokenizer, pairs, self.max_length, places)]

    @override
    def length(self, row: LanguageRow) -> int:
        return len(row["input_ids"])

    @override
    def collate(self, rows: list[LanguageRow]) -> dict[str, Any]:
        return collate_language(rows, self.tokenizer.pad_token_id)


def _kind(row: Row) -> str:
    """What a row holds: ``text``, ``messages``, or ``prompt`` with its response."""
    kinds = row.keys() & {"text", "prompt", "response", "messages"}
    if kinds in ({"text"}, {"messages"}):
        return next(iter(kinds))
    if kinds and kinds <= {"prompt", "response"}:
        return "prompt"
    fields = ", ".join(map(repr, row)) or "no field"
    raise UserError(f"{row.place}: expected 'text', 'messages', or 'prompt' and 'response', received {fields}")
