"""A language model with random weights, and the package's module around it: nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from typing_extensions import override

from cola_lightning import COLACausalLM

# Options of a Trainer that writes and shows nothing.
SILENT: dict[str, Any] = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)


def build(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of a config, with the same weights at each call.

    Args:
        config: its sizes.
        options: arguments of ``AutoModelForCausalLM.from_config``, for example ``dtype``.
    """
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
    return model


class RandomCausalLM(COLACausalLM):
    """The package's module around a model with random weights; the model's name stands for nothing.

    Args:
        make_base: builds the model.
        arguments: the arguments of :class:`~cola_lightning.COLACausalLM`.
    """

    def __init__(self, make_base: Callable[[], PreTrainedModel], **arguments: Any) -> None:
        defaults: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 16, "seed": 0}
        super().__init__("random", **defaults | arguments)
        self.make_base = make_base

    @override
    def build_model(self) -> PreTrainedModel:
        model = self.make_base()
        if self.quantization is not None:
            self.quantize_base(model)
        return model
