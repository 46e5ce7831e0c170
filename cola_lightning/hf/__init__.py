"""Lightning modules around models of Hugging Face's transformers."""

from cola_lightning.hf.causal_lm import COLACausalLM
from cola_lightning.hf.classifier import COLASequenceClassifier
from cola_lightning.hf.image_classifier import COLAImageClassifier
from cola_lightning.hf.preference import COLAPreferenceLM
from cola_lightning.hf.transformers_module import StepOutput, TransformersModule

__all__ = [
    "COLACausalLM",
    "COLAImageClassifier",
    "COLAPreferenceLM",
    "COLASequenceClassifier",
    "StepOutput",
    "TransformersModule",
]
