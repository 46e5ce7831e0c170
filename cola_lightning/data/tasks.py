"""Prompted tasks: the paper's eleven, with the prompts of its protocol word for word. CONTRIBUTING.md shows how to add one.

Source: Malladi et al. (arXiv 2305.17333), princeton-nlp/MeZO, large_models/templates.py and tasks.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cola_lightning.data.examples import Example, Loss, generated
from cola_lightning.data.rows import Row
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
    return Example(prompt, options, row.label("label", len(options)), row.place)


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
    is_true = row.label("answer" if "answer" in row else "label", 2)  # the hub's form, and SuperGLUE's
    return Example(prompt, ("Yes", "No"), None if is_true is None else 1 - is_true, row.place)


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
    answers = row.texts("answers") if row.has_target("answers") else ()
    if not set(answers) <= set(entities):
        raise UnusableRow("an answer is none of the entities")
    options = tuple(f" {query.replace('@placeholder', entity)}" for entity in entities)
    accepted = tuple(entities.index(answer) for answer in answers)
    prompt = row.text("passage").replace("@highlight\n", "- ") + "\n-"
    return Example(prompt, options, accepted[0] if accepted else None, row.place, accepted=accepted)


def _squad(row: Row) -> Example:
    question = row.text("question").strip()
    prompt = f"Title: {row.text('title')}\nContext: {row.text('context')}\nQuestion: {question}\nAnswer:"
    return generated(row, prompt, row.inner("answers").texts("text") if row.has_target("answers.text") else ())


def _drop(row: Row) -> Example:
    prompt = f"Passage: {row.text('passage')}\nQuestion: {row.text('question').strip()}\nAnswer:"
    answers = row.inner("answers_spans").texts("spans") if row.has_target("answers_spans.spans") else ()
    return generated(row, prompt, answers)


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
    raise UserError(f"data.task: expected {', '.join(TASKS)}, received {name!r}{nearest(name, TASKS)}")
