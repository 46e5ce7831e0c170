"""What was tokenised once is read from the cache."""

import logging

import datasets
import pytest
import transformers

from cola_lightning.data import tokens
from cola_lightning.data.tokens import tokenize
from tests import tiny

TEXTS = ["The town is old", "", "Is it 🏠?", "שלום"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(tokens, "WORTH_CACHING", 1)
    return folder


@pytest.fixture
def computed(monkeypatch):
    """How often tokens were computed, not read."""
    calls, compute = [], tokens._compute
    monkeypatch.setattr(tokens, "_compute", lambda *args, **how: calls.append(how) or compute(*args, **how))
    return calls


def entries(cache):
    return list(cache.glob("generator/*"))


def test_the_same_texts_are_tokenised_once_and_read_again(cache, computed):
    tokenizer = tiny.tokenizer(eos=True)
    expected = [ids[:-1] for ids in tokenizer(TEXTS)["input_ids"]]
    for _ in range(3):
        assert tokenize(tokenizer, TEXTS) == expected
    assert tokenize(tiny.tokenizer(eos=True), TEXTS) == expected  # another object, the same tokenizer
    assert (len(computed), len(entries(cache))) == (1, 1)
    for _ in range(2):
        assert tokenize(tokenizer, TEXTS, is_whole=True) == tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert (len(computed), len(entries(cache))) == (2, 2)


def test_other_texts_or_another_tokenizer_are_tokenised_anew(cache, computed):
    plain, longer, added = tiny.tokenizer(), tiny.tokenizer(), tiny.tokenizer("gpt2")
    longer.add_tokens(["own is"])
    plainly = tiny.tokenizer()
    plainly.split_special_tokens = True
    with_end = ["The </s> town", *TEXTS[1:]]
    assert plainly(with_end)["input_ids"] != plain(with_end)["input_ids"]
    asked = [
        (plain, with_end),
        (plainly, with_end),
        (plain, TEXTS),
        (plain, TEXTS[::-1]),
        (plain, ["The town is ol", "d", *TEXTS[2:]]),
        (longer, TEXTS),
        (added, TEXTS),
    ]
    for tokenizer, texts in asked * 2:
        assert tokenize(tokenizer, texts) == tokenizer(texts)["input_ids"]
    assert len(computed) == len(entries(cache)) == len(asked)


def test_few_texts_are_not_kept(cache, computed, monkeypatch):
    monkeypatch.setattr(tokens, "WORTH_CACHING", sum(map(len, TEXTS)) + 1)
    for _ in range(2):
        tokenize(tiny.tokenizer(), TEXTS)
    assert len(computed) == 2
    assert not cache.exists()


def test_what_a_tokenizer_with_code_of_its_own_makes_is_not_kept(cache, computed):
    class WithCode(transformers.PreTrainedTokenizerFast):
        pass

    class InPython(WithCode):
        is_fast = False  # as such a one says

    for kind in (WithCode, InPython) * 2:
        tokenize(kind(tokenizer_object=tiny.tokenizer().backend_tokenizer), TEXTS)
    assert len(computed) == 4
    assert not cache.exists()


def test_a_cache_that_fails_is_said_and_costs_nothing_else(cache, computed, caplog):
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert tokenize(tiny.tokenizer(), TEXTS) == tiny.tokenizer()(TEXTS)["input_ids"]
    assert f"tokenizing without a cache, for the cache in {cache} fails" in caplog.text


def test_a_broken_file_in_the_cache_is_no_end(cache, computed, caplog):
    expected = tokenize(tiny.tokenizer(), TEXTS)
    (file,) = cache.rglob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert tokenize(tiny.tokenizer(), TEXTS) == expected
    assert len(computed) == 2


def test_who_asks_for_no_caching_gets_none(cache, computed):
    datasets.disable_caching()
    try:
        for _ in range(2):
            tokenize(tiny.tokenizer(), TEXTS)
    finally:
        datasets.enable_caching()
    assert len(computed) == 2
    assert not cache.exists()
