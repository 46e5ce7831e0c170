"""A module's chain as a plain model, a PEFT adapter or a chain folder; each is loaded again and compared."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from cola_lightning.adapted_model import AdaptedModel, Placement
from cola_lightning.chain import Chain
from cola_lightning.chat_template import ChatTemplate, end_tokens
from cola_lightning.errors import ExportError, UserError
from cola_lightning.export.adapter import export_adapter
from cola_lightning.export.card import FOLDER, Card
from cola_lightning.export.options import ExportOptions
from cola_lightning.export.verify import ReferenceLogits, digest, loading_again, reference_logits
from cola_lightning.hub import quiet
from cola_lightning.lora.layer import is_quantized_model
from cola_lightning.merge import deep_copy, free
from cola_lightning.writing import atomic_folder

if TYPE_CHECKING:
    from cola_lightning.module.module import COLAModule

STATE_DICT_NAME = "model.safetensors"


def export_trained(
    module: "COLAModule", options: ExportOptions, prompt_format: Mapping[str, Any], data: Mapping[str, Any]
) -> list[str]:
    """Writes a module that may be in training, from a copy on the CPU; see :meth:`~cola_lightning.COLAModule.export`."""
    module.make_model()
    if options.format == "chain":
        return export_module(module, module.full_chain(), options)
    if module.is_sharded:  # to compare logits, every process would have to write
        raise UserError(
            f"format: a sharded model can only be exported as chain, got {options.format}. Use `cola export`, or "
            "load_from_checkpoint in one process, on a checkpoint"
        )
    adapted = copy.copy(module.adapted)
    adapted.model = deep_copy(module.adapted.model, device="cpu").cpu()
    adapted.placement = lambda: Placement(adapted.model, torch.device("cpu"), is_sharded=False)
    return export_module(module, module.full_chain(), options, adapted, prompt_format, data)


def export_module(
    module: "COLAModule | None",
    chain: Chain,
    options: ExportOptions,
    adapted: AdaptedModel | None = None,
    prompt_format: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes a module's model or chain.

    Args:
        module: the module; only read. None for a chain folder, which needs none.
        chain: the exported links.
        options: format, folder and checks.
        adapted: the module's model on the CPU, with the exported links and no other; it is upcast in place.
        prompt_format: how the data module prompted a language model (``EpochDataModule.prompt_format``); empty: it did not.
        data: which data the module was trained on (``EpochDataModule.identity``), for the model card.

    Returns:
        The lines to report.

    Raises:
        UserError: for a folder that is not empty, or a module that cannot be exported in this format.
        ExportError: for an export that differs from the module; it is removed.
    """
    named_base = None if module is None else module.named_base
    options.check(chain.base.name if named_base is None else named_base.model_name)
    if (options.format == "peft" and not chain.links) or (options.format == "chain" and not chain.base.weight_norms):
        raise UserError(
            f"format: without links (model.target_modules: null, or links: 0) only merged can be exported, got {options.format}"
        )
    if module is None or adapted is None:
        return _export_chain(chain, options)
    tokenizer = copy.deepcopy(getattr(module, "image_processor", None) or getattr(module, "tokenizer", None))
    card = Card(module, chain, tokenizer, options.license, dict(prompt_format or {}), dict(data or {}))
    with quiet():
        if options.format == "merged":
            lines = _export_merged(module, adapted, options, card)
        else:
            lines = export_adapter(module, adapted, chain, options, card)
    if outside := [name for name, value in module.adapted.trained.outside().items() if value.requires_grad]:
        lines.append(f"not exported, because it was trained outside of self.model: {', '.join(outside)}")
    return lines


def _export_chain(chain: Chain, options: ExportOptions) -> list[str]:
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        chain.write(partial)
        if not options.verify:
            return ["not compared"]
        with loading_again():
            again = Chain.load(partial)
        if len(again) != len(chain) or not again.is_beginning_of(chain):
            raise ExportError("the exported chain has other factors when it is loaded again, so the export was deleted")
        return [f"links: {len(chain)}; loaded again, their factors are the same to the bit"]


# ---------------------------------------------------------------------- a plain model


def _export_merged(module: "COLAModule", adapted: AdaptedModel, options: ExportOptions, card: Card) -> list[str]:
    """Writes a plain model: a Hugging Face folder with its tokenizer, or else the state dict in ``model.safetensors``."""
    from transformers import PreTrainedModel

    was_quantized = is_quantized_model(adapted.model)
    adapted.upcast()
    reference = reference_logits(adapted.model, module.example_input_array) if options.verify else None
    dtype = options.dtype or ("float32" if module.named_base is None else module.named_base.dtype)
    model: Any = adapted.merged_model(dtype=getattr(torch, dtype), in_place=True)
    tokenizer, prompt_format = card.tokenizer, card.prompt_format
    if prompt_format.get("kind") in ("response", "text") and hasattr(model, "generation_config"):  # ends as `cola generate`
        template = ChatTemplate(tokenizer, prompt_format.get("chat_template_kwargs", {}))
        ends = {*end_tokens(model, tokenizer), *(template.stop_tokens if prompt_format["chat_template"] else ())}
        model.generation_config.eos_token_id = sorted(ends) or None
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        if isinstance(model, PreTrainedModel):  # other libraries' save_pretrained has arguments of its own
            model.save_pretrained(partial)
            name = type(model).__name__
            loading = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{FOLDER}")'
            card.write(partial, "merged model", loading)
        else:  # clones: a tied weight is written under each of its names, so that load_state_dict finds them all
            seen, tensors = set[int](), dict[str, torch.Tensor]()
            for name, value in model.state_dict().items():
                tensors[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
                seen.add(value.data_ptr())
            save_file(tensors, partial / STATE_DICT_NAME)
        line = _load_again(model, partial, reference) if options.verify else "not compared"
    return [line, f"4-bit weights were de-quantised, to {dtype}"] if was_quantized else [line]


def _load_again(written: Any, folder: Path, reference: ReferenceLogits | None) -> str:
    """Compares what is loaded from the folder with the written model, to the bit, and with the module's logits.

    The written model is used up, so that the two are not in memory together.
    """
    from transformers import PreTrainedModel

    digests, again = {name: digest(value) for name, value in written.state_dict().items()}, written
    is_pretrained = isinstance(written, PreTrainedModel)
    with loading_again():
        if is_pretrained:
            dtype = written.dtype
            free(written)
            again = type(written).from_pretrained(folder, dtype=dtype)
        else:
            again.load_state_dict(load_file(folder / STATE_DICT_NAME))
    after = again.state_dict()
    if different := [name for name, expected in digests.items() if digest(after[name]) != expected]:
        raise ExportError(f"the exported {different[0]!r} has another value when it is loaded again, so the export was deleted")
    if reference is None:
        return "loaded again, the weights are the same to the bit; no logits were compared, because no input is known"
    reference.round_buffers(again)
    return reference.compare(again, "loaded again")
