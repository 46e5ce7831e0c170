"""The reviews of data/grammar.py: what the sentiment task may rely on."""

import re
from collections import Counter

import pytest

from cola_lightning.data.grammar import Review, write_reviews

SIZES = {"train": 400, "validation": 100, "test": 100}
SEEDS = range(5)


@pytest.fixture(params=SEEDS)
def reviews(request: pytest.FixtureRequest) -> dict[str, list[Review]]:
    return write_reviews(request.param)


def test_splits_have_their_sizes_and_as_many_positive_as_negative_reviews(reviews: dict[str, list[Review]]) -> None:
    assert {split: len(part) for split, part in reviews.items()} == SIZES
    for part in reviews.values():
        assert Counter(review.label for review in part) == {0: len(part) // 2, 1: len(part) // 2}


def test_no_template_tells_the_label(reviews: dict[str, list[Review]]) -> None:
    for part in reviews.values():
        positive, negative = (Counter(review.template for review in part if review.label == label) for label in (1, 0))
        assert positive == negative


def test_no_text_comes_twice(reviews: dict[str, list[Review]]) -> None:
    texts = [review.text for part in reviews.values() for review in part]
    assert len(set(texts)) == sum(SIZES.values())


def test_splits_share_no_template(reviews: dict[str, list[Review]]) -> None:
    train, validation, test = ({review.template for review in reviews[split]} for split in SIZES)
    assert (len(train), len(validation), len(test)) == (32, 10, 10)
    assert len(train | validation | test) == 52


def test_reviews_are_a_function_of_the_seed() -> None:
    assert write_reviews(3) == write_reviews(3)
    first, second = ({review.text for review in write_reviews(seed)["train"]} for seed in (0, 1))
    assert len(first & second) < 100  # not only another order


def test_texts_are_sentences(reviews: dict[str, list[Review]]) -> None:
    for text in (review.text for part in reviews.values() for review in part):
        assert re.fullmatch(r"([A-Z][A-Za-z',:]*( [A-Za-z',:]+)+\.( |$)){1,3}", text), text  # so single spaces, no slot
        assert text.endswith(".")
        assert 12 <= len(text.split()) <= 30, text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE), text


@pytest.mark.parametrize("longest", [1, 2])
def test_a_bag_of_words_learns_next_to_nothing(reviews: dict[str, list[Review]], longest: int) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = (
        {split: [getattr(row, name) for row in part] for split, part in reviews.items()} for name in ("text", "label")
    )
    words = TfidfVectorizer(ngram_range=(1, longest))
    classifier = LogisticRegression().fit(words.fit_transform(texts["train"]), labels["train"])
    for split in ("validation", "test"):
        assert classifier.score(words.transform(texts[split]), labels[split]) <= 0.65
