"""The files of this package whose code runs in a training step, a knot, a save and a load, and the exports.

    python benchmarks/files.py

counts them on a tiny Llama and a fit of two steps: the fewer, the sooner a reader has seen all of a thing.
"""

import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests' tiny models

import cola_lightning
from cola_lightning import COLACausalLM
from tests import tiny
from tests.toy import trainer

PACKAGE = Path(cola_lightning.__file__).parent


FILES: dict[str, set[str]] = {}  # by what runs them


@contextmanager
def traced(what: str):
    """Inside the block, records the package's files whose functions are called."""
    found, before = FILES.setdefault(what, set()), sys.getprofile()

    def record(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(f"{PACKAGE}/") and frame.f_code.co_name != "<module>":
            found.add(str(Path(path).relative_to(PACKAGE)))

    sys.setprofile(record)
    try:
        yield
    finally:
        sys.setprofile(before)


class Steps(COLACausalLM):
    """A module whose training steps and knots are traced."""

    def training_step(self, batch, batch_idx):
        """Traced."""
        with traced("a training step"):
            return super().training_step(batch, batch_idx)

    def tie_knot(self, **arguments):
        """Traced."""
        with traced("a knot"):
            return super().tie_knot(**arguments)


class Saves(Callback):
    """Writes a checkpoint at the end of a fit, traced."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        """Saves and loads, traced."""
        with traced("save and load"):
            trainer.save_checkpoint(self.path)


def run(folder):
    """A fit with a knot, its checkpoint, and the exports of what is loaded."""
    path = folder / "last.ckpt"
    module = Steps(tiny.folder(folder / "model"), target_modules=["q_proj"], rank=2, seed=0)
    ids = torch.arange(8).repeat(4, 1)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    fit = trainer(folder, Saves(path), chain={"every_n_train_steps": 1}, max_steps=2, limit_val_batches=0)
    fit.fit(module, DataLoader(rows, batch_size=2))
    with traced("save and load"):
        loaded = Steps.load_from_checkpoint(path)
    for format in ("peft", "merged"):
        with traced(f"an export, {format}"):
            loaded.export(folder / format, format)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        run(Path(name))
    for what, files in FILES.items():
        print(f"{what}: {len(files)} files\n    {', '.join(sorted(files))}")
