"""Lightning modules that own a base model and its chain."""

from cola_lightning.modules.base import COLAModule
from cola_lightning.modules.checkpoint import CHECKPOINT_KEY, base_from_checkpoint

__all__ = ["CHECKPOINT_KEY", "COLAModule", "base_from_checkpoint"]
