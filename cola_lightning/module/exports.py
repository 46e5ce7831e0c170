"""A module as an export needs it."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cola_lightning.errors import UserError
from cola_lightning.export.model import TrainedModel
from cola_lightning.export.module import export_chain, export_model
from cola_lightning.export.options import ExportOptions
from cola_lightning.module.late import LateModel
from cola_lightning.module.state import described_data


def export(module: LateModel, options: ExportOptions) -> list[str]:
    """Exports a module that may be in training, from a copy on the CPU; see :meth:`COLAModule.export`."""
    module.make_model()
    run = module.run
    if options.format == "chain":
        return export_chain(module.full_chain(), options)
    if run.is_sharded:  # to compare logits, every process would have to write
        raise UserError(f"format: export a sharded model as chain, or its checkpoint by `cola export`, got {options.format}")
    model = trained_model(module, described_data(run, "prompt_format"), described_data(run, "identity"))
    return export_model(replace(model, adapted=run.adapted.copy_on_cpu()), options)


def trained_model(module: LateModel, prompt_format: Mapping[str, Any], data: Mapping[str, Any]) -> TrainedModel:
    """A module's model, which an export would use up.

    Args:
        module: the module.
        prompt_format: how the data module prompts the model (``EpochDataModule.prompt_format``); empty: it does not.
        data: which data the model was trained on (``EpochDataModule.identity``).
    """
    adapted, arguments = module.adapted, module.run.arguments
    return TrainedModel(
        adapted=adapted,
        chain=module.full_chain(),
        base_name=module.base_name,
        named_base=module.named_base,
        tokenizer=copy.deepcopy(getattr(module, "image_processor", None) or getattr(module, "tokenizer", None)),
        example=module.example_input_array,
        arguments={"class_path": arguments.class_path, "init_args": arguments.init_args},
        prompt_format=prompt_format,
        data=data,
        outside=[name for name, value in adapted.trained.outside().items() if value.requires_grad],
    )
