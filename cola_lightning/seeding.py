"""Random draws that depend on a seed alone, and restore the global generators afterwards."""

import functools
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@functools.cache
def _accelerator() -> str | None:
    """The kind of device that torch computes on here: ``cuda``, ``mps`` (a Mac's GPU), ...; None: the CPU alone."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None else accelerator.type


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, numpy and torch inside the block; afterwards their states are restored.

    Of several GPUs, only the present one's generator is seeded: there is one of them for each process.

    Args:
        seed: numpy takes its last 32 bits.

    Example:
        >>> with seeded(1):
        ...     first = random.random()
        >>> with seeded(1):
        ...     random.random() == first
        True
    """
    pythons, numpys = random.getstate(), np.random.get_state()
    is_worker = torch.utils.data.get_worker_info() is not None  # which may not touch CUDA if it was forked
    kind = None if is_worker else _accelerator()
    devices = [torch.accelerator.current_device_index()] if kind else []
    with torch.random.fork_rng(devices, device_type=kind or "cuda"):
        # torch.manual_seed seeds all devices, and formats a call stack for each kind that is not in use: milliseconds a batch.
        torch.default_generator.manual_seed(seed)
        if kind:
            getattr(torch, kind).manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


@contextmanager
def seeded_build(seed: int) -> Iterator[None]:
    """The context in which a base is built: it may train, and depends on no device, precision or draw of the caller.

    Inside the block the global generators are seeded, the default dtype is float32 and the default device the CPU.
    """
    before = torch.get_default_dtype()
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), seeded(seed):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def derive_seed(*parts: object) -> int:
    """A seed for torch's generators that depends on the parts alone: equal on every process, whatever else was drawn.

    Example:
        >>> derive_seed(0, 1, "fc") == derive_seed(0, 1, "fc") != derive_seed(0, 2, "fc")
        True
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
