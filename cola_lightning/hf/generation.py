"""Text that a causal language model generates."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.constants import MAX_NEW_TOKENS
from cola_lightning.decoding import Decoding
from cola_lightning.hf.logits import with_attribute

ANSWER = Decoding(max_new_tokens=MAX_NEW_TOKENS, stop=("\n",))  # of an answer that is compared with references


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    batch: Mapping[str, Any],
    ends: Iterable[int],
    *,
    is_sharded: bool = False,
    streamer: Any = None,
) -> list[str]:
    """The text that a model generates after each prompt.

    Args:
        model: a Hugging Face model.
        tokenizer: the model's tokenizer.
        batch: ``prompt_ids`` and ``prompt_mask`` (rows x length), padded on the left. ``decoding``: the fields of
            :class:`~cola_lightning.decoding.Decoding`; without it, those of an answer. ``end_tokens``: tokens at which a text
            ends, besides ``ends``.
        ends: the tokens at which any text ends.
        is_sharded: whether the model's weights are gathered at each token, so that all processes continue until all are done.
        streamer: receives the tokens of a single row as they are generated: transformers' ``TextStreamer``.

    Returns:
        The text of each row, without surrounding white space, special tokens, and an end token that was added to the tokenizer.
    """
    from transformers import GenerationConfig

    decoding = Decoding(**batch["decoding"]) if "decoding" in batch else ANSWER
    ends = {*ends, *batch.get("end_tokens", ())}
    options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": decoding.do_sample}
    if decoding.do_sample:  # top_k: transformers' own default is 50
        options |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    if decoding.stop:
        options["stop_strings"] = list(decoding.stop)
    options |= {"eos_token_id": sorted(ends) or None, "pad_token_id": tokenizer.pad_token_id}
    hidden = ends & set(tokenizer.added_tokens_decoder)  # special or not
    config = GenerationConfig(**options)  # type: ignore[no-untyped-call]
    # It is the model's own, too: transformers would fill in values of that, a penalty for example.
    with with_attribute(model, "generation_config", config):
        generated = model.generate(  # type: ignore[operator]
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            generation_config=config,
            tokenizer=tokenizer,  # which stop strings need
            synced_gpus=is_sharded,
            streamer=streamer and _FilteredStreamer(hidden, streamer),
        )
    new = [[token for token in row if token not in hidden] for row in generated[:, batch["prompt_ids"].shape[1] :].tolist()]
    return [decoding.cut(text, is_open=False)[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


class _FilteredStreamer:
    """Passes generated tokens on to a streamer, except the hidden ones."""

    def __init__(self, hidden: Collection[int], streamer: Any) -> None:
        self.hidden, self.end, self._put = torch.tensor(list(hidden), dtype=torch.long), streamer.end, streamer.put

    def put(self, tokens: Tensor) -> None:
        """Takes the prompts, rows x length, whole, and then the generated tokens."""
        self._put(tokens if tokens.dim() > 1 else tokens[~torch.isin(tokens, self.hidden)])
