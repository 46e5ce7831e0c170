"""What is written wrong is refused in one line, which says which field it is about; ``tests/refusals.py`` is the table.

Refusals that need a longer run, a checkpoint or a command line are in the test files of their subjects. What they look like to
a user, ``tests/test_cli.py`` holds: one line, status 2, and nothing written.
"""

import errno
import re
from pathlib import Path
from unittest import mock

import pytest

from cola_lightning import UserError
from cola_lightning.cli import main
from tests.refusals import REFUSALS


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
