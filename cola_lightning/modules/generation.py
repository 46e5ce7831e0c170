"""Answers that a causal language model writes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cola_lightning.conventions import MAX_NEW_TOKENS


def stop_tokens(tokenizer: Any) -> list[int]:
    """The tokens at which an answer ends: the end of text, and all that hold a line's end."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends = {token for token, text in enumerate(texts) if "\n" in text}
    return sorted(ends | ({tokenizer.eos_token_id} - {None}))


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, batch: Mapping[str, Any], stops: list[int], *, is_sharded: bool = False
) -> list[str]:
    """What a model writes after each prompt: greedily, at most 50 tokens, up to a line's end.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer.
        batch: ``prompt_ids`` and ``prompt_mask`` (rows x length), padded on the left.
        stops: the tokens at which an answer ends.
        is_sharded: whether the model's weights are gathered at each token, so that all processes go on until all are done.

    Returns:
        For each row its text, without blanks around it.
    """
    from transformers import GenerationConfig

    how = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(**how)  # type: ignore[no-untyped-call]
    with _only(config, model):
        generated = model.generate(  # type: ignore[operator]
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            generation_config=config,
            synced_gpus=is_sharded,
        )
    new = generated[:, batch["prompt_ids"].shape[1] :]
    return [text.partition("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@contextmanager
def _only(config: Any, model: Any) -> Iterator[None]:
    """Lets nothing else say how to generate: transformers fills in what a model's own file says, a penalty for example."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before
