"""``cola export``: converts a checkpoint to a plain model, a PEFT adapter or a chain folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.cli.help import SUBCOMMANDS, TRUST, add_checkpoint, add_scale, command_parser, load_module, parse_options
from cola_lightning.hub import upload

OUTPUT = "Write the export to this folder. It must not exist, or it must be empty, unless you add --overwrite."
PUSH_TO_HUB = "Also upload the folder to this model repository of the Hugging Face hub: `owner/name`. A new one is private."
PUBLIC = "With --push_to_hub, make a new repository public. A repository that exists stays public or private."
OVERWRITE = "Replace the files in the output folder. A folder that contains other folders is never replaced."
NO_VERIFY = "Do not load the export again. By default, it is loaded, and its outputs are compared with those of the checkpoint."


def export(words: Sequence[str]) -> None:
    """Runs ``cola export``.

    Args:
        words: its arguments.

    Raises:
        UserError: for invalid arguments.
        ExportError: if the export does not pass its verification; it is then deleted.
    """
    from cola_lightning.export.module import export_chain, export_model
    from cola_lightning.export.options import ExportOptions
    from cola_lightning.module import COLAModule

    parser = command_parser("export", SUBCOMMANDS["export"])
    add_checkpoint(parser, "Export this run: type its folder, or a checkpoint in it.")
    add_scale(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=OUTPUT)
    parser.add_method_arguments(COLAModule, "export", as_group=False, skip={"folder", "verify", "overwrite"})
    parser.add_argument("--trust_remote_code", type=bool, default=False, help=TRUST)
    parser.add_argument("--push_to_hub", metavar="ID", help=PUSH_TO_HUB)
    parser.add_argument("--public", action="store_true", help=PUBLIC)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    parser.add_argument("--no_verify", action="store_true", help=NO_VERIFY)
    options = parse_options(parser, words)
    arguments = {name: options[name] for name in ("dtype", "max_rank", "license", "overwrite")}
    arguments["base_folder"] = options.base_folder and Path(options.base_folder).expanduser()
    export_options = ExportOptions(options.output, options.format, verify=not options.no_verify, **arguments)
    export_options.check(options.checkpoint)
    opened = OpenedCheckpoint.open(options.checkpoint)
    state = opened.state
    chain = state.all_links(options.links).scaled(options.scale or {})
    if export_options.format == "chain":
        lines = export_chain(chain, export_options)
    else:
        module = load_module(opened, options, "export")
        model = module.trained_model(state.facts["prompt_format"], state.facts["data"])
        lines = export_model(replace(model, chain=chain), export_options)
    print("\n".join(lines))
    print(f"written: {export_options.folder}")
    if options.push_to_hub is not None:
        print(f"uploaded: {upload(export_options.folder, options.push_to_hub, is_public=options.public)}")
