"""Data modules; they know nothing of models or chains."""

from cola_lightning.data.digits import DigitsDataModule

__all__ = ["DigitsDataModule"]
