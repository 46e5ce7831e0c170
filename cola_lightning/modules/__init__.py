"""Lightning modules that own a base model and its chain."""

from cola_lightning.modules.arguments import find_class
from cola_lightning.modules.base import COLAModule
from cola_lightning.modules.causal_lm import COLACausalLM
from cola_lightning.modules.language import LanguageModule, StepOutput
from cola_lightning.modules.sequence_classification import COLASequenceClassifier

__all__ = [
    "COLACausalLM",
    "COLAModule",
    "COLASequenceClassifier",
    "LanguageModule",
    "StepOutput",
    "find_class",
]
