"""Prompts, word for word; expected strings are written from the protocol's table, not computed."""

import pytest

from cola_lightning.data.rows import Row
from cola_lightning.data.tasks import TASKS, find_task

# The options of tasks that have the same in all rows.
OPTIONS = {"SST2": (" terrible", " great"), "CB": ("Yes", "No", "Maybe")}
OPTIONS |= dict.fromkeys(["RTE", "BoolQ"], ("Yes", "No")) | dict.fromkeys(["WSC", "WIC", "MultiRC"], ("No", "Yes"))
# Of each task: a row, the prompt, its options where they are not those above or the answer alone, and the answer.
ROWS = [
    ("SST2", {"sentence": " a joy to watch ", "label": 1}, "a joy to watch It was", " great"),
    (
        "RTE",
        {"premise": "Dogs bark.", "hypothesis": "Dogs make noise.", "label": 0},
        'Dogs bark.\nDoes this mean that "Dogs make noise." is true? Yes or No?\n',
        "Yes",
    ),
    (
        "CB",
        {"premise": "B: I doubt that she came.", "hypothesis": "she came", "label": 2},
        'Suppose B: I doubt that she came. Can we infer that "she came"? Yes, No, or Maybe?\n',
        "Maybe",
    ),
    (
        "BoolQ",
        {"passage": "Tea is a drink.", "question": "is tea a drink", "answer": True},
        "Tea is a drink. Is tea a drink?\n",
        "Yes",
    ),
    (
        "BoolQ",
        {"passage": "Mars has two moons.", "question": "does mars have three moons?", "label": 0},
        "Mars has two moons. Does mars have three moons?\n",
        "No",
    ),
    (
        "WSC",
        {"text": "Ann thanked Eve because She helped.", "span1_text": "Eve", "span2_text": "She", "label": 1},
        'Ann thanked Eve because She helped.\nIn the previous sentence, does the pronoun "she" refer to Eve? Yes or No?\n',
        "Yes",
    ),
    (
        "WIC",
        {"word": "bank", "sentence1": "A bank of mud.", "sentence2": "She robbed a bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank of mud.\nShe robbed a bank.\n',
        "No",
    ),
    (
        "MultiRC",
        {"paragraph": "Ida left at six. ", "question": "When did Ida leave?", "answer": "At six", "label": 1},
        'Ida left at six. \nQuestion: When did Ida leave?\nI found this answer "At six". Is that correct? Yes or No?\n',
        "Yes",
    ),
    (
        "COPA",
        {"premise": "The ice broke. ", "choice1": "I fell in.", "choice2": "The Sun rose.", "question": "effect", "label": 0},
        "The ice broke so ",
        ("I fell in.", "the Sun rose."),
        "I fell in.",
    ),
    (
        "COPA",
        {"premise": "Is he late?", "choice1": "It snowed.", "choice2": "I'm early.", "question": "cause", "label": 1},
        "Is he late? because ",
        ("it snowed.", "i'm early."),
        "i'm early.",
    ),
    (
        "ReCoRD",
        {
            "passage": "Oslo beat Bergen.\n@highlight\nIt was cold\n@highlight\nNobody came",
            "query": "Fans of @placeholder sang; @placeholder won.",
            "entities": ["Bergen", "Oslo", "Al"],
            "answers": ["Al", "Oslo"],
        },
        "Oslo beat Bergen.\n- It was cold\n- Nobody came\n-",
        (" Fans of Bergen sang; Bergen won.", " Fans of Oslo sang; Oslo won.", " Fans of Al sang; Al won."),
        " Fans of Al sang; Al won.",
    ),
    (
        "SQuAD",
        {"title": "The_Moon", "context": " Far. ", "question": " How far? ", "answers": {"text": ["very far", "far"]}},
        "Title: The_Moon\nContext:  Far. \nQuestion: How far?\nAnswer:",
        " very far\n",
    ),
    (
        "DROP",
        {"passage": "Jo and Bo ran.", "question": "Who ran? ", "answers_spans": {"spans": ["Jo", "Bo", "Jo"]}},
        "Passage: Jo and Bo ran.\nQuestion: Who ran?\nAnswer:",
        " Jo\n",
    ),
]


@pytest.mark.parametrize("expected", ROWS, ids=lambda expected: expected[0])
def test_a_prompt_its_options_and_its_answer_are_the_protocols(expected):
    task, row, prompt, *own, answer = expected
    example = TASKS[task].example(Row(row, "here"))
    assert example.prompt == prompt
    assert example.options == (own[0] if own else OPTIONS.get(task, (answer,)))
    assert example.options[example.answer] == answer
    assert find_task(task.lower()).loss == ("options" if task in OPTIONS else "answer")


def test_all_answers_that_count_are_kept():
    made = {task: TASKS[task].example(Row(row, "here")) for task, row, *_ in ROWS}
    references = {"SQuAD": ("very far", "far"), "DROP": ("Jo", "Bo", "Jo")}
    assert {task: example.references for task, example in made.items() if example.references} == references
    assert {task: example.accepted for task, example in made.items() if example.accepted} == {"ReCoRD": (2, 1)}
