"""Pairs from GSM8K: the given solution, and the same with one wrong number in a step and all that follows from it."""

import ast
import json
import operator
import os
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

STEP = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")  # GSM8K's marks: <<48/2=24>>
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
ANSWER = "####"

OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(expression: str) -> float | None:
    """The value of an arithmetic expression of GSM8K; None if it is none, or divides by zero."""
    try:
        return _value(ast.parse(expression.replace("%", "/100").strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(node)


def shown(value: float) -> str:
    """A number as GSM8K writes it: at most two decimals, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def with_wrong_step(solution: str, seed: int) -> str | None:
    r"""A solution in which the result of one step is wrong, and with it every later number that is computed from it.

    Args:
        solution: a solution with GSM8K's marks, which ends with ``#### answer``.
        seed: chooses the step and the wrong result.

    Returns:
        The solution; None if its steps cannot be followed to its answer: they have to be right, and the wrong step must change
        the answer.

    Example:
        >>> with_wrong_step("He has 2+3 = <<2+3=5>>5 pens and 5*4 = <<5*4=20>>20 caps.\n#### 20", seed=1)
        'He has 2+3 = <<2+3=3>>3 pens and 3*4 = <<3*4=12>>12 caps.\n#### 12'
    """
    steps = list(STEP.finditer(solution))
    right = [evaluate(step[1]) for step in steps]
    if not steps or any(value is None or shown(value) != step[2].strip() for value, step in zip(right, steps, strict=True)):
        return None
    generator = random.Random(seed)
    wrong_step = generator.randrange(len(steps))
    value = right[wrong_step]
    assert value is not None
    wrong = value + generator.choice([-1, 1]) * generator.randint(1, max(2, round(abs(value) / 4)))
    if wrong <= 0:
        wrong = value + 1
    # From the wrong step on, each number that was a result and has changed is replaced, and each step computed again.
    changed, text, place = {shown(value): shown(wrong)}, solution[: steps[wrong_step].start()], steps[wrong_step].end()
    text += f"<<{steps[wrong_step][1]}={shown(wrong)}>>"
    for step in steps[wrong_step + 1 :]:
        text += _replaced(solution[place : step.start()], changed)
        expression = _replaced(step[1], changed)
        result = evaluate(expression)
        if result is None or result < 0:
            return None
        if shown(result) != step[2].strip():
            changed[step[2].strip()] = shown(result)
        text += f"<<{expression}={shown(result)}>>"
        place = step.end()
    text += _replaced(solution[place:], changed)
    return text if text.rpartition(ANSWER)[2] != solution.rpartition(ANSWER)[2] else None


def _replaced(text: str, changed: Mapping[str, str]) -> str:
    """A text in which numbers that have changed are replaced; other spellings, such as 1,000, stay."""
    return NUMBER.sub(lambda number: changed.get(number[0], number[0]), text)


def read_pairs(split: str) -> list[dict[str, str]]:
    """GSM8K's rows of a split as pairs; those whose steps cannot be followed are left out.

    Args:
        split: ``train`` or ``test``, of ``$COLA_DATA_DIR/real``.
    """
    path = Path(os.environ["COLA_DATA_DIR"]) / "real" / f"gsm8k_{split}.jsonl"
    pairs = []
    for seed, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        if (wrong := with_wrong_step(row["answer"], seed)) is not None:
            pairs.append({"prompt": row["question"], "chosen": row["answer"], "rejected": wrong})
    return pairs
