"""From rows to examples: what a preprocessor for a kind of row is, and how its examples are made once, and cached.

A row's way from ``--data.source`` to a batch::

    SourceDataModule.setup(stage)                 source.py
    ├─ parts(stage)                               which rows are for training, validation, test or prediction
    │  ├─ load(source)                            reading.py; folders of pictures: images.py
    │  └─ drawn(rows, sizes, seed)                split.py
    ├─ preprocessor_of(rows, part)                text.py, preferences.py, ...: the kind of row, by its columns (columns.py)
    └─ prepare(rows, preprocessor)                here: Dataset.map, which caches its result
       ├─ Preprocessor.read(row)                  its fields: forms.py, labels.py
       └─ Preprocessor.encode(items)              tokens: render.py
    SourceDataModule.train_dataloader()           base.py
    └─ SeededBatches.__getitems__(places)         examples in the order of the seed and the epoch
       └─ Preprocessor.collate(examples)          a batch

A new kind of row is a file with its preprocessor and its data module, and a line in ``__init__.py``.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import override

from cola_lightning.data.reading import hashes_of_code
from cola_lightning.data.report import RowReport
from cola_lightning.data.rows import Row, Rows, each, together
from cola_lightning.errors import UnusableRow

ENCODED_TOGETHER = 1_000  # rows


class Size(NamedTuple):
    """How many tokens of a row an example has.

    Attributes:
        n_tokens: those that are used.
        n_lost: those that were too many.
        n_trained: those with a loss; 0 if tokens have none.
    """

    n_tokens: int
    n_lost: int = 0
    n_trained: int = 0


class Preprocessor(ABC):
    """What one kind of row needs: it makes examples of rows, or says why it cannot, and a batch of examples.

    A subclass is a frozen dataclass. Its fields are what it needs to know: columns, limits, the tokenizer. The representation
    of the dataclass identifies the examples in the cache, so a field that does not change them has ``repr=False``.

    Attributes:
        features: the types of an example's fields, ``int32``, or ``[int32]`` for a list: examples are dicts, and stored in
            Arrow. None: examples are objects, and stay in memory.
        prompt_format: see :attr:`~cola_lightning.EpochDataModule.prompt_format`.
    """

    features: Mapping[str, Any] | None = None
    prompt_format: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def read(self, row: Row) -> Any:
        """What examples are made of, from the fields of a row.

        Raises:
            UnusableRow: if it has none.
        """

    @abstractmethod
    def encode(self, items: Sequence[Any], notes: set[str]) -> Sequence[list[Any] | UnusableRow]:
        """The examples of each row, or the reason why it has none.

        Args:
            items: what :meth:`read` returned for the rows, all together, because tokenizers are then faster.
            notes: lines for the log are added to it.
        """

    def examples(self, rows: Iterable[Row], notes: set[str]) -> list[list[Any] | UnusableRow]:
        """The examples of each row, or the reason why it has none; see :meth:`encode`."""
        return together(lambda items: self.encode(items, notes) if items else [], each(self.read, rows))

    @abstractmethod
    def size(self, example: Any) -> Size:
        """The tokens of an example."""

    @abstractmethod
    def collate(self, examples: list[Any]) -> Any:
        """A batch."""

    def identity(self, rows: Rows) -> str | None:
        """What examples depend on besides the rows' fields; None: that is not known, and they are not cached."""
        is_ours = type(self).__module__.startswith("cola_lightning.")  # code of another's may change unseen
        return f"{hashes_of_code()} {self!r}" if is_ours else None

    def completed(self, examples: Any, rows: Rows, report: RowReport) -> Any:
        """The stored examples with what a batch reads from the rows themselves, such as their pictures."""
        return examples


@dataclass(frozen=True)
class TokenPreprocessor(Preprocessor):
    """A preprocessor with a tokenizer.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        max_length: of an example, in tokens.
    """

    tokenizer: Any = field(repr=False)
    max_length: int

    @override
    def size(self, example: Any) -> Size:
        return Size(len(example["input_ids"]), example.get("lost", 0))

    @override
    def identity(self, rows: Rows) -> str | None:
        known, tokenizer = super().identity(rows), identity_of_tokenizer(self.tokenizer)
        return f"{known} {tokenizer}" if known and tokenizer else None


def prepare(rows: Rows, preprocessor: Preprocessor, num_proc: int | None = None) -> tuple[Any, RowReport]:
    """The examples of rows, and a report on the rows.

    Args:
        rows: the rows.
        preprocessor: that of their kind.
        num_proc: processes that make examples for Arrow; None: this one.

    Returns:
        A ``datasets.Dataset``, memory-mapped and cached, with a column ``length`` besides the preprocessor's; or a list. The
        report is stored with the examples, so that a start from the cache says the same.
    """
    if preprocessor.features is None:
        return _in_memory(rows, preprocessor)
    data = _mapped(rows, preprocessor, preprocessor.features, num_proc)
    meta = data.select_columns(["row", "reason"]).with_format("arrow")[:]
    lengths, lost, trained = (data.with_format("numpy")[name][:] for name in ("length", "lost", "trained"))
    report = RowReport(len(rows), int((lost > 0).sum()), int(lost.sum()), int(lengths.sum()), int(trained.sum()))
    report.notes = {*data.with_format("arrow")["notes"][:].combine_chunks().flatten().to_pylist()}
    if meta["reason"].null_count < len(meta):
        skipped = meta.filter(meta["reason"].is_valid())
        for place, reason in zip(*(skipped[name].to_pylist() for name in ("row", "reason")), strict=True):
            report.skip(reason, rows.place_of(place), place)
        data = data.select(np.flatnonzero(meta["reason"].is_null()))
    data = data.remove_columns(["row", "lost", "trained", "reason", "notes"])
    return preprocessor.completed(data, rows, report), report


def _in_memory(rows: Rows, preprocessor: Preprocessor) -> tuple[list[Any], RowReport]:
    examples, report = list[Any](), RowReport(len(rows))
    for start in range(0, len(rows), ENCODED_TOGETHER):
        some = list(rows[start : start + ENCODED_TOGETHER])
        for place, (row, outcome) in enumerate(zip(some, preprocessor.examples(some, report.notes), strict=True), start):
            if isinstance(outcome, UnusableRow):
                report.skip(str(outcome), row.place, place)
            else:
                examples += outcome
    sizes = [preprocessor.size(example) for example in examples]
    report.n_shortened, report.n_lost = sum(size.n_lost > 0 for size in sizes), sum(size.n_lost for size in sizes)
    report.n_tokens, report.n_trained = sum(size.n_tokens for size in sizes), sum(size.n_trained for size in sizes)
    return examples, report


def _mapped(rows: Rows, preprocessor: Preprocessor, features: Mapping[str, Any], num_proc: int | None) -> Any:
    """The examples in Arrow; a row that cannot be used has one without values, with the reason."""
    import datasets
    from datasets.fingerprint import get_temporary_cache_files_directory

    stored = {
        **features,
        **dict.fromkeys(("row", "length", "lost", "trained"), "int32"),
        "reason": "string",
        "notes": ["string"],
    }

    def examples_of(columns: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
        fields = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        notes, examples = set[str](), list[dict[str, Any]]()
        for place, outcome in zip(places, preprocessor.examples(map(rows.row, fields, places), notes), strict=True):
            if isinstance(outcome, UnusableRow):
                examples.append({"row": place, "length": 0, "lost": 0, "trained": 0, "reason": str(outcome)})
                continue
            for example in outcome:
                n_tokens, n_lost, n_trained = preprocessor.size(example)
                examples.append({**example, "row": place, "length": n_tokens, "lost": n_lost, "trained": n_trained})
        examples[0]["notes"] = sorted(notes)  # each row has at least one
        return {name: [example.get(name) for example in examples] for name in stored}

    paths = [file["filename"] for file in rows.data.cache_files]
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    identity = preprocessor.identity(rows)
    known = repr((identity or os.urandom(16), sorted(stored.items()), files)).encode()
    fingerprint = hashlib.sha256(known + rows.numbers.tobytes()).hexdigest()[:32]
    file = None if identity else f"{get_temporary_cache_files_directory()}/{fingerprint}.arrow"  # deleted at the end
    return rows.data.map(
        examples_of,
        batched=True,
        with_indices=True,
        new_fingerprint=fingerprint,
        cache_file_name=file,
        num_proc=num_proc,
        desc=f"{rows.place}: preparing rows",
        remove_columns=rows.columns,
        features=datasets.Features({name: _feature(kind) for name, kind in stored.items()}),
    )


def identity_of_tokenizer(tokenizer: Any) -> str | None:
    """A hash of what determines its tokens and chat template; None for a tokenizer with custom code, which may change."""
    import tokenizers
    import transformers

    kind = type(tokenizer)
    if not tokenizer.is_fast or kind.__module__.partition(".")[0] != "transformers":
        return None
    identity = transformers.__version__, tokenizers.__version__, kind.__module__, kind.__qualname__
    # The backend's serialisation omits split_special_tokens.
    settings = tokenizer.split_special_tokens, tokenizer.special_tokens_map, tokenizer.chat_template
    return hashlib.sha256(repr((identity, settings, tokenizer.backend_tokenizer.to_str())).encode()).hexdigest()


def _feature(kind: Any) -> Any:
    """A type as ``datasets`` has it."""
    import datasets

    if isinstance(kind, Mapping):
        return {name: _feature(inner) for name, inner in kind.items()}
    return datasets.List(_feature(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
