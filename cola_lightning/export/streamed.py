"""Exports of chains whose base is a folder: merged without loading it where that is possible, and proven."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.checkpoint import OpenedCheckpoint, last_checkpoint_of, name_of
from cola_lightning.chain.sources import notes_on_base
from cola_lightning.errors import ExportError, one_line
from cola_lightning.export.card import FOLDER, write_card
from cola_lightning.export.model import TrainedFacts, TrainedModel
from cola_lightning.export.module import export_chain, export_model
from cola_lightning.export.options import ExportOptions
from cola_lightning.export.proof import NotProvable, Selection, prove
from cola_lightning.files.merge import write_merged
from cola_lightning.files.plan import check_base, make_plan, weight_norms
from cola_lightning.files.stored import CONFIG_NAME, CannotStream, ModelFolder
from cola_lightning.files.verify import verify
from cola_lightning.hub import quiet
from cola_lightning.pretrained import TransformersBase
from cola_lightning.writing import atomic_folder

TOKENIZER_NAME, GENERATION_NAME = "tokenizer_config.json", "generation_config.json"
log = getLogger(__name__)
LOADING = f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{FOLDER}")'


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


def _describe(folder: Path, base: str, chain: Chain, source: str) -> None:
    """Writes the model card, and from the last source its chat template and the tokens that end a response."""
    from transformers import AutoTokenizer

    name, _, revision = base.partition("@")
    unknown: dict[str, Any] = {"fields": {}, "labels": None, "new_weights": (), "quantization": None}
    named = TransformersBase(name, revision or None, auto_class="AutoModelForCausalLM", **unknown)
    tokenizer: Any = None
    if (folder / TOKENIZER_NAME).is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # it has code of its own, or needs a package that is not installed
            log.warning("generation_config.json stays as it is: the tokenizer cannot be loaded (%s)", one_line(repr(error)))
    facts = TrainedFacts(chain=chain.trained(), base_name=name, named_base=named, tokenizer=tokenizer)
    checkpoint = name_of(last_checkpoint_of(source))
    if os.path.isfile(checkpoint):
        stored = OpenedCheckpoint.open(checkpoint).state.facts
        arguments = {"class_path": stored.module.class_path, "init_args": stored.module.init_args}
        facts = replace(facts, arguments=arguments, prompt_format=stored.prompt_format, data=stored.data)
    write_card(folder, facts, "merged model", LOADING)
    if tokenizer is not None and (template := facts.prompt_format.get("template")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    # An adapter whose trainer has saved its tokenizer.
    if tokenizer is not None and (Path(source).expanduser() / TOKENIZER_NAME).is_file():
        facts = replace(facts, prompt_format={"kind": "response", "chat_template": bool(tokenizer.chat_template)})
    if tokenizer is not None and facts.prompt_format.get("kind") in ("response", "text"):
        config, generation = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            for path in (folder / CONFIG_NAME, folder / GENERATION_NAME)
        )
        generation["eos_token_id"] = facts.stop_tokens((generation or config).get("eos_token_id"))
        (folder / GENERATION_NAME).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _export_streamed(base: str, chain: Chain, options: ExportOptions, selection: Selection) -> list[str]:
    plan = make_plan(ModelFolder.open(base), chain)
    check_base(plan)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        write_merged(plan, partial, dtype=dtype, tokenizer=Path(selection.sources[-1].path).expanduser())
        with quiet():
            _describe(partial, base, chain, selection.sources[-1].path)
        if not options.verify:
            return ["not compared"]
        try:
            return prove(plan.folder.path, partial, selection)
        except NotProvable as reason:
            read = verify(plan, ModelFolder.open(str(partial)), {})
            if read.wrong:
                raise ExportError(f"the export was deleted: {read.sentence}") from reason
            return [f"read back: {len(read.findings)} tensors are as they were planned. Not proven: {reason}"]
