"""Tasks as prompts with options to choose from, word for word those of the protocol that the paper follows.

Source: Malladi et al. (arXiv 2305.17333), princeton-nlp/MeZO, large_models/templates.py and tasks.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cola_lightning.data.rows import Row
from cola_lightning.errors import UserError, nearest


@dataclass(frozen=True)
class Task:
    """A prompted classification.

    Attributes:
        name: the protocol's.
        source: id of the data set on the hub.
        subset: its configuration there.
        prompt: makes a row's prompt; an option is appended to it.
        options: in the order of the labels.
        label: the place of a row's answer among the options.
        sizes: rows for training, validation and test.
    """

    name: str
    source: str
    subset: str | None
    prompt: Callable[[Row], str]
    options: tuple[str, ...]
    label: Callable[[Row], int]
    sizes: tuple[int, int, int]


def _label(n_labels: int) -> Callable[[Row], int]:
    return lambda row: row.label("label", n_labels)


def _boolq_prompt(row: Row) -> str:
    question = row.text("question")
    question = question if question.endswith("?") else f"{question}?"
    return f"{row.text('passage')} {question[:1].upper()}{question[1:]}\n"


def _boolq_label(row: Row) -> int:
    """0 (Yes) where the answer is true: ``answer`` on the hub, ``label`` in SuperGLUE's form."""
    return 1 - row.label("answer" if "answer" in row else "label", 2)


TASKS = {
    task.name: task
    for task in (
        Task(
            "SST2",
            "nyu-mll/glue",
            "sst2",
            lambda row: f"{row.text('sentence').strip()} It was",
            (" terrible", " great"),
            _label(2),
            (1000, 500, 872),
        ),
        Task(
            "RTE",
            "aps/super_glue",
            "rte",
            lambda row: f'{row.text("premise")}\nDoes this mean that "{row.text("hypothesis")}" is true? Yes or No?\n',
            ("Yes", "No"),
            _label(2),
            (1000, 500, 277),
        ),
        Task(
            "CB",
            "aps/super_glue",
            "cb",
            lambda row: f'Suppose {row.text("premise")} Can we infer that "{row.text("hypothesis")}"? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
            _label(3),
            (150, 100, 56),
        ),
        Task("BoolQ", "google/boolq", None, _boolq_prompt, ("Yes", "No"), _boolq_label, (1000, 500, 1000)),
    )
}


def find_task(name: str) -> Task:
    """The task of that name, in whatever case it is written.

    Raises:
        UserError: if there is none; it tells the nearest.

    Example:
        >>> find_task("sst2").options
        (' terrible', ' great')
    """
    for known, task in TASKS.items():
        if known.lower() == name.lower():
            return task
    raise UserError(f"data.task: expected {', '.join(TASKS)}, received {name!r}{nearest(name, TASKS)}")
