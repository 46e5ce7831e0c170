"""``cola export``: converts a checkpoint to a plain model, a PEFT adapter or a chain folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cola_lightning.chain.checkpoint import OpenedCheckpoint, chain_of, check_arguments
from cola_lightning.cli.help import SUBCOMMANDS, command_parser, parsed
from cola_lightning.cli.inspect import LINKS, TRUST
from cola_lightning.errors import UserError
from cola_lightning.hub import quiet

if TYPE_CHECKING:
    from cola_lightning.export.verify import ExportOptions


def export(words: Sequence[str]) -> None:
    """Runs ``cola export``.

    Args:
        words: its arguments.

    Raises:
        UserError: for invalid arguments.
        ExportError: if the export does not pass its verification; it is then deleted.
    """
    parser = command_parser("export", SUBCOMMANDS["export"])
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="a checkpoint that a fit wrote")
    parser.add_argument(
        "--format",
        required=True,
        choices=["merged", "peft", "chain"],
        help="merged: a plain Hugging Face model (for other modules, a state dict); peft: the chain as one PEFT adapter; "
        "chain: a chain folder",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist or is empty")
    parser.add_argument("--links", type=int | None, metavar="N", help=LINKS)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="with merged: dtype (default: the base's, float32 if it has several)",
    )
    parser.add_argument("--max_rank", type=int | None, metavar="R", help="with peft: recompress to this rank, by SVD")
    parser.add_argument(
        "--base_folder",
        type=Path | None,
        metavar="DIR",
        help="with peft: write the base there, and name that folder in the adapter: for a base that peft cannot load by name",
    )
    parser.add_argument("--trust_remote_code", type=bool, default=False, help=TRUST)
    parser.add_argument("--license", metavar="ID", help="the model card's license: the hub's identifier, such as apache-2.0")
    parser.add_argument(
        "--push_to_hub",
        metavar="ID",
        help="upload the folder to this model repository of the Hugging Face hub",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is not empty")
    parser.add_argument("--no_verify", action="store_true", help="do not reload the export to compare its logits")
    options = parsed(parser, words)
    if options.format == "chain" and options.license is not None:
        raise UserError(f"license: expected none beside --format chain, which has no model card, received {options.license!r}")
    from cola_lightning.export.verify import ExportOptions

    output = options.output
    given = {name: options[name] for name in ("dtype", "max_rank", "base_folder", "license", "overwrite")}
    asked = ExportOptions(output, options.format, verify=not options.no_verify, **given)
    asked.check()
    if options.checkpoint.resolve().is_relative_to(output.resolve()):
        raise UserError(f"output: expected a folder that does not hold the checkpoint, received {str(output)!r}")
    opened = OpenedCheckpoint.open(options.checkpoint)
    if opened.state.live is None and asked.format != "merged":
        raise UserError(
            f"format: expected merged for a checkpoint without links (model.target_modules: null), received {asked.format}"
        )
    if asked.format == "chain":
        lines = _export_chain(opened, options.links, asked)
    else:
        lines = _export_model(opened, options.links, asked, trust_remote_code=options.trust_remote_code)
    print("\n".join(lines))
    print(f"written: {output}")
    if options.push_to_hub is not None:
        from cola_lightning.hub import upload

        print(f"uploaded: {upload(output, options.push_to_hub)}")


def _export_chain(opened: OpenedCheckpoint, links: int | None, asked: "ExportOptions") -> list[str]:
    """Exports a chain folder, without constructing the module."""
    from cola_lightning.export.module import export_chain

    chain = chain_of(opened.contents["state_dict"], opened.state, links)
    asked.check(chain.base.name)
    return export_chain(chain, asked)


def _export_model(opened: OpenedCheckpoint, links: int | None, asked: "ExportOptions", *, trust_remote_code: bool) -> list[str]:
    arguments = opened.state.module
    check_arguments(arguments, "export")

    from cola_lightning.export.module import export_module
    from cola_lightning.modules import COLAModule, find_class

    find_class(arguments["class_path"])
    given = {"trust_remote_code": True} if trust_remote_code else {}  # not every class has the argument
    with quiet():
        module = COLAModule.load_from_checkpoint(opened, links=links, **given)
    chain = chain_of(opened.contents["state_dict"], opened.state, links)
    return export_module(module, chain, asked, opened.state.prompt_format, opened.state.data)
