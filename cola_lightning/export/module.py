"""A module's chain as a plain model, a PEFT adapter or a chain folder."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cola_lightning.chain import Chain
from cola_lightning.chain.store import write_files
from cola_lightning.errors import ExportError, UserError
from cola_lightning.export.adapter import AdapterBase, export_adapter
from cola_lightning.export.card import PROMPT_FORMAT, Card, usage_section
from cola_lightning.export.merged import export_merged, is_of_transformers
from cola_lightning.export.verify import ExportOptions, ReferenceLogits, reference_logits
from cola_lightning.hub import quiet
from cola_lightning.lora.inject import lies_in, lora_layers
from cola_lightning.lora.layer import LoRALayer
from cola_lightning.lora.linear4bit import is_quantized, is_quantized_model
from cola_lightning.seeding import derive_seed, seeded
from cola_lightning.turns import ChatTemplate, end_tokens, n_appended
from cola_lightning.weights import cast_floats, deep_copy
from cola_lightning.writing import whole_folder


def export_trained(module: Any, options: ExportOptions, prompt_format: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """Writes a module that may be in training, from a copy on the CPU; see :meth:`~cola_lightning.COLAModule.export`."""
    module.configure_model()
    options.check()
    if module.is_sharded and options.format != "chain":  # to compare logits, every process would have to write
        raise UserError(
            f"format: expected chain for a sharded model, received {options.format}: `cola export`, or "
            "load_from_checkpoint in one process, exports it from a checkpoint"
        )
    own = module if options.format == "chain" else deep_copy(module, is_on_cpu=True).cpu()
    return export_module(own, module.full_chain(), options, prompt_format, data)


def export_module(
    module: Any,
    chain: Chain,
    options: ExportOptions,
    prompt_format: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes a module's model or chain.

    Args:
        module: on the CPU, with the exported links and no other; it is upcast in place. For the format ``chain``: any.
        chain: the exported links.
        options: format, folder and checks.
        prompt_format: how the data module prompted a language model (``EpochDataModule.prompt_format``); None: it did not.
        data: which data the module was trained on (``EpochDataModule.identity``), for the model card.

    Returns:
        The lines to report.

    Raises:
        UserError: for a folder that is not empty, or a module that cannot be exported in this format.
        ExportError: for an export that differs from the module; it is removed.
    """
    if module.target_modules is None and options.format != "merged":
        raise UserError(
            f"format: expected merged for a module without links (model.target_modules: null), received {options.format}"
        )
    base_name = module.pretrained.model_name if hasattr(module, "pretrained") else module.base_name
    options.check(base_name)
    if options.format == "chain":
        return export_chain(chain, options)
    n = n_appended(module.tokenizer) if prompt_format else 0
    usage = usage_section(prompt_format or {}, is_adapter=options.format == "peft", n_appended=n) or None
    card = Card(base_name, chain, module.constructor_arguments | {"data": dict(data or {})}, options.license, usage)
    rounding = _rounding(module.model)
    with quiet():
        if prompt_format:  # `cola generate` reads it in the tokenizer's configuration
            module.tokenizer.init_kwargs[PROMPT_FORMAT] = dict(prompt_format)
        if options.format == "merged":
            model, note = _merged_model(module, options.dtype, prompt_format)
            reference = _reference(module, options)
            return [export_merged(model, options, reference, tokenizer=getattr(module, "tokenizer", None), card=card), *note]
        # First: it upcasts the module, whose base then is the one that was trained on.
        reference = _reference(module, options)
        pretrained = hasattr(module, "pretrained")
        base = _pretrained_base(module, options, reference, rounding) if pretrained else _built_base(module, options)
        return export_adapter(chain, base, options, reference, card=card)


def export_chain(chain: Chain, options: ExportOptions) -> list[str]:
    """Writes a chain folder; the errors are those of :func:`export_module`."""
    with whole_folder(options.folder, overwrite=options.overwrite) as partial:
        write_files(chain.links, chain.base, partial)
        if not options.verify:
            return ["not compared"]
        again = Chain.load(partial)
        if len(again) != len(chain) or not again.is_beginning_of(chain):
            raise ExportError("the chain was loaded again with other factors than were written: it is not kept")
        return [f"{len(chain)} links; loaded again, their factors are the same to the bit"]


def _reference(module: Any, options: ExportOptions) -> ReferenceLogits | None:
    """Inputs and the module's logits; the module is upcast in place, to float32 at least."""
    if not options.verify:
        return None
    module.upcast()
    return reference_logits(module.model, module.example_input_array)


# ---------------------------------------------------------------------- a plain model


def _merged_model(module: Any, dtype: str | None, prompt_format: Mapping[str, Any] | None) -> tuple[Any, list[str]]:
    """The merged model in the dtype to be written, with the tokens at which its text ends; and lines to report."""
    model, dtypes = module.merged_model(), module.adapted.chain.base.dtypes
    if not is_of_transformers(model):
        dtypes = sorted({*dtypes, *_dtypes_beside(module.model)})
    if was_quantized := is_quantized_model(module.model):
        dtypes = [module.pretrained.dtype if hasattr(module, "pretrained") else "float32"]
    dtype = dtype or (dtypes[0] if len(dtypes) == 1 else None)  # the links are in float32; the base need not be
    if dtype is not None:
        cast_floats(model, getattr(torch, dtype))
    if prompt_format and prompt_format["kind"] in ("response", "text") and hasattr(model, "generation_config"):
        # So that a server ends a response or a text where `cola generate` does.
        ends = set(end_tokens(model, module.tokenizer))
        if prompt_format["chat_template"]:
            ends.update(ChatTemplate(module.tokenizer, prompt_format.get("chat_template_kwargs", {})).stop_tokens)
        model.generation_config.eos_token_id = sorted(ends) or None
    return model, [f"4-bit weights were de-quantised, to {dtype}"] if was_quantized else []


def _dtypes_beside(model: nn.Module) -> set[str]:
    """The dtypes of the parameters that are not adapted, such as ``float32``."""
    parts = (part for part in model.modules() if not isinstance(part, LoRALayer))
    parameters = (parameter for part in parts for parameter in part.parameters(recurse=False))
    return {str(parameter.dtype).removeprefix("torch.") for parameter in parameters if parameter.is_floating_point()}


# ---------------------------------------------------------------------- the base of an adapter


class _Rounding(NamedTuple):
    """What training has rounded a module's base to, which an upcast forgets: half precisions, and weights in 4 bits."""

    dtypes: list[torch.dtype]
    kinds: list[str]  # nf4, fp4
    quantized: list[str]  # names of weights


def _rounding(model: nn.Module) -> _Rounding:
    layers = lora_layers(model).values()
    dtypes = sorted({layer.dtype for layer in layers if layer.is_narrowed}, key=str)
    kinds = sorted({layer.source_dtype for layer in layers if is_quantized(layer)})
    return _Rounding(dtypes, kinds, [f"{name}.weight" for name, part in model.named_modules() if is_quantized(part)])


def _built_base(module: Any, options: ExportOptions) -> AdapterBase:
    """The base that a module's own code builds."""
    builder = f"{type(module).__module__}.{type(module).__qualname__}"
    if options.base_folder is not None:
        raise UserError(
            f"base_folder: expected none for a {type(module).__name__}, whose base is not loaded by transformers, received "
            f"{str(options.base_folder)!r}"
        )
    hint = f"peft cannot find the one that {builder} builds: give it merged_model(0) of the module"
    return AdapterBase(
        module.merged_model(0),
        module.base_name,
        where=f", on the base that {builder} builds",
        saved=module.modules_to_save,
        hints=[hint] if module.base_name == builder else [],  # else it was named by the user
    )


def _pretrained_base(
    module: Any, options: ExportOptions, reference: ReferenceLogits | None, rounding: _Rounding
) -> AdapterBase:
    """The base that transformers loads, compared with the one that its name gives; written, if a folder for it is given."""
    pretrained, model, hints, where = module.pretrained, module.merged_model(0), list[str](), ""
    saved = [*module.modules_to_save, *pretrained.new_modules(model, module.new_weights)]
    if (folder := options.base_folder) is not None:
        if not folder.is_dir() or not any(folder.iterdir()):  # else it must hold the base, which is checked below
            written = copy.deepcopy(model)
            cast_floats(written, getattr(torch, pretrained.dtype))
            export_merged(written, ExportOptions(folder, "merged"), tokenizer=module.tokenizer)
            hints.append(f"written to {folder}")
        pretrained = replace(pretrained, model_name=str(folder.absolute()), revision=None, gguf_file=None)
    if not pretrained.is_found_by_name:
        hints.append(
            f"peft cannot load {pretrained.model_name!r} by that name: base_folder (--base_folder DIR) writes one that it can"
        )
    fields = {name: value for name, value in module.model_fields().items() if name == "num_labels"}
    if fields and model.config.pad_token_id is not None:  # where a text ends
        fields["pad_token_id"] = model.config.pad_token_id
    if options.verify:
        where = f", on {pretrained.model_name!r}, loaded by its name"
        model = _named_base(module, pretrained, model, fields, reference, saved, rounding)
    dtype = str(rounding.dtypes[0]).removeprefix("torch.") if rounding.dtypes else pretrained.dtype
    as_trained = {"dtype": dtype} | fields
    if rounding.kinds:  # de-quantised to compare
        as_trained |= {"load_in_4bit": True, "bnb_4bit_quant_type": rounding.kinds[0]}
    hints.append("loaded in training with " + ", ".join(f"{name}={value!r}" for name, value in as_trained.items()))
    name, labels = os.path.expanduser(pretrained.model_name), module.labels_of_base
    return AdapterBase(model, name, where, saved, hints, pretrained.revision, module.tokenizer, labels)


def _named_base(
    module: Any,
    pretrained: Any,
    base: Any,
    fields: dict[str, Any],
    reference: ReferenceLogits | None,
    saved: list[str],
    rounding: _Rounding,
) -> Any:
    """The base as a user of the adapter loads it, by the name that the adapter gives.

    Its weights are compared, and then replaced by those that were trained on, which may differ where these were rounded or in 4
    bits. With them its logits are compared, too, without links, so that no recompression hides another function of them.

    Args:
        module: the exported module.
        pretrained: where users find the base.
        base: the module's plain base.
        fields: arguments for transformers besides the name.
        reference: inputs to compare logits with.
        saved: names or dotted name endings of the modules in the adapter; newly initialised ones are added.
        rounding: what the training has rounded the base to.

    Raises:
        UserError: if weights differ.
        ExportError: if logits differ.
    """
    import transformers

    with seeded(derive_seed(module.seed, "another")):  # newly initialised weights are not the module's
        named, new_weights = pretrained.model_and_new_weights(getattr(transformers, module.auto_class), **fields)
    saved += [name for name in pretrained.new_modules(named, new_weights) if name not in saved]
    cast_floats(named.eval(), next(base.parameters()).dtype)
    if (difference := _difference(named, base, [*saved, *rounding.quantized], rounding.dtypes)) is not None:
        raise UserError(
            f"format: expected merged, for the base of {type(module).__name__} is not {pretrained.name!r}: {difference}, and "
            "an adapter is put on the base that it names; received peft"
        )
    named.load_state_dict(base.state_dict())
    if reference is not None:
        how = f"{pretrained.name!r} without a link, in place of the base of {type(module).__name__}"
        ReferenceLogits.of(base, reference.inputs).compare(named, how, where=" (expected --format merged)")
    return named


def _difference(named: nn.Module, base: nn.Module, saved: Sequence[str], rounded: Sequence[torch.dtype]) -> str | None:
    """The first weight of another shape or value in a base that was loaded by its name; None if there is none.

    Args:
        named: the model loaded by the name.
        base: the plain base on which the chain was trained.
        saved: names or dotted name endings of modules that are in the adapter, and names of weights not to be compared.
        rounded: the dtypes to which the training has rounded the base.
    """
    mine, theirs = base.state_dict(), named.state_dict()
    if alone := sorted(mine.keys() ^ theirs.keys()):
        return f"{alone[0]!r} is in one of them alone"
    for name, value in mine.items():
        if value.shape != theirs[name].shape:
            return f"{name!r} has another shape"
        if not lies_in(name, saved) and not _is_rounded(value, theirs[name], rounded):
            return f"{name!r} has other values"
    return None


def _is_rounded(value: Tensor, other: Tensor, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a value is the other one, or that rounded to one of the dtypes."""
    return any(torch.equal(value, other.to(dtype).to(value.dtype)) for dtype in (value.dtype, *dtypes))
