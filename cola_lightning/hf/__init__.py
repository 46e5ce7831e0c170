"""Lightning modules around models of Hugging Face's transformers."""

from cola_lightning.hf.causal_lm import COLACausalLM
from cola_lightning.hf.classifier import COLASequenceClassifier
from cola_lightning.hf.image_classifier import COLAImageClassifier
from cola_lightning.hf.language import LanguageModule, StepOutput
from cola_lightning.hf.preference import COLAPreferenceLM

__all__ = ["COLACausalLM", "COLAImageClassifier", "COLAPreferenceLM", "COLASequenceClassifier", "LanguageModule", "StepOutput"]
