"""``cola export``: converts a checkpoint, or adapters and their base, to a plain model, a PEFT adapter or a chain folder."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.chain.peft import CONFIG_NAME, read_config
from cola_lightning.chain.sources import sources_of, with_names
from cola_lightning.cli.help import OPTIONS, add_scale, add_sources, command_parser, load_module, parse_options, read_sources
from cola_lightning.errors import UserError

if TYPE_CHECKING:
    from cola_lightning.export.model import TrainedModel
    from cola_lightning.export.options import ExportOptions
    from cola_lightning.module.module import COLAModule

SOURCES = "Export this run: type its folder, or a checkpoint in it. Or export what you trained elsewhere onto --base: type the "
SOURCES += "folders of the adapters in the order of their training. Write NAME=PATH to name one."
OF_SOURCES = " A run knows its base."
OUTPUT = "Write the export to this folder. It must not exist, or it must be empty, unless you add --overwrite."
OVERWRITE = "Replace the files in the output folder. A folder that contains other folders is never replaced."
NO_VERIFY = "Do not check the export. By default, its tensors or its outputs are compared with those of the trained model."


def export(words: Sequence[str]) -> None:
    """Runs ``cola export``.

    Args:
        words: its arguments.

    Raises:
        UserError: for invalid arguments.
        ExportError: if the export does not pass its verification; it is then deleted.
    """
    from cola_lightning.export.options import ExportOptions
    from cola_lightning.export.proof import Selection
    from cola_lightning.export.streamed import export_onto
    from cola_lightning.module.module import COLAModule

    parser = command_parser("export")
    parser.usage = "cola export PATH [PATH ...] [OPTIONS]"
    add_sources(parser, "sources", SOURCES)
    parser.add_argument("--base", metavar="NAME", help=OPTIONS["base"] + OF_SOURCES)
    add_scale(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=OUTPUT)
    parser.add_method_arguments(COLAModule, "export", as_group=False, skip={"folder", "verify", "overwrite"})
    parser.add_argument("--trust_remote_code", type=bool, default=False, help=OPTIONS["trust"])
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    parser.add_argument("--no_verify", action="store_true", help=NO_VERIFY)
    options = parse_options(parser, words)
    arguments = {name: options[name] for name in ("dtype", "max_rank", "overwrite")}
    export_options = ExportOptions(options.output, options.format, verify=not options.no_verify, **arguments)
    selection = Selection(with_names(sources_of(options.sources)), options.continues, options.links, options.scale or {})
    sources = [source.path for source in selection.sources]
    for path in [*sources, options.base or ""]:
        export_options.check(path)
    if options.base is not None:
        chain = read_sources(selection.sources, options)
        load = partial(_load, options.base, chain, sources[0])
        lines = export_onto(options.base, chain, export_options, selection, load)
    elif len(sources) > 1 or Path(sources[0], CONFIG_NAME).expanduser().is_file():
        raise UserError("base: adapters do not contain their base. Add --base NAME: a folder, or an id of the hub")
    else:
        lines = _export_run(sources[0], options, export_options)
    print("\n".join(lines))
    print(f"written: {export_options.folder}")


def _export_run(path: str, options: Any, export_options: "ExportOptions") -> list[str]:
    """Exports a run, which knows its base; returns the lines to report."""
    from cola_lightning.export.module import export_chain, export_model
    from cola_lightning.module.exports import trained_model

    opened = OpenedCheckpoint.open(path)
    state = opened.state
    chain = state.all_links(options.links).scaled(options.scale or {})
    if export_options.format == "chain":
        return export_chain(chain, export_options)
    model = trained_model(load_module(opened, options, "export"), state.facts.prompt_format, state.facts.data)
    return export_model(replace(model, chain=chain), export_options)


def _load(base: str, chain: Chain, source: str) -> "TrainedModel":
    """A language model, or a classifier of texts, that begins with a chain.

    Args:
        base: a folder, or an id of the hub.
        chain: the chain.
        source: the first of its sources; an adapter says what its model is for.
    """
    from cola_lightning import COLACausalLM, COLASequenceClassifier
    from cola_lightning.module.exports import trained_model

    extras = chain[-1].extras if len(chain) else {}
    name, _, revision = base.partition("@")
    saved = sorted({name.rpartition(".")[0] for name in extras})
    arguments: dict[str, Any] = {"revision": revision or None, "target_modules": chain.layers, "modules_to_save": saved}
    folder = Path(source).expanduser()
    if (folder / CONFIG_NAME).is_file() and read_config(folder).get("task_type") == "SEQ_CLS":
        n_labels = next((len(value) for name, value in extras.items() if name.endswith("weight")), 2)
        module: COLAModule = COLASequenceClassifier(name, num_labels=n_labels, seed=0, **arguments)
    else:
        module = COLACausalLM(name, seed=0, **arguments)
    # Its weights are compared by their norms: the base that the chain knows may have been in another dtype.
    module.run.first_chain = Chain(chain.links, replace(chain.base, fingerprint=""))
    return replace(trained_model(module, {}, {}), chain=chain)
