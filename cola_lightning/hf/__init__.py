"""Lightning modules around models of Hugging Face's transformers."""

from cola_lightning.hf.causal_lm import COLACausalLM
from cola_lightning.hf.classifier import COLASequenceClassifier
from cola_lightning.hf.language import LanguageModule, StepOutput

__all__ = ["COLACausalLM", "COLASequenceClassifier", "LanguageModule", "StepOutput"]
