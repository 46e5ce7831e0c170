"""``cola export``: a plain model, a PEFT adapter or a chain folder of a checkpoint."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cola_lightning.chain import Chain
from cola_lightning.chain.checkpoint import OpenedCheckpoint, chain_of, opened_checkpoint
from cola_lightning.cli.inspect import LINKS
from cola_lightning.errors import UserError
from cola_lightning.usage import PROMPT_FORMAT
from cola_lightning.writing import check_free


def export(words: Sequence[str]) -> None:
    """Runs ``cola export``.

    Args:
        words: what follows it on the command line.

    Raises:
        UserError: for what is written wrong.
        ExportError: for an export that is not what it should be; it is not kept.
    """
    parser = ArgumentParser(
        prog="cola export",
        description="Makes a model, an adapter or a chain of a checkpoint.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="a checkpoint that a fit wrote")
    parser.add_argument(
        "--format",
        required=True,
        choices=["merged", "peft", "chain"],
        help="merged: a plain Hugging Face model (of another module, its state dict); peft: the chain as one PEFT adapter; "
        "chain: a chain folder",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist or is empty")
    parser.add_argument("--links", type=int | None, metavar="N", help=LINKS)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of merged (default: the base's, float32 if it has several)"
    )
    parser.add_argument("--max_rank", type=int | None, metavar="R", help="of peft: recompress to this rank, by SVD")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is not empty")
    parser.add_argument("--no_verify", action="store_true", help="do not load the export again to compare its logits")
    options = parser.parse_args(list(words))
    for option, value, format_ in (("dtype", options.dtype, "merged"), ("max_rank", options.max_rank, "peft")):
        if value is not None and options.format != format_:
            raise UserError(f"{option}: expected --format {format_} beside it, received {options.format}")
    if options.max_rank is not None and options.max_rank < 1:
        raise UserError(f"max_rank: expected at least 1, received {options.max_rank}")
    check_free(options.output, overwrite=options.overwrite)
    if options.checkpoint.resolve().is_relative_to(options.output.resolve()):
        raise UserError(f"output: expected a folder that does not hold the checkpoint, received {str(options.output)!r}")
    with opened_checkpoint(options.checkpoint) as opened:
        for line in (_export_chain if options.format == "chain" else _export_model)(options, opened):
            print(line)
    print(f"written: {options.output}")


def _export_chain(options: Namespace, opened: OpenedCheckpoint) -> list[str]:
    chain = _links(opened, options.links)
    if opened.state.live is None:
        raise UserError("format: expected merged for a checkpoint without links (model.target_modules: null), received chain")
    chain.save(options.output, overwrite=options.overwrite)
    if options.no_verify:
        return ["not compared"]
    from cola_lightning.export import ExportError

    again = Chain.load(options.output)
    if len(again) != len(chain) or not again.is_beginning_of(chain):
        raise ExportError(f"the chain in {options.output} was loaded again with other factors than were written")
    return [f"{len(chain)} links; loaded again, their factors are the same to the bit"]


def _export_model(options: Namespace, opened: OpenedCheckpoint) -> list[str]:
    arguments, is_adapter = opened.state.module, options.format == "peft"
    if arguments["not_plain"]:
        raise UserError(
            f"checkpoint: expected a {arguments['class_path']} made with plain arguments, received one with another "
            f"{arguments['not_plain'][0]!r}: load it in Python, and call its merged_model()"
        )
    if is_adapter and opened.state.live is None:
        raise UserError("format: expected merged for a checkpoint without links (model.target_modules: null), received peft")
    if is_adapter and importlib.util.find_spec("peft") is None:
        raise UserError("format: expected the package peft, received none: pip install 'cola_lightning[peft]'")

    from cola_lightning.export import quiet
    from cola_lightning.modules import COLAModule, find_class
    from cola_lightning.modules.pending import loading

    find_class(arguments["class_path"])
    with quiet():
        with loading(opened, options.links):
            module = COLAModule.load_from_checkpoint(options.checkpoint, links=options.links)
        if format_ := opened.state.prompt_format:  # `cola generate` reads it in the tokenizer's configuration
            module.tokenizer.init_kwargs[PROMPT_FORMAT] = format_
        lines = _export_adapter(options, opened, module) if is_adapter else _export_merged(options, module)
    if format_.get("kind") == "options":
        lines.append(
            "it was trained to choose among options by their log-probabilities, not to generate: `cola predict` chooses"
        )
    return lines


def _export_merged(options: Namespace, module: Any) -> list[str]:
    import torch

    from cola_lightning.export import export_merged
    from cola_lightning.lora.linear4bit import is_quantized_model

    model, dtypes = module.merged_model(), module.chain.base["dtypes"]
    if was_quantized := is_quantized_model(module.model):
        dtypes = [module.pretrained.dtype if hasattr(module, "pretrained") else "float32"]
    dtype = options.dtype or (dtypes[0] if len(dtypes) == 1 else None)  # the links are in float32; the base need not be
    if dtype is not None:
        model.to(getattr(torch, dtype))
    tokenizer = getattr(module, "tokenizer", None)
    how = {"tokenizer": tokenizer, "verify": not options.no_verify, "overwrite": options.overwrite}
    lines = [export_merged(model, options.output, _probe(options, module), **how)]
    return [*lines, f"4-bit weights were de-quantised, to {dtype}"] if was_quantized else lines


def _probe(options: Namespace, module: Any) -> Any:
    """What the module gives, widened in place to float32 at least; None if nothing is to be compared."""
    from cola_lightning.export import make_probe

    if options.no_verify:
        return None
    module.widen()
    return make_probe(module.model, module.example_input_array)


def _links(opened: OpenedCheckpoint, links: int | None) -> Chain:
    return chain_of(opened.contents, links)


def _export_adapter(options: Namespace, opened: OpenedCheckpoint, module: Any) -> list[str]:
    from cola_lightning.export import export_adapter
    from cola_lightning.lora.inject import lora_layers
    from cola_lightning.lora.linear4bit import is_quantized
    from cola_lightning.modules.pretrained import PACKAGE_PREFIX, new_modules

    pretrained, layers = getattr(module, "pretrained", None), lora_layers(module.model).values()
    rounded = {str(layer.dtype).removeprefix("torch.") for layer in layers if layer.is_narrowed}
    in_4_bits = sorted({layer.source_dtype for layer in layers if is_quantized(layer)})
    quantized = [f"{name}.weight" for name, part in module.model.named_modules() if is_quantized(part)]
    probe = _probe(options, module)  # first: it widens the module, whose base then is the one that was trained on
    base, saved, hints = module.merged_model(0), list(module.modules_to_save), list[str]()
    builder = f"{type(module).__module__}.{type(module).__qualname__}"
    where = f", on the base that {builder} builds"
    if pretrained is not None:
        saved += new_modules(base, module.new_weights)
    if pretrained is not None and not options.no_verify:
        fields = _fields_to_give(module)
        base, hints = _named_base(module, base, fields, probe, saved, quantized, rounded)
        where = f", on {pretrained.model_name!r}, loaded by its name"
        where += " with " + ", ".join(f"{name}={value!r}" for name, value in fields.items()) if fields else ""
    lines = export_adapter(
        _links(opened, options.links),
        base,
        options.output,
        probe,
        where=where,
        base_name=os.path.expanduser(pretrained.model_name) if pretrained else module.base_name,
        revision=pretrained.revision if pretrained else None,
        modules_to_save=saved,
        max_rank=options.max_rank,
        verify=not options.no_verify,
        overwrite=options.overwrite,
    )
    if pretrained is None and module.base_name == builder:  # and no name of the user's own
        note = f"peft cannot find its base by itself, the one that {builder} builds: give it merged_model(0) of the module"
        lines = [f"{note}, loaded in Python", *lines]
    lines += hints
    for dtype in sorted(rounded):
        lines.append(f"its base was rounded to {dtype} in training: load it in that dtype")
    for kind in in_4_bits:
        lines.append(
            "its base was in 4 bits: 4-bit weights were de-quantised to compare; peft loads the same ones with "
            f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={kind!r})"
        )
    if pretrained is not None and (pretrained.gguf_file or pretrained.model_name.startswith(PACKAGE_PREFIX)):
        lines.append(f"peft cannot find its base, {pretrained.model_name!r}, by itself: load that with transformers first")
    return lines


def _fields_to_give(module: Any) -> dict[str, Any]:
    """What transformers must be given beside a base's name: ``num_labels``, where the files say another.

    Raises:
        UserError: for any other field of ``model_fields`` that is not the named configuration's: nothing gives it to PEFT.
    """
    fields = module.model_fields()
    labels = {name: value for name, value in fields.items() if name == "num_labels"}
    if fields == labels and (not labels or module.pretrained.gguf_file):  # from there a configuration takes seconds
        return labels
    named, asked = (module.pretrained.config(**given) for given in (labels, fields))
    for name, value in fields.items():
        if not hasattr(named, name) or getattr(asked, name) != getattr(named, name):
            raise UserError(
                f"format: expected merged, for {type(module).__name__}.model_fields gives {name}={value!r}, which is not what "
                f"{module.base_name!r} is configured with, and an adapter is put on the base that it names; received peft"
            )
    own = None if module.pretrained.gguf_file else module.pretrained.config()
    return {name: value for name, value in labels.items() if own is None or own.num_labels != value}


def _named_base(
    module: Any, base: Any, fields: dict[str, Any], probe: Any, saved: list[str], quantized: list[str], rounded: set[str]
) -> tuple[Any, list[str]]:
    """The base as others load it, by the name that the adapter gives, and what they must know of it.

    Its weights are compared, and then are those that were trained on: rounded or in 4 bits, they may be others. With them its
    logits are compared, too.

    Args:
        module: which the checkpoint is of.
        base: its plain base.
        fields: what they give to transformers beside the name.
        probe: inputs to compare logits with.
        saved: names or dotted name endings of what the adapter holds; what is new there is added.
        quantized: the names of the weights that are in 4 bits in the module.
        rounded: the dtypes to which the training has rounded the base.

    Raises:
        UserError: for other weights.
        ExportError: for other logits.
    """
    import torch
    import transformers

    from cola_lightning.export import Probe, check_named_base, logits_of
    from cola_lightning.modules.pretrained import new_modules
    from cola_lightning.seeding import derive_seed, seeded

    pretrained, hints = module.pretrained, []
    with seeded(derive_seed(module.seed, "another")):  # what is new there is not what it is here
        named, new_weights = pretrained.model_and_new_weights(getattr(transformers, module.auto_class), **fields)
    saved += [name for name in new_modules(named, new_weights) if name not in saved]
    named.to(next(base.parameters()).dtype).eval()
    dtypes = [getattr(torch, dtype) for dtype in rounded]
    check_named_base(named, base, type(module).__name__, module.base_name, [*saved, *quantized], dtypes)
    named.load_state_dict(base.state_dict())
    own_pad, pad = (getattr(model.config, "pad_token_id", None) for model in (named, base))
    if own_pad != pad and probe is not None and (own_pad is not None or not _takes_batches(named, probe)):
        named.config.pad_token_id = pad
        hints.append(f"for batches its base needs model.config.pad_token_id = {pad}, as in training")
    if probe is not None:  # without links, so that no recompression hides another function of the same weights
        how = f"{module.base_name!r} without a link, in place of the base of {type(module).__name__}"
        Probe(probe.inputs, logits_of(base, probe.inputs)).compare(named, how, where=" (expected --format merged)")
    own = str(getattr(pretrained.config(), "dtype", None)).removeprefix("torch.") if not pretrained.gguf_file else None
    if own not in (pretrained.dtype, None, "None") and not rounded:
        hints.append(
            f"its base was loaded in {pretrained.dtype} for training, and is in {own} by itself: load it in that dtype"
        )
    return named, hints


def _takes_batches(base: Any, probe: Any) -> bool:
    """Whether a model takes several rows as it is: a classifier that reads where a text ends needs a padding token for that."""
    from cola_lightning.export import logits_of

    try:
        logits_of(base, probe.inputs)
    except ValueError:
        return False
    return True
