"""Streams generated text to standard output."""

from typing import Any

from cola_lightning.decoding import Decoding


def make_streamer(tokenizer: Any, decoding: Decoding) -> Any:
    """A transformers ``TextStreamer`` that prints up to a stop text, and withholds what may be the beginning of one.

    Args:
        tokenizer: the model's tokenizer.
        decoding: the stop texts.
    """
    from transformers import TextStreamer

    class StoppingStreamer(TextStreamer):  # here: transformers is imported only on first use
        text, n_printed = "", 0

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text = (self.text + text).lstrip()  # as in predictions files
            sure, _ = decoding.cut(self.text, is_open=not stream_end)
            print(sure[self.n_printed :], end="\n" if stream_end else "", flush=True)
            self.n_printed = max(len(sure), self.n_printed)

    return StoppingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
