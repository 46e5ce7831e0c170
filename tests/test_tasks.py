"""Prompts, word for word; expected strings are written from the protocol's table, not computed."""

import json
import os
from pathlib import Path

import pytest

from cola_lightning import UserError
from cola_lightning.data.rows import Row
from cola_lightning.data.tasks import TASKS, find_task

ROWS = [
    ("SST2", {"sentence": "a joy to watch ", "label": 1}, "a joy to watch It was", " great"),
    ("SST2", {"sentence": " no plot , no point", "label": 0}, "no plot , no point It was", " terrible"),
    (
        "RTE",
        {"premise": "Dogs bark.", "hypothesis": "Dogs make noise.", "label": 0},
        'Dogs bark.\nDoes this mean that "Dogs make noise." is true? Yes or No?\n',
        "Yes",
    ),
    (
        "RTE",
        {"premise": "It rained in Oslo.", "hypothesis": "Oslo was dry.", "label": 1},
        'It rained in Oslo.\nDoes this mean that "Oslo was dry." is true? Yes or No?\n',
        "No",
    ),
    (
        "CB",
        {"premise": "He said so.", "hypothesis": "he said so", "label": 0},
        'Suppose He said so. Can we infer that "he said so"? Yes, No, or Maybe?\n',
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
]


@pytest.mark.parametrize(("task", "row", "prompt", "answer"), ROWS)
def test_a_prompt_and_its_answer_are_the_protocols(task, row, prompt, answer):
    made = Row(row, "here")
    assert TASKS[task].prompt(made) == prompt
    assert TASKS[task].options[TASKS[task].label(made)] == answer


def test_each_task_is_tested_and_has_the_protocols_sizes():
    assert {task for task, *_ in ROWS} == TASKS.keys()
    assert {name: task.sizes for name, task in TASKS.items()} == {
        "SST2": (1000, 500, 872),
        "RTE": (1000, 500, 277),
        "CB": (150, 100, 56),
        "BoolQ": (1000, 500, 1000),
    }


TEMPLATES = {
    "SST2": "{sentence} It was",
    "RTE": '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    "CB": 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    "BoolQ": "{passage} {question}\n",
}
ANSWERS = {"SST2": [" terrible", " great"], "RTE": ["Yes", "No"], "CB": ["Yes", "No", "Maybe"], "BoolQ": ["No", "Yes"]}


@pytest.mark.skipif("COLA_DATA_DIR" not in os.environ, reason="COLA_DATA_DIR is not set")
@pytest.mark.parametrize("name", TASKS)
def test_real_rows_make_the_prompts_of_the_table(name):
    lines = (Path(os.environ["COLA_DATA_DIR"]) / name.lower() / "validation.jsonl").read_text().splitlines()[:20]
    assert len(lines) == 20
    for line in lines:
        row = json.loads(line)
        expected = TEMPLATES[name]
        for field, value in row.items():
            if isinstance(value, str):
                value = value.strip() if field == "sentence" else value
                if field == "question":
                    value = value[0].upper() + value[1:] + ("" if value.endswith("?") else "?")
                expected = expected.replace("{" + field + "}", value)
        task = TASKS[name]
        assert task.prompt(Row(row, "here")) == expected
        assert task.options[task.label(Row(row, "here"))] == ANSWERS[name][row["label"]]


def test_a_task_is_found_in_any_case_and_a_misspelt_one_gets_the_nearest():
    assert find_task("boolq") is TASKS["BoolQ"]
    with pytest.raises(UserError, match=r"data\.task: expected SST2, RTE, CB, BoolQ, received 'BoolG'; the nearest.*: BoolQ$"):
        find_task("BoolG")


def test_rows_say_what_they_lack():
    row = Row({"text": 3, "label": 4, "gold": True}, "train.jsonl, line 7")
    for ask, message in [
        (lambda: row.text("sentence"), "expected the field 'sentence', received 'text', 'label', 'gold'"),
        (lambda: row.text("text"), "expected text in the field 'text', received 3"),
        (lambda: row.label("label", 2), "expected a label from 0 to 1 in the field 'label', received 4"),
    ]:
        with pytest.raises(UserError, match="train.jsonl, line 7: " + message):
            ask()
    assert row.label("gold", 2) == 1
