"""Every refusal of the package says in one line which field it is about, what was expected, and what was received.

They are found in the source; that each is raised by some test, the coverage of its line shows. What they look like to a user,
`tests/test_cli.py` holds: one line, status 2, and nothing written.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cola_lightning"
FORM = re.compile(r"[^:\n]+: .*expected.*received", re.DOTALL)
# A message made elsewhere: by a library, by a run in another process, or of a row that is one of too many.
MADE_ELSEWHERE = {
    "<NO_DEEPSPEED>",
    "trainer: {one_line(str(error))}",
    "<message>",
    "{self.errors[0]} ({n_left_out} of {n_rows} rows cannot be used; up to {PERCENT_LEFT_OUT} % would be left out)",
    "<_last_error(folder / LOG)>",
}


def text_of(node):
    """A message as it is written, with its expressions in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return f"<{ast.unparse(node)}>"


def refusals():
    """File, line and message of each UserError and UnusableRow that the package makes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and getattr(node.func, "id", "") in ("UserError", "UnusableRow"):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text_of(node.args[0])


REFUSALS = [(place, message) for place, message in refusals() if message not in MADE_ELSEWHERE]


def test_all_are_found():
    assert len(REFUSALS) > 280
    assert {message for _, message in refusals()} >= MADE_ELSEWHERE


@pytest.mark.parametrize(("place", "message"), REFUSALS, ids=[place for place, _ in REFUSALS])
def test_a_refusal_names_its_field_and_what_was_expected_and_received(place, message):
    assert FORM.match(message), message
    assert "\n" not in message
