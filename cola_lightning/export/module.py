"""A module's chain as a plain model, a PEFT adapter or a chain folder; each is loaded again and compared.

A model card, with the hub's metadata, and the tokenizer are next to a model or an adapter.
"""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from cola_lightning import __version__
from cola_lightning.adapted_model import AdaptedModel, Placement
from cola_lightning.chain import Chain
from cola_lightning.chat_template import ChatTemplate, end_tokens, n_appended
from cola_lightning.constants import MAX_NEW_TOKENS
from cola_lightning.decoding import Decoding
from cola_lightning.errors import ExportError, UserError
from cola_lightning.export.adapter import FOLDER, export_adapter
from cola_lightning.export.verify import ExportOptions, ReferenceLogits, digest_of, loading_again, reference_logits
from cola_lightning.hub import is_repo_id, quiet
from cola_lightning.lora.layer import is_quantized_model
from cola_lightning.merge import deep_copy, free
from cola_lightning.writing import atomic_folder

STATE_DICT_NAME = "model.safetensors"
CARD_NAME = "README.md"
TEMPLATE = Path(__file__).parent / "card.md"  # for Jinja


def export_trained(module: Any, options: ExportOptions, prompt_format: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
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
    adapted.model = deep_copy(module.model, device="cpu").cpu()
    adapted.placement = lambda: Placement(adapted.model, torch.device("cpu"), is_sharded=False)
    return export_module(module, module.full_chain(), options, adapted, prompt_format, data)


def export_module(
    module: Any,
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
    named = None if module is None else module.named_base
    options.check(chain.base.name if named is None else named.model_name)
    if (options.format == "peft" and not chain.links) or (options.format == "chain" and not chain.base.weight_norms):
        raise UserError(
            f"format: without links (model.target_modules: null, or links: 0) only merged can be exported, got {options.format}"
        )
    if adapted is None:
        return _export_chain(chain, options)
    tokenizer = copy.deepcopy(getattr(module, "tokenizer", None))
    card = Card(module, chain, tokenizer, options.license, dict(prompt_format or {}), dict(data or {}))
    with quiet():
        if options.format == "merged":
            lines = _export_merged(module, adapted, options, card)
        else:
            lines = export_adapter(module, adapted, chain, options, card.write)
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


# ---------------------------------------------------------------------- a model card


@dataclass(frozen=True)
class Card:
    """The model card of an export.

    Args:
        module: the exported module.
        chain: the exported links.
        tokenizer: the module's, which is written too; None: it has none.
        license: the hub's identifier, such as ``apache-2.0``; None: not stated.
        prompt_format: how the model was prompted (``EpochDataModule.prompt_format``); empty: it was not.
        data: which data it was trained on (``EpochDataModule.identity``).
    """

    module: Any
    chain: Chain
    tokenizer: Any
    license: str | None
    prompt_format: dict[str, Any]
    data: dict[str, Any]

    def write(self, folder: Path, kind: str, loading: str) -> None:
        """Writes the card and the tokenizer.

        Args:
            folder: of the export.
            kind: ``merged model``, ``PEFT adapter``, ...
            loading: Python code that loads the export, for a model that is not prompted.
        """
        from huggingface_hub import ModelCard, ModelCardData

        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
        pretrained = self.module.named_base
        base = self.module.base_name if pretrained is None else pretrained.model_name
        arguments = self.module.constructor_arguments | {"data": self.data}
        arguments = {name: arguments[name] for name in ("class_path", "init_args", "data") if arguments[name]}
        data = ModelCardData(
            base_model=base if pretrained is not None and is_repo_id(base) and not os.path.isdir(base) else None,
            library_name="peft" if kind.startswith("PEFT") else "transformers",
            license=self.license,
            tags=["lora", "chain-of-lora", "cola_lightning"],
        )
        card = ModelCard.from_template(
            data,
            str(TEMPLATE),
            base=base,
            kind=kind,
            version=__version__,
            loading=loading,
            prompt_format={"chat_template_kwargs": {}} | self.prompt_format,
            n_appended=n_appended(self.tokenizer) if self.prompt_format else 0,
            max_new_tokens=MAX_NEW_TOKENS if self.prompt_format.get("kind") == "answer" else Decoding.max_new_tokens,
            dumps=lambda value: json.dumps(value, ensure_ascii=False),
            links=self.chain.links,
            metrics=list(dict.fromkeys(name for link in self.chain.links for name in link.metrics)),
            arguments=yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True).strip(),
        )
        card.save(folder / CARD_NAME)


# ---------------------------------------------------------------------- a plain model


def _export_merged(module: Any, adapted: AdaptedModel, options: ExportOptions, card: Card) -> list[str]:
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

    before, again = {name: digest_of(value) for name, value in written.state_dict().items()}, written
    is_of_transformers = isinstance(written, PreTrainedModel)
    with loading_again():
        if is_of_transformers:
            dtype = written.dtype
            free(written)
            again = type(written).from_pretrained(folder, dtype=dtype)
        else:
            again.load_state_dict(load_file(folder / STATE_DICT_NAME))
    after = again.state_dict()
    if different := [name for name, digest in before.items() if digest_of(after[name]) != digest]:
        raise ExportError(f"the exported {different[0]!r} has another value when it is loaded again, so the export was deleted")
    if reference is None:
        return "loaded again, the weights are the same to the bit; no logits were compared, because no input is known"
    return reference.compare(again, "loaded again")
