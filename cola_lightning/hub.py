"""The Hugging Face libraries: names of the hub, a hub that does not answer, and what they print."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from cola_lightning.errors import HubError, causes


def is_repo_id(name: str) -> bool:
    """Whether a name could be that of a repository on the hub: ``name`` or ``owner/name``."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Inside the block, a file that is neither in the local cache nor on a hub that answers becomes a HubError.

    Args:
        what: the field and its value, as the beginning of the message.

    Raises:
        HubError: with what to do.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except Exception as error:
        if not any(isinstance(cause, LocalEntryNotFoundError | ConnectionError) for cause in causes(error)):
            raise
        raise HubError(
            f"{what} is neither a folder here nor in the local cache, and the Hugging Face hub cannot be reached. Check the "
            "name, or use the path of a local copy"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block: neither progress bars nor warnings of transformers and peft; downloads have their bars."""
    from huggingface_hub import utils as hub  # documented there, but not in its __all__
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    had_downloads = not hub.are_progress_bars_disabled()  # type: ignore[attr-defined]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of downloads, too
    if had_downloads:
        hub.enable_progress_bars()  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads it from each model (PeftModel.__init__); transformers 5.24 deprecates it, and 6 drops it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
