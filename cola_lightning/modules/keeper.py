"""The small callback that every COLA module brings along.

It holds what a subclass could lose by overriding a hook without ``super()``: the chain in the checkpoint and its replay, the
counters at the start of a fit, each batch's seed, and the watch over the loss.
"""

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from typing_extensions import override

from cola_lightning.schedule import Counters, RunLength

if TYPE_CHECKING:
    from cola_lightning.modules.base import COLAModule

CHECKPOINT_KEY = "cola"


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the weights are as they were before that step."""


class ChainKeeper(Callback):
    """Keeps one module's chain through checkpoints, fits and batches."""

    def __init__(self, module: "COLAModule") -> None:
        self.module = module

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.module.run_length = None  # known again when training starts

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.module.chain_state()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.module.restore_chain(checkpoint)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = Counters(trainer.current_epoch, trainer.global_step)
        is_resumed = trainer.ckpt_path is not None
        self.module.start_run(run_length(trainer, Counters(0, 0) if is_resumed else now), None if is_resumed else now)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.module.seed is not None
        seed_batch(self.module.seed, trainer.global_rank, trainer.current_epoch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss is {loss.item()} at step {trainer.global_step} (epoch {trainer.current_epoch}), in link "
                f"{self.module.link}: a lower learning rate or trainer.gradient_clip_val may help; checkpoints are as they were"
            )


def seed_batch(seed: int, rank: int, epoch: int, batch_idx: int) -> None:
    """Seeds torch's global generators for one batch (its dropout), so that a resumed run draws what the first would have.

    This is the one place that touches the global generators.
    """
    digest = hashlib.sha256(f"{seed} {rank} {epoch} {batch_idx}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def run_length(trainer: Trainer, origin: Counters) -> RunLength:
    """How far the trainer's fit goes; to be asked once its data is set up."""
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]

    def steps_in_epoch(epoch: int) -> float:
        window = schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else trainer.accumulate_grad_batches
        batches = trainer.num_training_batches
        return batches if batches == math.inf else math.ceil(batches / window)

    max_epochs, max_steps = trainer.max_epochs, trainer.max_steps
    return RunLength(
        steps_in_epoch,
        max_epochs=math.inf if max_epochs is None or max_epochs < 0 else max_epochs,
        max_steps=math.inf if max_steps < 0 else max_steps,
        origin=origin,
    )
