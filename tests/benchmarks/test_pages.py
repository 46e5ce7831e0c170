"""What the pages quote of the benchmarks is what the files of lines give."""

import pytest

from benchmarks import pages


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables_and_sentences_of_a_page_are_those_of_the_lines(page):
    assert pages.written(page) == (pages.ROOT / page).read_text()


def test_a_number_that_the_lines_do_not_give_is_written_anew(tmp_path, monkeypatch):
    page = tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    text = (pages.ROOT / "docs" / "speed.md").read_text()
    changed = text.replace("1.03 to 1.04 times the forward", "0.93 to 1.04 times the forward").replace("| 0.79 (", "| 0.69 (")
    assert changed != text
    page.write_text(changed)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.written("docs/speed.md") == text
