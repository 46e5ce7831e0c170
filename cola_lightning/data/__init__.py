"""Data modules; they import nothing of models or chains, and get what they need from the module that is trained."""

from cola_lightning.data.classification import TextClassificationDataModule
from cola_lightning.data.images import ImageDataModule
from cola_lightning.data.preferences import PreferenceDataModule
from cola_lightning.data.source import Source
from cola_lightning.data.tasks import PromptDataModule
from cola_lightning.data.templates import TemplateDataModule
from cola_lightning.data.text import TextDataModule

__all__ = [
    "ImageDataModule",
    "PreferenceDataModule",
    "PromptDataModule",
    "Source",
    "TemplateDataModule",
    "TextClassificationDataModule",
    "TextDataModule",
]
