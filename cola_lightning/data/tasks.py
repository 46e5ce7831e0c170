"""The paper's tasks as data, with the prompts of its protocol word for word. CONTRIBUTING.md shows how to add a task.

Source: Malladi et al. (arXiv 2305.17333), princeton-nlp/MeZO, large_models/templates.py and tasks.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from cola_lightning.data.examples import Example, Loss, OptionRows, generated
from cola_lightning.data.labels import label_index, read_answers
from cola_lightning.data.reading import is_file
from cola_lightning.data.rows import Row, Rows
from cola_lightning.data.tokenized import TokenizedDataModule
from cola_lightning.errors import UnusableRow, UserError, nearest


@dataclass(frozen=True)
class Task:
    """A prompted task.

    Attributes:
        name: the protocol's name.
        source: id of the data set on the hub.
        subset: its configuration there.
        example: makes a row's prompt, with options to choose from, or the text to be generated.
        sizes: rows for training, validation and test: the protocol's, except for WSC.
        loss: over all ``options``, or the language-model loss on the right ``answer`` only.
    """

    name: str
    source: str
    subset: str | None
    example: Callable[[Row], Example]
    sizes: tuple[int, int, int]
    loss: Loss = "options"


def labelled(row: Row, prompt: str, *options: str) -> Example:
    """A prompt with fixed options, in the order of the labels."""
    return Example(prompt, options, label_index(row, "label", len(options)))


def _sst2(row: Row) -> Example:
    return labelled(row, f"{row.text('sentence').strip()} It was", " terrible", " great")


def _rte(row: Row) -> Example:
    prompt = f'{row.text("premise")}\nDoes this mean that "{row.text("hypothesis")}" is true? Yes or No?\n'
    return labelled(row, prompt, "Yes", "No")


def _cb(row: Row) -> Example:
    prompt = f'Suppose {row.text("premise")} Can we infer that "{row.text("hypothesis")}"? Yes, No, or Maybe?\n'
    return labelled(row, prompt, "Yes", "No", "Maybe")


def _boolq(row: Row) -> Example:
    question = row.text("question")
    question = question if question.endswith("?") else f"{question}?"
    prompt = f"{row.text('passage')} {question[:1].upper()}{question[1:]}\n"
    is_true = label_index(row, "answer" if "answer" in row else "label", 2)  # the hub's form, and SuperGLUE's
    return Example(prompt, ("Yes", "No"), None if is_true is None else 1 - is_true)


def _wsc(row: Row) -> Example:
    pronoun, name = row.text("span2_text").lower(), row.text("span1_text")
    question = f'In the previous sentence, does the pronoun "{pronoun}" refer to {name}? Yes or No?'
    return labelled(row, f"{row.text('text')}\n{question}\n", "No", "Yes")


def _wic(row: Row) -> Example:
    question = f'Does the word "{row.text("word")}" have the same meaning in these two sentences? Yes, No?'
    return labelled(row, f"{question}\n{row.text('sentence1')}\n{row.text('sentence2')}\n", "No", "Yes")


def _multirc(row: Row) -> Example:
    question = f'Question: {row.text("question")}\nI found this answer "{row.text("answer")}". Is that correct? Yes or No?'
    return labelled(row, f"{row.text('paragraph')}\n{question}\n", "No", "Yes")


def _copa(row: Row) -> Example:
    conjunctions = {"effect": " so ", "cause": " because "}
    if (question := row.text("question")) not in conjunctions:
        raise row.refused("question", "cause or effect")
    premise = row.text("premise").rstrip().removesuffix(".")
    return labelled(row, premise + conjunctions[question], *(_uncapitalised(row.text(f"choice{k}")) for k in (1, 2)))


def _uncapitalised(sentence: str) -> str:
    word, blank, rest = sentence.partition(" ")
    return (word if word == "I" else word.lower()) + blank + rest


def _record(row: Row) -> Example:
    entities, query = row.texts("entities"), row.text("query")
    answers = read_answers(row, "answers") or ()
    if not set(answers) <= set(entities) and not row.may_lack_target:
        raise UnusableRow("an answer is none of the entities")
    options = tuple(f" {query.replace('@placeholder', entity)}" for entity in entities)
    accepted = tuple(entities.index(answer) for answer in answers if answer in entities)
    prompt = row.text("passage").replace("@highlight\n", "- ") + "\n-"
    return Example(prompt, options, accepted[0] if accepted else None, accepted=accepted)


def _squad(row: Row) -> Example:
    question = row.text("question").strip()
    prompt = f"Title: {row.text('title')}\nContext: {row.text('context')}\nQuestion: {question}\nAnswer:"
    return generated(prompt, read_answers(row, "answers.text") or ())


def _drop(row: Row) -> Example:
    prompt = f"Passage: {row.text('passage')}\nQuestion: {row.text('question').strip()}\nAnswer:"
    return generated(prompt, read_answers(row, "answers_spans.spans") or ())


_superglue = partial(Task, source="aps/super_glue")

TASKS = {
    task.name: task
    for task in (
        Task("SST2", "nyu-mll/glue", "sst2", _sst2, (1000, 500, 872)),
        _superglue("RTE", subset="rte", example=_rte, sizes=(1000, 500, 277)),
        _superglue("CB", subset="cb", example=_cb, sizes=(150, 100, 56)),
        Task("BoolQ", "google/boolq", None, _boolq, (1000, 500, 1000)),
        _superglue("WSC", subset="wsc.fixed", example=_wsc, sizes=(454, 100, 104)),  # the protocol's: 54, 500, 104
        _superglue("WIC", subset="wic", example=_wic, sizes=(1000, 500, 638)),
        _superglue("MultiRC", subset="multirc", example=_multirc, sizes=(1000, 500, 1000)),
        _superglue("COPA", subset="copa", example=_copa, sizes=(300, 100, 100), loss="answer"),
        _superglue("ReCoRD", subset="record", example=_record, sizes=(1000, 500, 1000), loss="answer"),
        Task("SQuAD", "rajpurkar/squad", None, _squad, (1000, 500, 1000), "answer"),
        Task("DROP", "ucinlp/drop", None, _drop, (1000, 500, 1000), "answer"),
    )
}


def find_task(name: str) -> Task:
    """The task of that name, case-insensitive.

    Raises:
        UserError: if there is none; it suggests the nearest name.

    Example:
        >>> find_task("sst2").sizes
        (1000, 500, 872)
    """
    for known, task in TASKS.items():
        if known.lower() == name.lower():
            return task
    raise UserError(f"data.task: there is no task {name!r}{nearest(name, TASKS)}")


class PromptDataModule(TokenizedDataModule):
    """One of the paper's tasks, with the prompts and splits of its protocol.

    Training and validation are drawn together from the train split, test from the validation split; all of them from the rows
    of a single file. Rows that cannot be used (ReCoRD has rows with equal options) are skipped and counted.

    Args:
        task: Name of the task: SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, COPA, ReCoRD, SQuAD or DROP, or one added to
            ``cola_lightning.data.tasks.TASKS``.
        source: A folder of ``train.jsonl`` and ``validation.jsonl`` in the hub's fields, a single file (``.csv``, ``.tsv``,
            ``.jsonl``, ``.json``, ``.parquet``; ``predict`` uses all of it), or the id of a data set on the hub. ``null`` uses
            the folder ``$COLA_DATA_DIR/rte`` and so on if the variable is set, otherwise the hub.
        subset: Name of a configuration of a data set on the hub, for a ``source`` of your own.
        val_split: Name of the validation split. ``null`` draws validation rows from the train split, as in the protocol.
        test_split: Name of the split that test and predict read. The default is the protocol's, because the hub's test splits
            have no labels. A single file does not use it.
        apply_chat_template: Format the prompt by the tokenizer's chat template, as a user turn.
        max_length: Maximum length of prompt and option, in tokens. The model's own limit also applies. A longer prompt loses
            its beginning. If the answer is generated, 50 tokens are reserved for it, in training as well.
        train_size: Number of training rows or, below 1, their share. ``null`` uses the protocol's (1000; CB 150, COPA 300; here
            WSC 454), or all that remain of a file.
        val_size: Number or share of validation rows. ``null`` uses the protocol's (500; CB and COPA 100), or 10 % of a file, at
            most 1,000 rows. WSC has 554 rows: the protocol's 500 for validation leave 54 for training, and here 100 validate.
        test_size: Number or share of rows for test and predict. ``null`` uses the protocol's (1000; CB 56, COPA 100, RTE 277,
            SST2 872, WIC 638, WSC 104), or none of a file.
        length_grouped: ``true`` puts rows of similar length into a training batch. ``false`` shuffles the rows, as in the
            protocol.
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
        length_grouped: bool = False,
        **rows: Any,
    ) -> None:
        self.task = find_task(task)
        if source is None and (folder := os.environ.get("COLA_DATA_DIR")):
            source = str(Path(folder, self.task.name.lower()))
        elif source is None:
            source, subset = self.task.source, self.task.subset
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
            text_unit="paragraph",  # a text alone is no row of a task
            num_proc=None,  # examples stay in memory
            **rows,
        )
        self.apply_chat_template = apply_chat_template

    @override
    def preprocessor_of(self, rows: Rows, part: str) -> OptionRows:
        return OptionRows(
            self.tokenizer,
            self.max_length,
            self.task.example,
            self.task.loss,
            is_chat=self.apply_chat_template,
            is_trained=part == "train",
            too_long=self.too_long,
        )
