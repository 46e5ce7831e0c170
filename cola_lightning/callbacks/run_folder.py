"""Where a run's own files lie."""

import os

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> str:
    """The folder that holds the run's ``checkpoints``: by the rule by which ModelCheckpoint makes that, from the first logger.

    ``trainer.log_dir`` is one for all runs with most loggers, WandbLogger among them. To be called on all processes (the result
    is the first one's), once the loggers have begun: from ``setup`` on.
    """
    folder = trainer.default_root_dir
    if (logger := trainer.logger) is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(folder if logger.save_dir is None else logger.save_dir, str(logger.name), version)
    return trainer.strategy.broadcast(folder)
