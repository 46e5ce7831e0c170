"""A trained model as a plain model, a PEFT adapter or a chain folder; each is loaded again and compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cola_lightning.chain.chain import Chain
from cola_lightning.errors import ExportError, UserError
from cola_lightning.export.adapter import export_adapter
from cola_lightning.export.card import FOLDER, save_tokenizer, write_card
from cola_lightning.export.model import TrainedModel
from cola_lightning.export.options import ExportOptions
from cola_lightning.export.verify import ReferenceLogits, loading_again, prove_merged, reference_logits
from cola_lightning.hub import quiet
from cola_lightning.lora.layer import is_quantized_model
from cola_lightning.merge import free
from cola_lightning.writing import atomic_folder

STATE_DICT_NAME = "model.safetensors"


def export_model(model: TrainedModel, options: ExportOptions) -> list[str]:
    """Writes a plain model or a PEFT adapter.

    Args:
        model: the model, which is used up.
        options: format, folder and checks.

    Returns:
        The lines to report.

    Raises:
        UserError: for a folder that is not empty, or a model that cannot be exported in this format.
        ExportError: for an export that differs from the model; it is removed.
    """
    model = replace(model, chain=model.chain.trained())
    options.check(model.base_name if model.named_base is None else model.named_base.model_name)
    if options.format == "peft":
        _check_links(options, has_links=bool(model.chain.links))
    with quiet():
        lines = _export_merged(model, options) if options.format == "merged" else export_adapter(model, options)
    if model.outside:
        lines.append(f"not exported, because it was trained outside of self.model: {', '.join(model.outside)}")
    return lines


def _check_links(options: ExportOptions, *, has_links: bool) -> None:
    if not has_links:
        raise UserError(
            f"format: without links (model.target_modules: null, or links: 0) only merged can be exported, got {options.format}"
        )


def export_chain(chain: Chain, options: ExportOptions) -> list[str]:
    """Writes a chain folder, for which no model is needed; see :func:`export_model`."""
    chain = chain.trained()
    options.check(chain.base.name)
    _check_links(options, has_links=bool(chain.base.weight_norms))
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


def _export_merged(trained: TrainedModel, options: ExportOptions) -> list[str]:
    """Writes a plain model: a Hugging Face folder with its tokenizer, or else the state dict in ``model.safetensors``."""
    from transformers import PreTrainedModel

    adapted, named_base = trained.adapted, trained.named_base
    was_quantized = is_quantized_model(adapted.model)
    adapted.upcast()
    reference = reference_logits(adapted.model, trained.example) if options.verify else None
    dtype = options.dtype or ("float32" if named_base is None else named_base.dtype)
    model: Any = adapted.merged_model(dtype=getattr(torch, dtype), in_place=True)
    if trained.prompt_format.get("kind") in ("response", "text") and hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = trained.stop_tokens(model.generation_config.eos_token_id) or None
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        if isinstance(model, PreTrainedModel):  # other libraries' save_pretrained has arguments of its own
            model.save_pretrained(partial)
            name = type(model).__name__
            loading = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{FOLDER}")'
            write_card(partial, trained, "merged model", loading)
            save_tokenizer(trained.tokenizer, partial)
        else:  # clones: a tied weight is written under each of its names, so that load_state_dict finds them all
            seen, tensors = set[int](), dict[str, torch.Tensor]()
            for name, value in model.state_dict().items():
                tensors[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
                seen.add(value.data_ptr())
            save_file(tensors, partial / STATE_DICT_NAME)
        lines = _check_written(trained, model, partial, reference) if options.verify else ["not compared"]
    return [*lines, f"4-bit weights were de-quantised, to {dtype}"] if was_quantized else lines


def _check_written(trained: TrainedModel, written: Any, folder: Path, reference: ReferenceLogits | None) -> list[str]:
    """Loads what is in the folder again, compares its logits with the module's, and proves its tensors.

    The written model is used up, so that no two models are in memory together.
    """
    from transformers import PreTrainedModel

    again = written
    with loading_again():
        if isinstance(written, PreTrainedModel):
            dtype = written.dtype
            free(written)
            again = type(written).from_pretrained(folder, dtype=dtype)
        else:
            again.load_state_dict(load_file(folder / STATE_DICT_NAME))
    lines = ["loaded again; no logits were compared, because no input is known"]
    if reference is not None:
        reference.copy_buffers(again)
        lines = [reference.compare(again, "loaded again")]
    free(again)
    return [*lines, prove_merged(trained, folder)] if trained.chain.links else lines
