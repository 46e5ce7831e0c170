"""What the pages quote of the benchmarks is what the files of lines give."""

import re

import pytest

from benchmarks import pages

pytestmark = pytest.mark.docs


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables_and_sentences_of_a_page_are_those_of_the_lines(page):
    assert pages.written(page) == (pages.ROOT / page).read_text()


def test_a_number_that_the_lines_do_not_give_is_written_anew(tmp_path, monkeypatch):
    page = tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    text = (pages.ROOT / "docs" / "speed.md").read_text()
    for number in (r"(?<=SST2 \| )[\d.]+", r"[\d.]+(?= times the forward)"):
        changed, n = re.subn(number, "9.99", text)
        assert n == 1
        page.write_text(changed)
        with monkeypatch.context() as patch:
            patch.setattr(pages, "ROOT", tmp_path)
            assert pages.written("docs/speed.md") == text
