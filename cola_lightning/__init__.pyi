"""The public names, with where each is defined: type checkers read this file, and ``__init__.py`` imports by it."""

from .adapted_model import AdaptedModel as AdaptedModel
from .callbacks.chain_of_lora import ChainOfLoRA as ChainOfLoRA
from .callbacks.last_checkpoint import LastCheckpoint as LastCheckpoint
from .callbacks.prediction_writer import PredictionWriter as PredictionWriter
from .chain.chain import Chain as Chain
from .chain.chain import Link as Link
from .chain.schedule import ChainSchedule as ChainSchedule
from .data.base import EpochDataModule as EpochDataModule
from .data.classification import TextClassificationDataModule as TextClassificationDataModule
from .data.examples import Example as Example
from .data.images import ImageDataModule as ImageDataModule
from .data.preferences import PreferenceDataModule as PreferenceDataModule
from .data.tasks import PromptDataModule as PromptDataModule
from .data.templates import TemplateDataModule as TemplateDataModule
from .data.text import TextDataModule as TextDataModule
from .errors import HubError as HubError
from .errors import UserError as UserError
from .hf.causal_lm import COLACausalLM as COLACausalLM
from .hf.classifier import COLASequenceClassifier as COLASequenceClassifier
from .hf.image_classifier import COLAImageClassifier as COLAImageClassifier
from .hf.preference import COLAPreferenceLM as COLAPreferenceLM
from .hf.transformers_module import StepOutput as StepOutput
from .hf.transformers_module import TransformersModule as TransformersModule
from .lora.config import LoRAConfig as LoRAConfig
from .lora.inject import inject_lora as inject_lora
from .lora.inject import register_lora_layer as register_lora_layer
from .lora.layer import LoRALayer as LoRALayer
from .lora.layer import lora_layers as lora_layers
from .lora.layer_types import LoRALinear as LoRALinear
from .module.module import COLAModule as COLAModule

__version__: str
