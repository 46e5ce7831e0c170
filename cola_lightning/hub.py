"""The Hugging Face hub: what could be on it, and whether it answers.

That is asked once and in seconds: the hub's own libraries retry for half a minute a file.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0


def is_repo_id(name: str) -> bool:
    """Whether a name could be that of a repository on the hub: ``name`` or ``owner/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@functools.cache
def is_reachable() -> bool:
    """Whether the hub answers; without it, what lies in the local cache can still be used."""
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    session = huggingface_hub.get_session()  # with the user's proxies, certificates and HF_HUB_OFFLINE
    try:
        session.head(huggingface_hub.constants.ENDPOINT, timeout=PROBE_SECONDS)
    except OfflineModeIsEnabled:
        return False
    except Exception as error:  # the HTTP library changes with huggingface_hub's version
        log.warning("%s cannot be reached (%s): the local cache alone", huggingface_hub.constants.ENDPOINT, error)
        return False
    return True


@contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Keeps the hub's libraries to their local cache inside the block, as HF_HUB_OFFLINE=1 does, if the hub does not answer.

    Yields:
        Whether it does not.
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
