"""What the pages quote of the benchmarks is what the files of lines give."""

import re

import pytest

from benchmarks import pages

pytestmark = pytest.mark.docs


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables_and_sentences_of_a_page_are_those_of_the_lines(page):
    assert pages.written(page) == (pages.ROOT / page).read_text()


@pytest.mark.parametrize("page", sorted({page for page, _ in pages.TABLES} - {"docs/api.md"}))  # which has no numbers
def test_a_number_that_the_lines_do_not_give_is_written_anew(page, tmp_path, monkeypatch):
    """In each table of a page."""
    text = (pages.ROOT / page).read_text()
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / page).parent.mkdir(exist_ok=True)
    for of_page, header in pages.TABLES:
        if of_page == page:
            start = text.index("|\n", text.index(f"\n{header}") + len(header))  # the end of the line with the names
            end = text.find("\n\n", start)
            changed = re.sub(r"\d\.\d+", "9.99", text[start:end], count=1)
            (tmp_path / page).write_text(text[:start] + changed + text[end:])
            assert pages.written(page) == text
