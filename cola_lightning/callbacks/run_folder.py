"""Where a run writes its files."""

import os

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> str:
    """The folder that holds the run's ``checkpoints``, derived from the first logger as in ModelCheckpoint.

    With most loggers, such as WandbLogger, ``trainer.log_dir`` is the same for all runs. Must be called on all processes (the
    result is the first one's), once the loggers are initialised: from ``setup`` on.
    """
    folder = trainer.default_root_dir
    if (logger := trainer.logger) is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(folder if logger.save_dir is None else logger.save_dir, str(logger.name), version)
    return trainer.strategy.broadcast(folder)
