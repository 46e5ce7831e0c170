"""The Lightning module that owns a base model and its chain."""

from cola_lightning.module.arguments import find_class
from cola_lightning.module.module import COLAModule

__all__ = ["COLAModule", "find_class"]
