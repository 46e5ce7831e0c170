"""Files and folders that are written whole or not at all."""

import os
import stat

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


def failing_fsync(monkeypatch, *, of_folders):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) is of_folders:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_file_or_folder_that_cannot_be_flushed_leaves_the_old_one(tmp_path, monkeypatch, write):
    write(tmp_path / "out")
    before = contents(tmp_path)
    failing_fsync(monkeypatch, of_folders=False)
    with pytest.raises(DiskError, match=r"unchanged"):
        write(tmp_path / "out")
    assert contents(tmp_path) == before


def test_what_is_said_of_the_old_contents_is_true_once_they_are_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("old")
    failing_fsync(monkeypatch, of_folders=True)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_file(tmp_path / "out")
    assert not isinstance(caught.value, DiskError)  # which says that the old contents are unchanged
    assert contents(tmp_path) == {"out": "new"}


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    def write_late():
        with atomic_folder(tmp_path / "out") as late:
            write_folder(tmp_path / "out")
            (late / "late").write_text("late")

    with pytest.raises(DiskError):
        write_late()
    assert contents(tmp_path) == {"out/file": "new"}
