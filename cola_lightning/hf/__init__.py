"""Lightning modules around models of Hugging Face's transformers; the command line knows the classes by their names alone."""

from cola_lightning.hf import causal_lm, classifier, image_classifier, preference

__all__ = ["causal_lm", "classifier", "image_classifier", "preference"]
