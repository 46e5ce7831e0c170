"""Files and folders that are written whole or not at all."""

import os
from unittest import mock

import pytest

from cola_lightning.errors import DiskError
from cola_lightning.writing import atomic_file, atomic_folder


def write_file(path):
    with atomic_file(path) as partial:
        partial.write_text("new")


def write_folder(path):
    with atomic_folder(path, overwrite=True) as partial:
        (partial / "file").write_text("new")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_file_or_folder_that_cannot_be_flushed_leaves_the_old_one(tmp_path, monkeypatch, write):
    write(tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(DiskError, match="unchanged"):
        write(tmp_path / "out")
    assert contents(tmp_path) == before


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    def write_late():
        with atomic_folder(tmp_path / "out") as late:
            write_folder(tmp_path / "out")
            (late / "late").write_text("late")

    with pytest.raises(DiskError):
        write_late()
    assert contents(tmp_path) == {"out/file": "new"}
