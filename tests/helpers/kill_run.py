"""A callback that writes down what a run does, and kills it at a chosen moment; for a run in a process of its own."""

import hashlib
import io
import json
import os
import time
from signal import Signals
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning_utilities.core.apply_func import apply_to_collection

Hook = Literal["batch start", "backward", "optimizer step", "batch end", "validation", "checkpoint"]


class Recorder(Callback):
    """Appends a JSON line for each training batch and each validation, numbers as ``float.hex``; sends one signal at most.

    It has no state: nothing of it is in a checkpoint.

    Args:
        path: the file.
        kill: where in the run the signal is sent: at a batch's ``batch start`` (after a knot), after its ``backward``, before
            its ``optimizer step``, at its ``batch end``; in the middle of the ``validation`` that follows it; or, from it on,
            when half of a ``checkpoint`` is written. ``null``: nowhere.
        at: the batch: its epoch, and its place in the epoch.
        signal: the signal's name; SIGINT goes to the whole process group, so the run needs one of its own.
    """

    def __init__(self, path: str, kill: Hook | None = None, at: tuple[int, int] = (0, 0), signal: str = "SIGKILL") -> None:
        self.path, self.kill, self.at, self.signal = path, kill, tuple(at), Signals[signal]
        self.place = (-1, -1)
        self.begun: dict[str, Any] = {}

    def setup(self, trainer, module, stage):
        if self.kill == "checkpoint":
            torch.save = self._saving_by_halves(torch.save)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.place = (trainer.current_epoch, batch_idx)
        counters = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "global_step": trainer.global_step,
            "link": module.n_finished,
        }
        rates = [group["lr"].hex() for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.begun = {**counters, "rates": rates, "rows": digest(batch)}  # now: at the batch's end they are the next step's
        self._reach("batch start")

    def on_after_backward(self, trainer, module):
        self._reach("backward")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self._reach("optimizer step")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        has_stepped = trainer.global_step > self.begun["global_step"]
        self._write({"event": "batch", **self.begun, "loss": outputs["loss"].item().hex(), "has_stepped": has_stepped})
        self._reach("batch end")

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1 and not trainer.sanity_checking:
            self._reach("validation")

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            metrics = {name: value.item().hex() for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
            counters = {"epoch": trainer.current_epoch, "global_step": trainer.global_step}
            self._write({"event": "validation", **counters, "metrics": metrics})

    def _write(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _reach(self, hook):
        is_there = self.place >= self.at if hook == "checkpoint" else self.place == self.at
        if self.kill == hook and is_there:
            self.kill = None
            if self.signal == Signals.SIGINT:  # a terminal's Ctrl-C, which the data workers get, too
                os.killpg(os.getpgid(0), self.signal)
            else:
                os.kill(os.getpid(), self.signal)
            time.sleep(0.3)  # what becomes of the workers is felt here, as it would be in a step that takes its time

    def _saving_by_halves(self, save):
        def save_by_halves(obj, file, *arguments, **keywords):
            save(obj, buffer := io.BytesIO(), *arguments, **keywords)
            half = len(buffer.getvalue()) // 2
            file.write(buffer.getvalue()[:half])
            file.flush()
            self._reach("checkpoint")
            file.write(buffer.getvalue()[half:])

        return save_by_halves


def digest(batch):
    """A hash of a batch, tensors by their values."""
    plain = apply_to_collection(batch, torch.Tensor, lambda tensor: (str(tensor.dtype), tensor.tolist()))
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:16]
