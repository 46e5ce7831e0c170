"""A module's chain as a plain model, a PEFT adapter or a chain folder."""

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from cola_lightning.chain import Chain
from cola_lightning.errors import UserError
from cola_lightning.export import (
    AdapterBase,
    ExportOptions,
    check_named_base,
    check_no_base,
    export_adapter,
    export_chain,
    export_merged,
    is_of_transformers,
)
from cola_lightning.hub import quiet
from cola_lightning.lora.inject import lora_layers
from cola_lightning.lora.linear4bit import is_quantized, is_quantized_model
from cola_lightning.lora.registry import LoRALayer
from cola_lightning.model_card import Card
from cola_lightning.modules.checkpoint import data_of, prompt_format_of
from cola_lightning.modules.generation import end_tokens
from cola_lightning.modules.pretrained import PACKAGE_PREFIX, Pretrained, new_modules
from cola_lightning.modules.run import trainer_of
from cola_lightning.probe import Probe, logits_of, make_probe
from cola_lightning.seeding import derive_seed, seeded
from cola_lightning.turns import ChatTemplate, n_appended
from cola_lightning.usage import PROMPT_FORMAT, usage_section
from cola_lightning.weights import cast_floats, deep_copy


def export_trained(module: Any, options: ExportOptions) -> list[str]:
    """Writes a module that may be in training, from a copy on the CPU; see :meth:`~cola_lightning.COLAModule.export`."""
    module.configure_model()
    options.check()
    if module.is_sharded and options.format != "chain":  # to compare logits, every process would have to write
        raise UserError(
            f"format: expected chain for a sharded model, received {options.format}: `cola export`, or "
            "load_from_checkpoint in one process, exports it from a checkpoint"
        )
    own = module if options.format == "chain" else deep_copy(module, is_on_cpu=True).cpu()
    trainer = trainer_of(module)
    return export_module(own, module.full_chain(), options, prompt_format_of(trainer), data_of(trainer))


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
        ExportError: for an export that cannot be loaded, or differs from the module; it is removed.
    """
    format = options.format
    if module.target_modules is None and format != "merged":
        raise UserError(f"format: expected merged for a module without links (model.target_modules: null), received {format}")
    base_name = module.pretrained.model_name if hasattr(module, "pretrained") else module.base_name
    check_no_base(options.folder, base_name)
    if format == "chain":
        return export_chain(chain, options)
    n = n_appended(module.tokenizer) if prompt_format else 0
    usage = usage_section(prompt_format or {}, is_adapter=format == "peft", n_appended=n) or None
    card = Card(base_name, chain, module.constructor_arguments | {"data": dict(data or {})}, options.license, usage)
    with quiet():
        if prompt_format:  # `cola generate` reads it in the tokenizer's configuration
            module.tokenizer.init_kwargs[PROMPT_FORMAT] = dict(prompt_format)
        is_merged = format == "merged"
        lines = _merged(module, card, options, prompt_format) if is_merged else _adapter(module, chain, card, options)
    if prompt_format and prompt_format.get("kind") == "options":
        lines.append(
            "it was trained to choose among options by their log-probabilities, not to generate: `cola predict` chooses"
        )
    return lines


def _merged(module: Any, card: Card, options: ExportOptions, prompt_format: Mapping[str, Any] | None) -> list[str]:
    model, dtypes = module.merged_model(), module.adapted.chain.base.dtypes
    if not is_of_transformers(model):
        dtypes = sorted({*dtypes, *_dtypes_beside(module.model)})
    if was_quantized := is_quantized_model(module.model):
        dtypes = [module.pretrained.dtype if hasattr(module, "pretrained") else "float32"]
    dtype = options.dtype or (dtypes[0] if len(dtypes) == 1 else None)  # the links are in float32; the base need not be
    if dtype is not None:
        cast_floats(model, getattr(torch, dtype))
    probe = _probe(module) if options.verify else None
    tokenizer = getattr(module, "tokenizer", None)
    if prompt_format and prompt_format.get("kind") in ("response", "text") and hasattr(model, "generation_config"):
        # So that a server ends a response or a text where `cola generate` does.
        ends = set(end_tokens(model, tokenizer))
        if prompt_format.get("chat_template"):
            ends.update(ChatTemplate(tokenizer, prompt_format.get("chat_template_kwargs", {})).stop_tokens)
        model.generation_config.eos_token_id = sorted(ends) or None
    lines = [export_merged(model, options, probe, tokenizer=tokenizer, card=card)]
    return [*lines, f"4-bit weights were de-quantised, to {dtype}"] if was_quantized else lines


def _dtypes_beside(model: nn.Module) -> set[str]:
    """The dtypes of the parameters that are not adapted, such as ``float32``."""
    parts = (part for part in model.modules() if not isinstance(part, LoRALayer))
    parameters = (parameter for part in parts for parameter in part.parameters(recurse=False))
    return {str(parameter.dtype).removeprefix("torch.") for parameter in parameters if parameter.is_floating_point()}


def _probe(module: Any) -> Probe | None:
    """Inputs and the module's logits; the module is upcast in place, to float32 at least."""
    module.upcast()
    return make_probe(module.model, module.example_input_array)


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


def _adapter(module: Any, chain: Chain, card: Card, options: ExportOptions) -> list[str]:
    pretrained: Pretrained | None = getattr(module, "pretrained", None)
    if options.base_folder is not None and pretrained is None:
        raise UserError(
            f"base_folder: expected none for a {type(module).__name__}, whose base is not loaded by transformers, received "
            f"{str(options.base_folder)!r}"
        )
    rounding = _rounding(module.model)
    # First: it upcasts the module, whose base then is the one that was trained on.
    probe = _probe(module) if options.verify else None
    base = _pretrained_base(module, pretrained, options, probe, rounding) if pretrained else _built_base(module)
    hints = [f"rounded to {str(dtype).removeprefix('torch.')} in training: load it in that dtype" for dtype in rounding.dtypes]
    for kind in rounding.kinds:
        config = f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={kind!r})"
        hints.append(f"in 4 bits, and de-quantised to compare: peft loads the same with {config}")
    base = replace(base, hints=[*base.hints, *hints])
    return export_adapter(chain, base, options, probe, card=card, labels=module.labels_of_base)


def _built_base(module: Any) -> AdapterBase:
    """The base that a module's own code builds."""
    builder, model = f"{type(module).__module__}.{type(module).__qualname__}", module.merged_model(0)
    is_named = module.base_name != builder  # by the user
    hints = [] if is_named else [f"peft cannot find the one that {builder} builds: give it merged_model(0) of the module"]
    return AdapterBase(model, module.base_name, f", on the base that {builder} builds", module.modules_to_save, hints)


def _pretrained_base(
    module: Any, pretrained: Pretrained, options: ExportOptions, probe: Probe | None, rounding: _Rounding
) -> AdapterBase:
    """The base that transformers loads, compared with the one that its name gives; written, if a folder for it is given."""
    model, tokenizer, hints, where = module.merged_model(0), module.tokenizer, list[str](), ""
    saved = [*module.modules_to_save, *new_modules(model, module.new_weights)]
    if (folder := options.base_folder) is not None:
        if not folder.is_dir() or not any(folder.iterdir()):  # else it must hold the base, which is checked below
            written = copy.deepcopy(model)
            cast_floats(written, getattr(torch, pretrained.dtype))
            export_merged(written, ExportOptions(folder, "merged"), tokenizer=tokenizer)
            hints.append(f"written to {folder}")
        pretrained = replace(pretrained, model_name=str(folder.absolute()), revision=None, gguf_file=None)
    if options.verify:
        fields = _labels_to_give(module, pretrained)
        model = _named_base(module, pretrained, model, fields, probe, saved, rounding)
        where = f", on {pretrained.model_name!r}, loaded by its name"
        where += " with " + ", ".join(f"{name}={value!r}" for name, value in fields.items()) if fields else ""
        hints += _differences(module, pretrained, model, probe, rounding)
    if pretrained.gguf_file or pretrained.model_name.startswith(PACKAGE_PREFIX):
        hints.append(
            f"peft cannot load {pretrained.model_name!r} by that name: base_folder (--base_folder DIR) writes one that it can"
        )
    name = os.path.expanduser(pretrained.model_name)
    return AdapterBase(model, name, where, saved, hints, pretrained.revision, tokenizer)


def _labels_to_give(module: Any, pretrained: Pretrained) -> dict[str, Any]:
    """``num_labels``, if transformers needs it besides a base's name, whose files say another."""
    labels = {name: value for name, value in module.model_fields().items() if name == "num_labels"}
    if labels and not pretrained.gguf_file and pretrained.config().num_labels == labels["num_labels"]:
        return {}
    return labels


def _named_base(
    module: Any,
    pretrained: Pretrained,
    base: Any,
    fields: dict[str, Any],
    probe: Probe | None,
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
        probe: inputs to compare logits with.
        saved: names or dotted name endings of the modules in the adapter; newly initialised ones are added.
        rounding: what the training has rounded the base to.

    Raises:
        UserError: if weights differ.
        ExportError: if logits differ.
    """
    import transformers

    with seeded(derive_seed(module.seed, "another")):  # newly initialised weights are not the module's
        named, new_weights = pretrained.model_and_new_weights(getattr(transformers, module.auto_class), **fields)
    saved += [name for name in new_modules(named, new_weights) if name not in saved]
    cast_floats(named.eval(), next(base.parameters()).dtype)
    check_named_base(named, base, type(module).__name__, pretrained.name, [*saved, *rounding.quantized], rounding.dtypes)
    named.load_state_dict(base.state_dict())
    if probe is not None:
        # A classifier that finds a text's end needs one for several rows.
        named.config.pad_token_id = getattr(base.config, "pad_token_id", None)
        how = f"{pretrained.name!r} without a link, in place of the base of {type(module).__name__}"
        Probe(probe.inputs, logits_of(base, probe.inputs)).compare(named, how, where=" (expected --format merged)")
    return named


def _differences(module: Any, pretrained: Pretrained, base: Any, probe: Probe | None, rounding: _Rounding) -> list[str]:
    """How the base was loaded otherwise than by its name alone."""
    hints, config = [], None if pretrained.gguf_file else pretrained.config()
    pad, own = getattr(base.config, "pad_token_id", None), str(getattr(config, "dtype", None)).removeprefix("torch.")
    if config is not None and probe is not None and getattr(config, "pad_token_id", None) != pad:
        hints.append(f"with model.config.pad_token_id = {pad} in training, which batches may need")
    if own not in (pretrained.dtype, "None") and not rounding.dtypes:
        hints.append(f"loaded in {pretrained.dtype} for training, and in {own} by itself: load it in that dtype")
    return hints
