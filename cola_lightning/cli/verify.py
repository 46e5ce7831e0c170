"""``cola verify``: proves or refutes that a merged model is its base with the adapters merged into it."""

import json
from collections.abc import Sequence

from cola_lightning.cli.help import OPTIONS, add_scale, add_sources, command_parser, parse_options, read_sources

MERGED = "Prove this folder of a merged model, which any tool may have written."
ADAPTER = "It should contain these: folders of PEFT adapters, chain folders or checkpoints, in the order of their training. "
ADAPTER += "Write NAME=PATH to name one."


def verify(words: Sequence[str]) -> int:
    """Runs ``cola verify``.

    Args:
        words: its arguments.

    Returns:
        The exit status: 1 if any tensor is wrong.

    Raises:
        UserError: for invalid arguments, and files that cannot be compared.
    """
    parser = command_parser("verify")
    parser.usage = "cola verify MERGED --base BASE --adapter A [B ...] [OPTIONS]"
    parser.add_argument("merged", metavar="MERGED", help=MERGED)
    parser.add_argument("--base", required=True, help=OPTIONS["base"])
    add_sources(parser, "--adapter", ADAPTER, required=True)
    add_scale(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON, with the judgement of each tensor.")
    options = parse_options(parser, words)

    import rich.box
    from rich.markup import escape
    from rich.table import Table

    from cola_lightning.chain.sources import configs_of, notes_on_base, sources_of, with_names
    from cola_lightning.files.plan import check_base, make_plan
    from cola_lightning.files.stored import ModelFolder
    from cola_lightning.files.verify import verify as verify_folder

    sources = with_names(sources_of(options.adapter))
    plan = make_plan(ModelFolder.open(options.base), read_sources(sources, options, "adapter"))
    check_base(plan)
    proof = verify_folder(plan, ModelFolder.open(options.merged, "merged"), configs_of(sources))
    proof.notes.extend(notes_on_base(sources, options.base))
    if options.json:
        print(json.dumps(proof.to_json(), indent=2))
    else:
        table = Table("judgement", "tensors", "elements that differ", "such as", box=rich.box.SIMPLE_HEAD, show_edge=False)
        for what, found in proof.groups.items():
            n_different, n = (sum(getattr(finding, field) for finding in found) for field in ("n_different", "n"))
            example = found[0].tensor + (f" {list(found[0].place)}" if found[0].place else "")
            table.add_row(escape(what), f"{len(found)}", f"{n_different} of {n}", escape(example))
        rich.print(table)
        print("\n".join([*proof.notes, proof.sentence]))
    return 1 if proof.wrong else 0
