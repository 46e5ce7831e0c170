"""Callbacks: knots, checkpoints, predictions, the progress bar, and interruption."""

from cola_lightning.callbacks.chain_of_lora import ChainOfLoRA, check_strategy
from cola_lightning.callbacks.last_checkpoint import LastCheckpoint
from cola_lightning.callbacks.prediction_writer import PredictionWriter, run_folder
from cola_lightning.callbacks.progress_bar import ChainProgressBar
from cola_lightning.callbacks.run_watch import Interruption, RunWatch

__all__ = [
    "ChainOfLoRA",
    "ChainProgressBar",
    "Interruption",
    "LastCheckpoint",
    "PredictionWriter",
    "RunWatch",
    "check_strategy",
    "run_folder",
]
