"""The configuration of a run, beside its checkpoints."""

import os
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from cola_lightning.callbacks.prediction_writer import run_folder


class ConfigSaver(SaveConfigCallback):
    """Saves the run's configuration beside its checkpoints, once it is known to work: when its first epoch starts.

    A fit replaces an existing file; an evaluation, which may use the same folder, leaves the fit's. The checkpoint that the run
    resumed from is omitted: a later command with this configuration would use it in place of the run's own.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.already_saved:
            return
        self.already_saved, folder = True, run_folder(trainer)
        path, files = os.path.join(folder, self.config_filename), get_filesystem(folder)
        if trainer.is_global_zero and (trainer.state.fn == "fit" or not files.exists(path)):
            files.makedirs(folder, exist_ok=True)
            config = self.config.clone()
            config.ckpt_path = config.links = None  # another run's: this run's own checkpoints are beside the file
            self.parser.save(config, path, skip_none=False, overwrite=True, multifile=self.multifile)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: D102
        self._save(trainer, pl_module)

    on_validation_start = on_test_start = on_predict_start = _save
