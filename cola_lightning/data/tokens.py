"""Tokenization of texts. The tokens of many texts are cached by ``datasets``."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cola_lightning.turns import n_appended

log = logging.getLogger(__name__)

WORTH_CACHING = 250_000  # characters; fewer are tokenized faster than a cache is opened

Tokens = dict[str, list[list[int]]]  # columns, each with a list for each text


def tokenize(tokenizer: Any, texts: Sequence[str], *, is_whole: bool = False) -> list[list[int]]:
    """Tokens with the special tokens that the tokenizer prepends, and without those that it appends.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        is_whole: whether the texts already contain all special tokens, as from a chat template.
    """
    rows = _cached(tokenizer, texts, is_whole=is_whole)["ids"]
    n = 0 if is_whole else n_appended(tokenizer)
    return [ids[: len(ids) - n] for ids in rows] if n else rows


def tokenize_with_places(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[int], list[int]]]:
    """For each text from a chat template: its tokens, and where each begins and ends in the text, in characters."""
    columns = _cached(tokenizer, texts, is_whole=True, with_places=True)
    return list(zip(columns["ids"], columns["starts"], columns["ends"], strict=True))


def _cached(tokenizer: Any, texts: Sequence[str], *, is_whole: bool, with_places: bool = False) -> Tokens:
    """The result of :func:`_compute`, from the cache if there is one."""
    names = ("ids", "starts", "ends") if with_places else ("ids",)
    if not texts:
        return {name: [] for name in names}
    how = {"is_whole": is_whole, "with_places": with_places}
    if sum(map(len, texts)) < WORTH_CACHING:
        return _compute(tokenizer, texts, **how)
    import datasets

    fingerprint = _fingerprint(tokenizer, texts, how)
    if fingerprint is None or not datasets.is_caching_enabled():
        return _compute(tokenizer, texts, **how)

    def rows() -> Iterator[dict[str, list[int]]]:
        columns = _compute(tokenizer, texts, **how)
        for values in zip(*(columns[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))

    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in names})
    try:
        with _without_progress_bar():  # one process fills the cache, others wait for it
            cached = datasets.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)[:]
        return {name: cached[name] for name in names}
    except Exception as error:  # a full or read-only disk, a broken file: no reason to end a run
        cause = error.__cause__ or error
        log.warning("tokenizing without a cache, for the cache in %s fails: %s", datasets.config.HF_DATASETS_CACHE, cause)
        return _compute(tokenizer, texts, **how)


def _compute(tokenizer: Any, texts: Sequence[str], *, is_whole: bool, with_places: bool) -> Tokens:
    encoded = tokenizer(
        list(texts),
        add_special_tokens=not is_whole,
        return_offsets_mapping=with_places,
        verbose=False,  # no warning of texts that are too long: they are truncated later
    )
    columns = {"ids": encoded["input_ids"]}
    if with_places:
        columns["starts"] = [[start for start, _ in places] for places in encoded["offset_mapping"]]
        columns["ends"] = [[end for _, end in places] for places in encoded["offset_mapping"]]
    return columns


def _fingerprint(tokenizer: Any, texts: Sequence[str], how: dict[str, bool]) -> str | None:
    """A hash of everything that determines the tokens; None for a tokenizer with custom code, which may change.

    A prompt template's effect is in the texts; a maximum length only truncates tokens that are the same for all lengths.
    """
    import tokenizers
    import transformers

    kind = type(tokenizer)
    if not tokenizer.is_fast or kind.__module__.partition(".")[0] != "transformers":
        return None
    digest = hashlib.sha256()
    identity = (transformers.__version__, tokenizers.__version__, kind.__module__, kind.__qualname__, sorted(how.items()))
    # The backend's serialisation omits split_special_tokens.
    for part in (*identity, tokenizer.split_special_tokens, [len(text) for text in texts]):
        digest.update(repr(part).encode())
    for text in (tokenizer.backend_tokenizer.to_str(), *texts):
        digest.update(text.encode())
    return digest.hexdigest()


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
