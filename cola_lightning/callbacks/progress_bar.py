"""The command line's progress bar."""

from typing import Any

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

WIDE = 100  # columns


class ChainProgressBar(RichProgressBar):
    """Lightning's progress bar with the current link's index, and one bar at a time: validation's replaces training's."""

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)
        return columns if rich.get_console().width >= WIDE else columns[:-1]  # without batches per second

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    @property
    @override
    def total_train_batches(self) -> int | float:
        """This epoch's batches in all. Lightning's own number leaves out those before a resume, and takes steps for batches."""
        trainer, n_batches, window = self.trainer, self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        n_steps = trainer.max_steps - trainer.global_step if trainer.max_steps > 0 else n_batches
        done = (trainer.fit_loop.batch_idx + 1) % n_batches // window * window  # of an epoch that is over: 0
        return min(n_batches, done + n_steps * window)

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        """Replaces Lightning's, whose last epoch is -2 if ``max_steps`` limits the run."""
        link, max_epochs = getattr(self.trainer.lightning_module, "link", 0), self.trainer.max_epochs
        last = f"/{max_epochs - 1}" if max_epochs is not None and max_epochs > 0 else ""
        return f"link {link}, epoch {current_epoch}{last}"

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        description = self._get_train_description(trainer.current_epoch)
        if self.progress is not None and self.train_progress_bar_id is not None:  # a knot comes after the epoch's start
            self.progress.update(self.train_progress_bar_id, description=description)

    def _show_training(self, *, is_shown: bool) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, visible=is_shown)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._show_training(is_shown=False)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_training(is_shown=True)
        super().on_validation_end(trainer, pl_module)
