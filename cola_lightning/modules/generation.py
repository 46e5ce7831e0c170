"""Text that a causal language model generates."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.conventions import MAX_NEW_TOKENS
from cola_lightning.decoding import Decoding
from cola_lightning.turns import end_of_text

ANSWER = Decoding(max_new_tokens=MAX_NEW_TOKENS)  # of an answer that is compared with references: up to a line's end


def stop_tokens(tokenizer: Any) -> list[int]:
    """The tokens at which an answer ends: the end of text, and all that contain a line break."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends = {token for token, text in enumerate(texts) if "\n" in text}
    end = end_of_text(tokenizer)
    return sorted(ends if end is None else {*ends, end})


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    batch: Mapping[str, Any],
    ends: Sequence[int],
    decoding: Decoding = ANSWER,
    *,
    is_sharded: bool = False,
    streamer: Any = None,
) -> list[str]:
    """The text that a model generates after each prompt.

    Args:
        model: a Hugging Face model.
        tokenizer: the model's tokenizer.
        batch: ``prompt_ids`` and ``prompt_mask`` (rows x length), padded on the left.
        ends: the tokens at which a text ends.
        decoding: how the tokens are chosen, how many at most, and at which texts generation stops.
        is_sharded: whether the model's weights are gathered at each token, so that all processes continue until all are done.
        streamer: receives the tokens of a single row as they are generated: transformers' ``TextStreamer``.

    Returns:
        The text of each row, without special tokens, and without the token that ended it if it was added to the tokenizer.
    """
    from transformers import GenerationConfig

    how: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": decoding.do_sample}
    if decoding.do_sample:  # top_k: transformers' own default is 50
        how |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    if decoding.stop:
        how["stop_strings"] = list(decoding.stop)
    how |= {"eos_token_id": list(ends) or None, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(**how)  # type: ignore[no-untyped-call]
    # Special or not; the ends of an answer are all tokens with a line break, which may have text before it.
    hidden = set() if decoding is ANSWER else set(ends) & set(tokenizer.added_tokens_decoder)
    with _only(config, model):
        generated = model.generate(  # type: ignore[operator]
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            generation_config=config,
            tokenizer=tokenizer,  # which stop strings need
            synced_gpus=is_sharded,
            streamer=streamer and _Without(hidden, streamer),
        )
    new = [[token for token in row if token not in hidden] for row in generated[:, batch["prompt_ids"].shape[1] :].tolist()]
    return [decoding.cut(text, is_open=False)[0] for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


class _Without:
    """A streamer that does not receive certain tokens."""

    def __init__(self, hidden: Collection[int], streamer: Any) -> None:
        self.hidden, self.end, self._put = torch.tensor(list(hidden), dtype=torch.long), streamer.end, streamer.put

    def put(self, tokens: Tensor) -> None:
        """Takes the prompts, rows x length, whole, and then the generated tokens."""
        self._put(tokens if tokens.dim() > 1 else tokens[~torch.isin(tokens, self.hidden)])


@contextmanager
def _only(config: Any, model: Any) -> Iterator[None]:
    """Makes this the only generation config: transformers fills in values of the model's own, a penalty for example."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before
