"""Prompts, word for word; expected strings are written from the protocol's table, not computed."""

import json
import os
import re
from pathlib import Path

import pytest

from cola_lightning.data.rows import Row
from cola_lightning.data.tasks import TASKS, find_task

SIZES = {
    "SST2": (1000, 500, 872),
    "RTE": (1000, 500, 277),
    "CB": (150, 100, 56),
    "BoolQ": (1000, 500, 1000),
    "WSC": (454, 100, 104),
    "WIC": (1000, 500, 638),
    "MultiRC": (1000, 500, 1000),
    "COPA": (300, 100, 100),
    "ReCoRD": (1000, 500, 1000),
    "SQuAD": (1000, 500, 1000),
    "DROP": (1000, 500, 1000),
}
OPTIONS = {
    "SST2": (" terrible", " great"),
    "RTE": ("Yes", "No"),
    "CB": ("Yes", "No", "Maybe"),
    "BoolQ": ("Yes", "No"),
    "WSC": ("No", "Yes"),
    "WIC": ("No", "Yes"),
    "MultiRC": ("No", "Yes"),
}
# Two a task: its name, a row, the prompt, its options where they are not those above or the answer alone, the answer.
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
        {"premise": "He said so.", "hypothesis": "he said so", "label": 1},
        'Suppose He said so. Can we infer that "he said so"? Yes, No, or Maybe?\n',
        "No",
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
        "WSC",
        {"text": "The cup fell off the shelf, for it was full.", "span1_text": "The cup", "span2_text": "it", "label": 0},
        "The cup fell off the shelf, for it was full.\n"
        'In the previous sentence, does the pronoun "it" refer to The cup? Yes or No?\n',
        "No",
    ),
    (
        "WIC",
        {"word": "bank", "sentence1": "A bank of mud.", "sentence2": "She robbed a bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank of mud.\nShe robbed a bank.\n',
        "No",
    ),
    (
        "WIC",
        {"word": "run", "sentence1": "I run home.", "sentence2": "We run fast.", "label": 1},
        'Does the word "run" have the same meaning in these two sentences? Yes, No?\nI run home.\nWe run fast.\n',
        "Yes",
    ),
    (
        "MultiRC",
        {"paragraph": "Ida left at six. ", "question": "When did Ida leave?", "answer": "At six", "label": 1},
        'Ida left at six. \nQuestion: When did Ida leave?\nI found this answer "At six". Is that correct? Yes or No?\n',
        "Yes",
    ),
    (
        "MultiRC",
        {"paragraph": "Ida left at six.", "question": "Who stayed?", "answer": "Ida.", "label": 0},
        'Ida left at six.\nQuestion: Who stayed?\nI found this answer "Ida.". Is that correct? Yes or No?\n',
        "No",
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
            "entities": ["Bergen", "Oslo"],
            "answers": ["Oslo"],
        },
        "Oslo beat Bergen.\n- It was cold\n- Nobody came\n-",
        (" Fans of Bergen sang; Bergen won.", " Fans of Oslo sang; Oslo won."),
        " Fans of Oslo sang; Oslo won.",
    ),
    (
        "ReCoRD",
        {
            "passage": "Al met Di.",
            "query": "@placeholder left",
            "entities": ["Di", "Al", "Albert"],
            "answers": ["Albert", "Al"],
        },
        "Al met Di.\n-",
        (" Di left", " Al left", " Albert left"),
        " Albert left",
    ),
    (
        "SQuAD",
        {"title": "The_Moon", "context": "It is far.", "question": " How far? ", "answers": {"text": ["very far", "far"]}},
        "Title: The_Moon\nContext: It is far.\nQuestion: How far?\nAnswer:",
        " very far\n",
    ),
    (
        "SQuAD",
        {"title": "Tea", "context": " Hot. ", "question": "Is it hot?", "answers": {"text": ["Hot"], "answer_start": [1]}},
        "Title: Tea\nContext:  Hot. \nQuestion: Is it hot?\nAnswer:",
        " Hot\n",
    ),
    (
        "DROP",
        {"passage": "They won 3-1.", "question": "By how many? ", "answers_spans": {"spans": ["2"], "types": ["number"]}},
        "Passage: They won 3-1.\nQuestion: By how many?\nAnswer:",
        " 2\n",
    ),
    (
        "DROP",
        {"passage": "Jo and Bo ran.", "question": "Who ran?", "answers_spans": {"spans": ["Jo", "Bo", "Jo"]}},
        "Passage: Jo and Bo ran.\nQuestion: Who ran?\nAnswer:",
        " Jo\n",
    ),
]


@pytest.mark.parametrize("expected", ROWS, ids=lambda expected: expected[0])
def test_a_prompt_its_options_and_its_answer_are_the_protocols(expected):
    task, row, prompt, *own, answer = expected
    example = TASKS[task].example(Row(row, "here"))
    assert (example.prompt, example.place) == (prompt, "here")
    assert example.options == (own[0] if own else OPTIONS.get(task, (answer,)))
    assert example.options[example.answer] == answer


def test_all_answers_that_count_are_kept():
    made = [(task, TASKS[task].example(Row(row, "here"))) for task, row, *_ in ROWS]
    assert [example.accepted for task, example in made if task == "ReCoRD"] == [(1,), (2, 1)]
    assert [example.references for task, example in made if task == "SQuAD"] == [("very far", "far"), ("Hot",)]
    assert [example.references for task, example in made if task == "DROP"] == [("2",), ("Jo", "Bo", "Jo")]
    assert {example.accepted + example.references for task, example in made if task in OPTIONS or task == "COPA"} == {()}


def test_each_task_is_tested():
    assert [task for task, *_ in ROWS] == [task for task in TASKS for _ in range(2)]


def test_the_papers_tasks_have_the_protocols_sizes_and_loss():
    assert [task for task in TASKS if task in SIZES] == list(SIZES)
    assert {name: TASKS[name].sizes for name in SIZES} == SIZES
    assert {name: TASKS[name].loss for name in SIZES} == dict.fromkeys(OPTIONS, "options") | dict.fromkeys(
        ["COPA", "ReCoRD", "SQuAD", "DROP"], "answer"
    )


TEMPLATES = {
    "SST2": "{sentence} It was",
    "RTE": '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    "CB": 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    "BoolQ": "{passage} {question}\n",
    "WSC": '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
    "WIC": 'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
    "MultiRC": '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    "COPA": "{premise} {question} ",
    "ReCoRD": "{passage}\n-",
    "SQuAD": "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
    "DROP": "Passage: {passage}\nQuestion: {question}\nAnswer:",
}
CHANGES = {
    ("SST2", "sentence"): str.strip,
    ("BoolQ", "question"): lambda text: text[0].upper() + text[1:] + ("" if text[-1] == "?" else "?"),
    ("WSC", "span2_text"): str.lower,
    ("COPA", "premise"): lambda text: re.sub(r"\.?\s*$", "", text),
    ("COPA", "question"): {"effect": "so", "cause": "because"}.get,
    ("ReCoRD", "passage"): lambda text: text.replace("@highlight\n", "- "),
    ("SQuAD", "question"): str.strip,
    ("DROP", "question"): str.strip,
}


def options_and_right_ones(task, row):
    """The options of a real row, and which of them are right."""
    if task in ("SQuAD", "DROP"):
        answers = row["answers"]["text"] if task == "SQuAD" else row["answers_spans"]["spans"]
        return [f" {answers[0]}\n"], [f" {answers[0]}\n"], answers
    if task == "ReCoRD":
        options, right = ([" " + row["query"].replace("@placeholder", e) for e in row[k]] for k in ("entities", "answers"))
        return options, right, []
    options = list(OPTIONS.get(task, ()))
    if task == "COPA":
        options = [
            re.sub(r"^\S+", lambda word: word[0] if word[0] == "I" else word[0].lower(), row[f"choice{k}"]) for k in "12"
        ]
    return options, [["No", "Yes"][row["label"]] if task == "BoolQ" else options[row["label"]]], []


@pytest.mark.skipif("COLA_DATA_DIR" not in os.environ, reason="COLA_DATA_DIR is not set")
@pytest.mark.parametrize("task", SIZES)
def test_real_rows_make_the_prompts_of_the_table(task):
    lines = (Path(os.environ["COLA_DATA_DIR"]) / task.lower() / "validation.jsonl").read_text().splitlines()[:20]
    assert len(lines) == 20
    for line in lines:
        row = json.loads(line)
        prompt = TEMPLATES[task]
        for field, value in row.items():
            if "{" + field + "}" in prompt:
                prompt = prompt.replace("{" + field + "}", CHANGES.get((task, field), str)(value))
        example = TASKS[task].example(Row(row, "here"))
        options, right, references = options_and_right_ones(task, row)
        assert (example.prompt, list(example.options), list(example.references)) == (prompt, options, references)
        assert [example.options[place] for place in example.accepted or [example.answer]] == right


def test_a_task_is_found_in_any_case():
    assert find_task("boolq") is TASKS["BoolQ"]


def test_true_is_the_label_1():
    assert Row({"gold": True}, "here").label("gold", 2) == 1
