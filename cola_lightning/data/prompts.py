"""The paper's tasks as data."""

import os
from pathlib import Path
from typing import Any

from typing_extensions import override

from cola_lightning.data.base import check_sizes
from cola_lightning.data.examples import EncodedExample, OptionBatches
from cola_lightning.data.rows import Rows
from cola_lightning.data.source import SourceDataModule
from cola_lightning.data.splits import is_file
from cola_lightning.data.tasks import find_task

DATA_DIR = "COLA_DATA_DIR"  # the environment variable that names a folder with one folder per task


class PromptDataModule(OptionBatches, SourceDataModule):
    """One of the paper's tasks, with the prompts and splits of its protocol.

    Training and validation are drawn together from the train split, test from the validation split; all of them from the rows
    of a single file. Rows that cannot be used (ReCoRD has rows with equal options) are skipped and counted, except in
    predictions on a file, whose indices are those of the rows.

    Args:
        task: SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, COPA, ReCoRD, SQuAD or DROP, or one added to
            ``cola_lightning.data.tasks.TASKS``.
        source: a folder of ``train.jsonl`` and ``validation.jsonl`` in the hub's fields, a single file (``.csv``, ``.tsv``,
            ``.jsonl``, ``.json``, ``.parquet``; ``predict`` takes all of it), or the id of a data set on the hub. ``null``:
            the folder of the task's name in lower case in ``$COLA_DATA_DIR`` where that is set, else the hub.
        subset: name of a configuration of a data set on the hub, for a ``source`` of your own.
        val_split: the validation split; ``null``: validation rows are drawn from the train split, as in the protocol.
        test_split: the split that test and predict read: the protocol's, because the hub's test splits have no labels. Not used
            for a single file.
        apply_chat_template: format the prompt by the tokenizer's chat template, as a user's turn that the assistant's follows.
        max_length: maximum length of prompt and option, in tokens; the model's own limit also applies. A longer prompt is
            truncated on the left. If the answer is generated, 50 tokens are reserved for it, in training as well.
        train_size: number of training rows or, below 1, their share; ``null``: the protocol's (1000; CB 150, COPA 300),
            except for WSC. Of a file: all that remain.
        val_size: number or share of validation rows; ``null``: the protocol's (500; CB and COPA 100), except for WSC, which
            has 554 rows: the protocol's 500 for validation leave 54 for training; here it is 454 for training and 100 for
            validation. Of a file: a share of 0.1, at most 1,000 rows.
        test_size: number or share of rows for test and predict; ``null``: the protocol's (1000; CB 56, COPA 100, RTE 277,
            SST2 872, WIC 638, WSC 104). Of a file: none.
        generate_rows: how many validation rows' answers a fit generates, drawn by ``split_seed``, with
            ``model.generate_in_validation``; ``null``: all.
        length_grouped: group rows of similar length into training batches; ``false``: shuffle the rows, as in the protocol.
        **rows: the other arguments of ``SourceDataModule``: how rows are split and batched.

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
        val_split: str | None = None,
        test_split: str | None = "validation",
        apply_chat_template: bool = False,
        max_length: int = 2048,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        generate_rows: int | None = None,
        length_grouped: bool = False,
        **rows: Any,
    ) -> None:
        self.task = find_task(task)
        if source is None:
            source, subset = self._usual_source()
        n_train, n_val, n_test = (None, None, None) if is_file(source) else self.task.sizes
        super().__init__(
            source,
            subset,
            val_split=val_split or (None if is_file(source) else rows.get("train_split", "train")),
            test_split=None if is_file(source) else test_split,
            max_length=max_length,
            train_size=n_train if train_size is None else train_size,
            val_size=n_val if val_size is None else val_size,
            test_size=n_test if test_size is None else test_size,
            length_grouped=length_grouped,
            **rows,
        )
        check_sizes(generate_rows=generate_rows)
        self.loss, self.apply_chat_template, self.generate_rows = self.task.loss, apply_chat_template, generate_rows

    def _usual_source(self) -> tuple[str, str | None]:
        name = self.task.name.lower()
        if not (folder := os.environ.get(DATA_DIR)):
            return self.task.source, self.task.subset
        return str(Path(folder) / name), None

    @property
    @override
    def predicts_all(self) -> bool:
        return is_file(self.sources[0].source)  # of ReCoRD's own test rows, some have equal options

    @override
    def encode(self, rows: Rows, part: str) -> list[EncodedExample]:
        return self.encode_rows(rows, self.task.example, part)
