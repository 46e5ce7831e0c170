"""English and Python as bytes."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from cola_lightning.data import PromptDataModule
from cola_lightning.data.splits import load_splits

ENGLISH = {"SQuAD": "context", "DROP": "passage", "BoolQ": "passage"}
ENGLISH_BYTES = 4_000_000  # at most: the complete data sets on the hub have ten times as many


def english_passages() -> Tensor:
    """The passages of SQuAD, DROP and BoolQ, each once, as one tensor of bytes.

    They are read from the sources of the tasks of the same names: ``$COLA_DATA_DIR``, else the Hugging Face hub.
    """
    passages: dict[str, None] = {}  # an ordered set
    for task, field in ENGLISH.items():
        data = PromptDataModule(task)
        splits = load_splits(data.source, data.subset, data.revision)
        for split in ("train", "validation"):
            passages |= dict.fromkeys(row.text(field) for row in splits[split]())
    return as_bytes("\n\n".join(passages).encode()[:ENGLISH_BYTES])


def python_sources() -> Tensor:
    """The modules of this Python's standard library, in the order of their names, as one tensor of bytes.

    Packages and modules generated for each machine are omitted.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_sysconfigdata"))
    return as_bytes(b"\n\n".join(path.read_bytes() for path in paths))


def as_bytes(text: bytes) -> Tensor:
    """The text as a tensor of type ``uint8``.

    Example:
        >>> as_bytes(b"def").tolist()
        [100, 101, 102]
    """
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
