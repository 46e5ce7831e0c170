"""Chain of LoRA (COLA) for PyTorch Lightning: fine-tuning by a chain of low-rank updates.

Names are imported when first used, so that ``import cola_lightning`` takes no time and needs no library.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptedModel": "adapted_model",
    "COLACausalLM": "modules.causal_lm",
    "COLADigits": "modules.digits",
    "COLAModule": "modules.base",
    "COLASequenceClassifier": "modules.sequence_classification",
    "Chain": "chain.chain",
    "ChainOfLoRA": "callbacks.chain_of_lora",
    "ChainSchedule": "chain.schedule",
    "DigitsDataModule": "data.digits",
    "EpochDataModule": "data.base",
    "Example": "data.examples",
    "HubError": "errors",
    "LanguageModule": "modules.language",
    "LastCheckpoint": "callbacks.last_checkpoint",
    "Link": "chain.link",
    "LoRALayer": "lora.registry",
    "LoRALinear": "lora.registry",
    "OptionDataModule": "data.prompts",
    "PredictionWriter": "callbacks.prediction_writer",
    "PromptDataModule": "data.prompts",
    "ReviewsDataModule": "data.reviews",
    "StepOutput": "modules.language",
    "TemplateDataModule": "data.templates",
    "TextClassificationDataModule": "data.classification",
    "TextDataModule": "data.text",
    "UserError": "errors",
    "base_from_checkpoint": "modules.pending",
    "inject_lora": "lora.inject",
    "lora_layers": "lora.inject",
    "register_lora_layer": "lora.registry",
    "strip_lora": "lora.inject",
}

__all__ = [
    "AdaptedModel",
    "COLACausalLM",
    "COLADigits",
    "COLAModule",
    "COLASequenceClassifier",
    "Chain",
    "ChainOfLoRA",
    "ChainSchedule",
    "DigitsDataModule",
    "EpochDataModule",
    "Example",
    "HubError",
    "LanguageModule",
    "LastCheckpoint",
    "Link",
    "LoRALayer",
    "LoRALinear",
    "OptionDataModule",
    "PredictionWriter",
    "PromptDataModule",
    "ReviewsDataModule",
    "StepOutput",
    "TemplateDataModule",
    "TextClassificationDataModule",
    "TextDataModule",
    "UserError",
    "base_from_checkpoint",
    "inject_lora",
    "lora_layers",
    "register_lora_layer",
    "strip_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
