"""Tokenization of texts."""

import hashlib
from collections.abc import Sequence
from typing import Any

from cola_lightning.turns import n_appended


def tokenize(tokenizer: Any, texts: Sequence[str], *, is_whole: bool = False) -> list[list[int]]:
    """Tokens with the special tokens that the tokenizer prepends, and without those that it appends.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        is_whole: whether the texts already contain all special tokens, as from a chat template.
    """
    if not texts:
        return []
    # Without a warning of texts that are too long: they are truncated later.
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=not is_whole, verbose=False)["input_ids"]
    n = 0 if is_whole else n_appended(tokenizer)
    return [ids[: len(ids) - n] for ids in rows] if n else rows


def identity_of_tokenizer(tokenizer: Any) -> str | None:
    """A hash of what determines its tokens and chat template; None for a tokenizer with custom code, which may change."""
    import tokenizers
    import transformers

    kind = type(tokenizer)
    if not tokenizer.is_fast or kind.__module__.partition(".")[0] != "transformers":
        return None
    digest = hashlib.sha256()
    identity = (transformers.__version__, tokenizers.__version__, kind.__module__, kind.__qualname__)
    # The backend's serialisation omits split_special_tokens.
    for part in (*identity, tokenizer.split_special_tokens, tokenizer.special_tokens_map, tokenizer.chat_template):
        digest.update(repr(part).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()
