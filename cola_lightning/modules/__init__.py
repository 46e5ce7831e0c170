"""Lightning modules that own a base model and its chain."""

from cola_lightning.modules.base import COLAModule
from cola_lightning.modules.checkpoint import base_from_checkpoint
from cola_lightning.modules.keeper import CHECKPOINT_KEY

__all__ = ["CHECKPOINT_KEY", "COLAModule", "base_from_checkpoint"]
