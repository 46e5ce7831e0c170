"""Prompted classification: a prompt for each row, and options to choose from."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import override

from cola_lightning.data.base import check_shares
from cola_lightning.data.batches import collate_options
from cola_lightning.data.examples import EncodedExample, Example, encode_examples
from cola_lightning.data.row import Row
from cola_lightning.data.rows import Rows, SkippedRows, check_source, draw_parts, identity_of_source, is_file, load_splits
from cola_lightning.data.source import DRAWN_SHARE, TokenizedDataModule
from cola_lightning.data.tasks import Loss, find_task, template_of
from cola_lightning.errors import UnusableRow, UserError

DATA_DIR = "COLA_DATA_DIR"  # the environment variable that names a folder with one folder per task


class OptionBatches(TokenizedDataModule):
    """Base class of data modules whose rows are examples.

    Attributes:
        loss: over all ``options``, or the language-model loss on the right ``answer`` only.
        metric: the metric; None: accuracy of options, F1 and exact match of generated answers.
        apply_chat_template: whether prompts are a user's turn in the tokenizer's chat template.
    """

    loss: Loss = "options"
    metric: str | None = None
    apply_chat_template = False

    @property
    @override
    def prompt_format(self) -> dict[str, Any]:
        rows = getattr(self, "val", None) or getattr(self, "test", None)
        examples = [row.example for row in rows or [] if isinstance(row, EncodedExample)]
        if not examples:
            return {}
        kind = "answer" if examples[0].references else "options"
        prompt, options = self.templates()
        if kind == "options" and options is None and all(example.options == examples[0].options for example in examples):
            options = [option.replace("{", "{{").replace("}", "}}") for option in examples[0].options]
        known = {"prompt": prompt} | ({"options": options} if kind == "options" else {})
        return {"kind": kind, "chat_template": self.apply_chat_template} | known

    def templates(self) -> tuple[str | None, list[str] | str | None]:
        """The prompt, and the options (or the name of the field that lists them), with a row's fields in braces.

        None for what is not made from a template.
        """
        return None, None

    def encode_examples(self, examples: Sequence[Example], skipped: SkippedRows | None = None) -> list[EncodedExample]:
        """Encodes examples; ``skipped`` records those that cannot be encoded, without it the first one is an error."""
        return encode_examples(self.tokenizer, examples, self.max_length, is_chat=self.apply_chat_template, skipped=skipped)

    def encode_learned(self, examples: Sequence[Example], skipped: SkippedRows | None = None) -> list[EncodedExample]:
        """Encodes training examples: only what their loss needs."""
        return encode_examples(
            self.tokenizer,
            examples,
            self.max_length,
            is_chat=self.apply_chat_template,
            is_learned=self.loss == "answer",
            skipped=skipped,
        )

    def encode_rows(self, rows: Sequence[Row], example: Callable[[Row], Example], *, is_learned: bool) -> list[EncodedExample]:
        """Converts rows to examples and encodes them; a few unusable rows are omitted.

        Args:
            rows: the rows of a part.
            example: makes an example of a row.
            is_learned: whether they are training rows.

        Raises:
            UserError: if more than one row in a hundred cannot be used.
        """
        skipped, examples = SkippedRows(), []
        for row in rows:
            with skipped.if_unusable():
                examples.append(example(row))
        encoded = (self.encode_learned if is_learned else self.encode_examples)(examples, skipped)
        skipped.check(len(rows))
        return encoded

    @override
    def length(self, row: EncodedExample) -> int:
        return len(row)

    @override
    def collate(self, rows: list[EncodedExample]) -> dict[str, Any]:
        return collate_options(rows, self.tokenizer.pad_token_id, self.loss, self.metric)


class OptionDataModule(OptionBatches):
    """Examples with options: a subclass' ``setup`` makes ``self.train``, ``self.val`` and ``self.test`` with :meth:`encode`.

    Args:
        batch_size: rows per training batch.
        eval_batch_size: rows per batch in validation, test and predict; ``null``: as in training.
        max_length: maximum length of prompt and option, in tokens; the model's own limit also applies. A longer prompt is
            truncated on the left.
        split_seed: seed of the training order, together with the module's seed.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.
        length_grouped: group rows of similar length into training batches, to reduce padding, and shuffle the batches;
            ``false``: shuffle the rows.
    """

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Encodes examples."""
        return self.encode_examples(examples)


class PromptDataModule(OptionDataModule):
    """One of the paper's tasks, with the prompts and splits of its protocol.

    Training and validation are drawn together from the train split, test from the validation split; all three from the rows of
    a single file. Unusable rows (ReCoRD has duplicate entities), up to one in a hundred of each part, are omitted with a
    warning, except in predictions on a file, whose indices are those of the rows.

    Args:
        task: SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, COPA, ReCoRD, SQuAD or DROP, or one added to
            ``cola_lightning.data.tasks.TASKS``.
        source: a folder of ``train.jsonl`` and ``validation.jsonl`` in the hub's fields, a single file (``.csv``, ``.tsv``,
            ``.jsonl``, ``.json``, ``.parquet``; ``predict`` takes all of it), or the id of a data set on the hub. ``null``:
            the folder of the task's name in lower case in ``$COLA_DATA_DIR`` where that is set, else the hub.
        subset: name of a configuration of a data set on the hub, for a ``source`` of your own.
        revision: branch, tag or commit of a data set on the hub.
        apply_chat_template: format the prompt by the tokenizer's chat template, as a user's turn that the assistant's follows.
        max_length: maximum length of prompt and option, in tokens; the model's own limit also applies. A longer prompt is
            truncated on the left. If the answer is generated, 50 tokens are reserved for it, in training as well.
        train_size: number of training rows or, below 1, their share; ``null``: the protocol's (1000; CB 150, COPA 300),
            except for WSC. Of a file: all that remain.
        val_size: number or share of validation rows; ``null``: the protocol's (500; CB and COPA 100), except for WSC, which
            has 554 rows: the protocol's 500 for validation leave 54 for training; here it is 454 for training and 100 for
            validation. Of a file: a share of 0.1.
        test_size: number or share of rows for test and predict; ``null``: the protocol's (1000; CB 56, COPA 100, RTE 277,
            SST2 872, WIC 638, WSC 104). Of a file: a share of 0.1.
        **rows: the other arguments of ``TokenizedDataModule``: how rows are drawn and batched.

    Raises:
        UserError: for an unknown task, and for invalid files, rows and sizes.

    Source: Malladi et al. (arXiv 2305.17333) and its code, princeton-nlp/MeZO, large_models.
    """

    def __init__(
        self,
        task: str,
        source: str | None = None,
        subset: str | None = None,
        *,
        revision: str | None = None,
        apply_chat_template: bool = False,
        max_length: int = 2048,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        **rows: Any,
    ) -> None:
        super().__init__(max_length=max_length, **rows)
        check_shares(train_size=train_size, val_size=val_size, test_size=test_size)
        check_source(source, subset, revision)
        self.revision = revision
        self.task = find_task(task)
        self.loss, self.apply_chat_template = self.task.loss, apply_chat_template
        if source is None:
            folder = os.environ.get(DATA_DIR)
            source, subset = self.task.source, self.task.subset
            if folder:
                source, subset = str(Path(folder) / self.task.name.lower()), None
                if not Path(source).is_dir():
                    raise UserError(
                        f"{DATA_DIR}: expected a folder that holds one named {self.task.name.lower()}, received {folder!r}"
                    )
        self.source, self.subset = source, subset
        usual = (None, DRAWN_SHARE, DRAWN_SHARE) if is_file(source) else self.task.sizes
        sizes = zip((train_size, val_size, test_size), usual, strict=True)
        self.train_size, self.val_size, self.test_size = (own if size is None else size for size, own in sizes)
        self._template: str | None = None

    @override
    def templates(self) -> tuple[str | None, list[str] | str | None]:
        return self._template, None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """See ``EpochDataModule.identity``; the hash of a file is computed once."""
        return identity_of_source(self.source, self.subset, self.revision)

    @override
    def prepare_data(self) -> None:
        self._load()  # once, before all processes do

    def _load(self) -> Mapping[str, Rows]:
        return load_splits(self.source, self.subset, self.revision)

    @override
    def setup(self, stage: str) -> None:
        splits, is_alone = self._load(), is_file(self.source)
        for split in ("train",) if is_alone or stage in ("fit", "validate") else ("validation",):
            if split not in splits:
                raise UserError(f"data.source: expected a split {split} in {self.source!r}, received {', '.join(splits)}")
        if stage == "predict" and is_alone:
            self.test = self.encode_examples([self.task.example(row) for row in splits["train"].lacking_targets()])
            return
        sizes = {"train_size": self.train_size, "val_size": self.val_size}
        if is_alone:
            train, val, test = self._draw(splits["train"], **sizes, test_size=self.test_size)
        elif stage in ("fit", "validate"):
            train, val = self._draw(splits["train"], **sizes)
        else:
            rows = splits["validation"]
            (test,) = self._draw(rows.lacking_targets() if stage == "predict" else rows, test_size=self.test_size)
        if stage in ("test", "predict"):
            test = test.sorted() if stage == "predict" else test
            self.test = self.encode_rows(test, self.task.example, is_learned=False)
            return
        self.val = self.encode_rows(val, self.task.example, is_learned=False)
        if stage == "fit":
            self.train = self.encode_rows(train, self.task.example, is_learned=True)

    def _draw(self, rows: Rows, **sizes: float | None) -> list[Rows]:
        for row in rows[:1]:  # a missing field is not one row's error: it is reported for the first
            with suppress(UnusableRow):
                self.task.example(row)
            self._template = template_of(self.task, row)
        return draw_parts(rows, sizes, self.split_seed, rows.place)
