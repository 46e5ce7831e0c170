"""Exports of chains whose base is a folder: merged without loading it where that is possible, and proven."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.peft import CONFIG_NAME, read_config
from cola_lightning.errors import ExportError
from cola_lightning.export.module import export_module
from cola_lightning.export.options import ExportOptions
from cola_lightning.files.merge import write_merged
from cola_lightning.files.plan import make_plan, weight_norms
from cola_lightning.files.stored import CannotStream, ModelFolder
from cola_lightning.files.verify import verify
from cola_lightning.writing import atomic_folder

if TYPE_CHECKING:
    from cola_lightning.module.module import COLAModule

log = logging.getLogger(__name__)


def export_onto(base: str, chain: Chain, options: ExportOptions, sources: Sequence[str]) -> list[str]:
    """Exports a chain and its base.

    Args:
        base: a folder, or an id of the hub.
        chain: the links.
        options: format, folder and checks.
        sources: the paths of the links' sources; the tokenizer is that of the last one, if it has one.

    Returns:
        The lines to report.

    Raises:
        UserError: for a base that does not fit.
        ExportError: if what is written is not what it should be; it is removed.
    """
    folders = [Path(source).expanduser() for source in sources]
    if options.format == "chain":
        plan = make_plan(ModelFolder.open(base), chain)
        known = replace(chain.base, name=base, weight_norms=weight_norms(plan))
        return export_module(None, Chain(chain.links, known), options)
    lines = list[str]()
    if options.format == "merged":
        try:
            return _export_streamed(base, chain, options, folders[-1])
        except CannotStream as error:
            lines.append(f"the whole model was loaded: {error}")
    module = _module_on(base, chain, folders[0])
    return [*export_module(module, chain, options, module.adapted, {}, {}), *lines]


def _export_streamed(base: str, chain: Chain, options: ExportOptions, last: Path) -> list[str]:
    plan = make_plan(ModelFolder.open(base), chain)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        write_merged(plan, partial, dtype=dtype, tokenizer=last)
        license_ = {} if options.license is None else {"license": options.license}
        card = yaml.safe_dump(
            license_ | {"base_model": base, "library_name": "transformers", "tags": ["lora", "cola_lightning"]}
        )
        (partial / "README.md").write_text(f"---\n{card}---\n\n{chain!r}\n", encoding="utf-8")
        if not options.verify:
            return ["not compared"]
        proof = verify(plan, ModelFolder.open(str(partial)), {})
        if proof.wrong:
            raise ExportError(f"the export was deleted: {proof.sentence}")
        return [proof.sentence, *proof.notes]


def _module_on(base: str, chain: Chain, first: Path) -> "COLAModule":
    """A language model or a classifier of texts that begins with a chain."""
    from cola_lightning.hf import COLACausalLM, COLASequenceClassifier

    task = read_config(first).get("task_type") if (first / CONFIG_NAME).is_file() else None
    extras = chain[-1].extras if len(chain) else {}
    saved = sorted({name.rpartition(".")[0] for name in extras})
    name, _, revision = base.partition("@")
    arguments: dict[str, Any] = {
        "revision": revision or None,
        "target_modules": chain.layers,
        "modules_to_save": saved,
        "seed": 0,
    }
    if task == "SEQ_CLS":
        n_labels = next((len(value) for name, value in extras.items() if name.endswith("weight")), 2)
        module: COLAModule = COLASequenceClassifier(name, num_labels=n_labels, **arguments)
    else:
        module = COLACausalLM(name, **arguments)
    module.first_chain = chain
    module.make_model()
    return module
