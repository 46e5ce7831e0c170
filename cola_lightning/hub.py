"""The Hugging Face hub: valid repository names, and whether it is reachable.

A check takes seconds and is not repeated for each file; the hub's own libraries retry for half a minute a file.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
MEMORY_SECONDS = 60.0  # of a failure: a connection may come back while a notebook is open


@dataclass
class _Memory:
    """The result of the last check, and until when it is valid."""

    answer: bool = False
    until: float = 0.0


_memory = _Memory()


def is_repo_id(name: str) -> bool:
    """Whether a name could be that of a repository on the hub: ``name`` or ``owner/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_reachable() -> bool:
    """Whether the hub answers, or has done so in this process; without it, the local cache can still be used.

    A failed check is repeated after a minute.
    """
    if time.monotonic() >= _memory.until:
        _memory.answer = _probe()
        _memory.until = math.inf if _memory.answer else time.monotonic() + MEMORY_SECONDS
    return _memory.answer


def _probe() -> bool:
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    session = get_session()  # with the user's proxies, certificates and HF_HUB_OFFLINE
    try:
        session.head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except OfflineModeIsEnabled:
        return False
    except Exception as error:  # the HTTP library changes with huggingface_hub's version
        log.warning("%s cannot be reached (%s): only the local cache is used", constants.ENDPOINT, error)
        return False
    return True


@contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Restricts the hub's libraries to their local cache inside the block, as HF_HUB_OFFLINE=1 does, if the hub is unreachable.

    Yields:
        Whether the hub does not answer.
    """
    import datasets
    from huggingface_hub import constants

    is_offline = not is_reachable()
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = (is_offline or flag for flag in before)
    try:
        yield is_offline
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
