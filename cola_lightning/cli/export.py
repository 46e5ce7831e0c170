"""``cola export``: converts a checkpoint to a plain model, a PEFT adapter or a chain folder."""

from collections.abc import Sequence
from pathlib import Path

from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.cli.help import SUBCOMMANDS, TRUST, add_checkpoint, add_scale, command_parser, load_module, parse_options
from cola_lightning.hub import upload


def export(words: Sequence[str]) -> None:
    """Runs ``cola export``.

    Args:
        words: its arguments.

    Raises:
        UserError: for invalid arguments.
        ExportError: if the export does not pass its verification; it is then deleted.
    """
    from cola_lightning.export.module import export_module
    from cola_lightning.export.options import ExportOptions
    from cola_lightning.module import COLAModule

    parser = command_parser("export", SUBCOMMANDS["export"])
    add_checkpoint(parser, "a run's folder, or a checkpoint in it")
    add_scale(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist or is empty")
    parser.add_method_arguments(COLAModule, "export", as_group=False, skip={"folder", "verify", "overwrite"})
    parser.add_argument("--trust_remote_code", type=bool, default=False, help=TRUST)
    parser.add_argument(
        "--push_to_hub",
        metavar="ID",
        help="upload the folder to this model repository of the Hugging Face hub; a new one is private",
    )
    parser.add_argument("--public", action="store_true", help="with push_to_hub: a new repository is public")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is not empty")
    parser.add_argument("--no_verify", action="store_true", help="do not load the export again to compare its logits")
    options = parse_options(parser, words)
    arguments = {name: options[name] for name in ("dtype", "max_rank", "license", "overwrite")}
    arguments["base_folder"] = options.base_folder and Path(options.base_folder).expanduser()
    export_options = ExportOptions(options.output, options.format, verify=not options.no_verify, **arguments)
    export_options.check(options.checkpoint)
    opened = OpenedCheckpoint.open(options.checkpoint)
    state = opened.state
    chain = state.all_links(options.links).scaled(options.scale or {})
    if export_options.format == "chain":
        lines = export_module(None, chain, export_options)
    else:
        module = load_module(opened, options, "export")
        lines = export_module(module, chain, export_options, module.adapted, state.facts["prompt_format"], state.facts["data"])
    print("\n".join(lines))
    print(f"written: {export_options.folder}")
    if options.push_to_hub is not None:
        print(f"uploaded: {upload(export_options.folder, options.push_to_hub, is_public=options.public)}")
