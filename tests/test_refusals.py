"""Every refusal of the package says in one line which field it is about, what was expected, and what was received.

They are found in the source. ``tests/refusals.py`` is the table of them; those that need a longer run, a checkpoint or a
command line have their messages in the test files of their subjects. What they look like to a user, ``tests/test_cli.py``
holds: one line, status 2, and nothing written.
"""

import ast
import errno
import re
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pytest

from cola_lightning import UserError
from cola_lightning.cli import main
from tests.refusals import REFUSALS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "cola_lightning"
FORM = re.compile(r"[^:\n]+: .*expected.*received", re.DOTALL)
# A message made elsewhere: by a library, by a run in another process, or of a row that is one of too many.
MADE_ELSEWHERE = {
    "<NO_DEEPSPEED>",
    "trainer: {one_line(str(error))}",
    "<message>",
    "{self.errors[0]} ({n_skipped} of {n_rows} rows cannot be used; up to {PERCENT_SKIPPED} % would be skipped)",
    "<_last_error(folder / LOG)>",
}
# Tests of these know little of the message beside what was given.
IN_OTHER_WORDS = {
    "trainer.callbacks: expected none that trains by itself": "test_chain_of_lora.py",
    "cola: expected {', '.join(SUBCOMMANDS)}, received {words[0]}": "test_cli.py",
    "model: expected the checkpoint's base, with {name} of shape": "test_checkpoint.py",
    "model.rank, model.alpha, chain.ranks, chain.alphas: expected rank": "test_continue.py",
    "model.trained_factors: expected {had_factors}, the checkpoint's": "test_relatives.py",
    "model.modules_to_save_lr: expected {expected}, as in the checkpoint's run": "test_resume.py",
    "trainer.strategy: expected ddp, or one device, for a base in 4 bits": "test_distributed.py",
}
# An administrator may write anywhere; a metric's name is asked for at the end of a run in another process; and inject_lora
# refuses a 4-bit layer before it is made one with links.
UNTESTED = (
    "received {str(folder)}: no permission in",
    "model.finished_links: expected stack for a 4-bit weight, received merge",
)
SHARED = (12, 16, 24)  # as many characters that a test's text has in common with one refusal alone: it is that one's


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


def test_all_are_found():
    assert len(FOUND) > 280
    assert {message for _, message, _ in ALL} >= MADE_ELSEWHERE


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


def in_the_table():
    """The places of the refusals that a row has: of those that its message fits, those that say most themselves."""
    patterns = [
        re.compile("".join(".*" if part == "\0" else re.escape(part) for part in parts), re.DOTALL) for *_, parts in FOUND
    ]
    for row in REFUSALS:
        fitting = [found for found, pattern in zip(FOUND, patterns, strict=True) if pattern.fullmatch(row.message)]
        most = max((length_of(parts) for *_, parts in fitting), default=0)
        yield from (place for place, _, parts in fitting if length_of(parts) == most)


def length_of(parts):
    return sum(len(part) for part in parts if part != "\0")


def runs_of(text):
    return {text[start : start + length] for length in SHARED for start in range(len(text) - length + 1)}


def in_other_tests():
    """The places of the refusals of which a text in the other test files has what no other refusal has."""
    places = defaultdict(set)
    for place, _, parts in FOUND:
        for run in set().union(*map(runs_of, parts)):
            places[run].add(place)
    for path in set(TESTS.glob("test_*.py")) - {Path(__file__)}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for run in runs_of(node.value.replace("\\", "")):
                    if len(places[run]) == 1:
                        yield from places[run]


def test_every_refusal_is_in_the_table_or_in_the_tests_of_its_subject():
    covered = {*in_the_table(), *in_other_tests()}
    left = [f"{place}: {message}" for place, message, _ in FOUND if place not in covered]
    listed = (*IN_OTHER_WORDS, *UNTESTED)
    assert [refusal for refusal in left if not any(beginning in refusal for beginning in listed)] == []
    assert [beginning for beginning in listed if not any(beginning in refusal for refusal in left)] == []
