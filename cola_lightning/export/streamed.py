"""Exports of chains whose base is a folder: merged without loading it where that is possible, and proven."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.sources import notes_on_base
from cola_lightning.errors import ExportError
from cola_lightning.export.model import TrainedModel
from cola_lightning.export.module import export_chain, export_model
from cola_lightning.export.options import ExportOptions
from cola_lightning.export.proof import NotProvable, Selection, compare_logits, prove
from cola_lightning.files.merge import write_merged
from cola_lightning.files.plan import check_base, make_plan, weight_norms
from cola_lightning.files.stored import CannotStream, ModelFolder
from cola_lightning.files.verify import verify
from cola_lightning.writing import atomic_folder


def export_onto(
    base: str, chain: Chain, options: ExportOptions, selection: Selection, load: Callable[[], TrainedModel]
) -> list[str]:
    """Exports a chain and its base.

    Args:
        base: a folder, or an id of the hub.
        chain: the links.
        options: format, folder and checks.
        selection: where the links come from; the tokenizer is that of the last source, if it has one.
        load: loads the whole model, where that is needed.

    Returns:
        The lines to report.

    Raises:
        UserError: for a base that does not fit.
        ExportError: if what is written is not what it should be; it is removed.
    """
    lines = notes_on_base(selection.sources, base)
    if options.format == "chain":
        plan = make_plan(ModelFolder.open(base), chain)
        check_base(plan)
        known = replace(chain.base, name=base, weight_norms=weight_norms(plan))
        return [*export_chain(Chain(chain.links, known), options), *lines]
    if options.format == "merged":
        try:
            return [*_export_streamed(base, chain, options, selection), *lines]
        except CannotStream as error:
            lines.append(f"the whole model was loaded: {error}")
    return [*export_model(load(), options), *lines]


def _export_streamed(base: str, chain: Chain, options: ExportOptions, selection: Selection) -> list[str]:
    plan = make_plan(ModelFolder.open(base), chain)
    check_base(plan)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        write_merged(plan, partial, dtype=dtype, tokenizer=Path(selection.sources[-1].path).expanduser())
        card = yaml.safe_dump({"base_model": base, "library_name": "transformers", "tags": ["lora", "cola_lightning"]})
        (partial / "README.md").write_text(f"---\n{card}---\n\n{chain!r}\n", encoding="utf-8")
        if not options.verify:
            return ["not compared"]
        try:
            lines = [prove(plan.folder.path, partial, selection)]
            return [*lines, *compare_logits(plan.folder.path, partial, selection)]
        except NotProvable as reason:
            read = verify(plan, ModelFolder.open(str(partial)), {})
            if read.wrong:
                raise ExportError(f"the export was deleted: {read.sentence}") from reason
            return [f"read back: {len(read.findings)} tensors are as they were planned. Not proven: {reason}"]
