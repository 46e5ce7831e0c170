"""What transformers and peft print while they read or write a model's files: one progress bar of ours, in place of theirs."""

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging import ERROR, getLogger
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block: no warnings of transformers and peft, and our progress bar instead of theirs."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # peft imports it: on a CPU it recommends a package of kernels, whether or not anything is quantised.
    bitsandbytes = getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(ERROR)
    try:
        with warnings.catch_warnings(), own_progress_bar():
            # peft 0.21 reads it from each model (PeftModel.__init__); transformers 5.24 deprecates it, and 6 drops it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        bitsandbytes.setLevel(level)
        logging.set_verbosity(verbosity)


@contextmanager
def own_progress_bar() -> Iterator[None]:
    """Inside the block: one transient bar at a time, on a terminal only, in place of transformers' bars, which stay.

    None if the user turned transformers' off. Downloads show the bars of huggingface_hub.
    """
    from transformers.utils import logging

    is_enabled = logging.is_progress_bar_enabled()

    def dequantizing(tensors: Iterable[Any], **_: Any) -> Iterable[Any]:
        return _bar(tensors, "dequantizing", is_enabled=is_enabled)

    def hook(factory: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        if not arguments:  # a bar that is updated by hand
            return factory(**options)
        return _bar(arguments[0], str(options.get("desc") or "loading").lower(), is_enabled=is_enabled)

    # Neither the hook nor transformers' own switch reaches the bar of a GGUF file in 5.24 (load_gguf_checkpoint).
    gguf: Any = None
    with suppress(ImportError):  # another version may have no such module, or another bar
        gguf = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    theirs = getattr(gguf, "tqdm", None)
    with _replaced_by(hook):
        if theirs is not None:
            gguf.tqdm = dequantizing
        try:
            yield
        finally:
            if theirs is not None:
                gguf.tqdm = theirs


@contextmanager
def _replaced_by(hook: Callable[..., Any]) -> Iterator[None]:
    """Has transformers create its bars by the hook; a version without hooks (5.0 to 5.3 at least) shows none."""
    from huggingface_hub import utils as hub  # documented there, but not in its __all__
    from transformers.utils import logging

    if hasattr(logging, "set_tqdm_hook"):
        previous = logging.set_tqdm_hook(hook)
        try:
            yield
        finally:
            logging.set_tqdm_hook(previous)
        return
    had_bars, had_downloads = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()  # type: ignore[attr-defined]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of downloads, too
    if had_downloads:
        hub.enable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if not had_downloads:
            hub.disable_progress_bars()  # type: ignore[attr-defined]


def _bar(items: Iterable[Any], description: str, *, is_enabled: bool) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console, is_first = Console(stderr=True), os.environ.get("LOCAL_RANK", "0") == "0"
    is_shown = is_enabled and is_first and console.is_terminal
    return track(items, description, transient=True, console=console, disable=not is_shown)
