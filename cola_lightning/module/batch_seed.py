"""Seeds for the batches of a run: a resumed run draws what an uninterrupted one would."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cola_lightning.module.run import run_of
from cola_lightning.seeding import derive_seed, seeded

if TYPE_CHECKING:
    from cola_lightning.module.module import COLAModule


class BatchSeed(Callback):
    """Seeds the global generators for each training batch, and each batch of a fit's validation, and restores them after it.

    The seed of a batch depends on the module's seed and on the batch's place: process, epoch and index; in a validation it is
    process, optimizer step, loader and index. Fits of a module that has been trained before draw other numbers than those did.

    Args:
        module: the module of the fit.
    """

    def __init__(self, module: "COLAModule") -> None:
        self.module = module
        self._batch = ExitStack()  # the scope of the batch's seed

    def _begin(self, *place: object) -> None:
        self._batch.close()
        assert self.module.seed is not None
        n_before = run_of(self.module).n_before
        self._batch.enter_context(seeded(derive_seed(self.module.seed, *place, *[f"after {n_before}"] * (n_before > 0))))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin(trainer.global_rank, trainer.current_epoch, batch_idx)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if run_of(self.module).is_validating:
            self._begin("validation", trainer.global_rank, trainer.global_step, dataloader_idx, batch_idx)

    def _end(self, *args: Any, **kwargs: Any) -> None:
        self._batch.close()

    on_train_batch_end = on_validation_batch_end = teardown = on_exception = _end
    on_train_epoch_end = _end  # of an epoch that a hook has cut short
