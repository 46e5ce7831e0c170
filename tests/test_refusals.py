"""Every refusal of the package says in one line which field it is about, what was expected, and what was received.

They are found in the source. ``tests/refusals.py`` is the table of them; those that need a longer run, a checkpoint or a
command line have their messages in the test files of their subjects. What they look like to a user, ``tests/test_cli.py``
holds: one line, status 2, and nothing written.
"""

import ast
import errno
import re
from pathlib import Path
from unittest import mock

import pytest

from cola_lightning import UserError
from cola_lightning.cli import main
from tests.refusals import REFUSALS

PACKAGE = Path(__file__).parent.parent / "cola_lightning"
FORM = re.compile(r"[^:\n]+: .*expected.*received", re.DOTALL)
# A message made elsewhere: by a library, by a run in another process, or of a row that is one of too many.
MADE_ELSEWHERE = {
    "<NO_DEEPSPEED>",
    "trainer: {one_line(str(error))}",
    "<message>",
    "{self.errors[0]} ({n_skipped} of {n_rows} rows cannot be used; up to {PERCENT_SKIPPED} % would be skipped)",
    "<_last_error(folder / LOG)>",
}


def text_of(node):
    """A text as it is written, with its expressions in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return f"<{ast.unparse(node)}>"


def constants_of(node):
    """The parts of a text that do not change with a value."""
    if isinstance(node, ast.JoinedStr):
        return [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return constants_of(node.left) + constants_of(node.right)
    return [node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"]


def refusals():
    """File, line, message and the parts of it of each UserError and UnusableRow that the package makes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args else ""
            if name in ("UserError", "UnusableRow") or (name == "kind" and isinstance(node.args[0], ast.JoinedStr)):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text_of(node.args[0]), constants_of(node.args[0])


ALL = list(refusals())
FOUND = [found for found in ALL if found[1] not in MADE_ELSEWHERE]


@pytest.mark.parametrize(("place", "message"), [found[:2] for found in FOUND], ids=[place for place, *_ in FOUND])
def test_a_refusal_names_its_field_and_what_was_expected_and_received(place, message):
    assert FORM.match(message), message
    assert "\n" not in message


@pytest.mark.parametrize("row", REFUSALS, ids=[f"{row.do.__name__}: {row.field}" for row in REFUSALS])
def test_what_is_written_wrong_is_refused_in_these_words(row, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "cola_lightning")  # and back, after a command that sets it
    with pytest.raises(UserError) as caught:
        row.provoke()
    assert re.fullmatch(re.escape(row.message).replace(r"\.\.\.", ".+"), str(caught.value)), str(caught.value)


def test_a_path_without_permission_is_refused_in_one_line(monkeypatch, capsys):
    refuse = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", "of_another"))
    monkeypatch.setattr(Path, "is_dir", refuse)  # an administrator, as in a container, may read anything
    assert main(["generate", "--checkpoint", "of_another", "--prompt", "Is it?"]) == 2
    message = "cola: expected a file or folder that may be used, received 'of_another': Permission denied"
    assert capsys.readouterr().err.strip() == f"error: {message}"
