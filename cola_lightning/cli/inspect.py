"""``cola inspect``: statistics of each link of a chain. It needs neither lightning nor transformers."""

import json
from collections.abc import Sequence
from pathlib import Path

from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli.help import SUBCOMMANDS, add_checkpoint, command_parser, parse_options

PLOT = "Also plot how large the update of each link is, and its singular values, to this PNG file. This needs matplotlib."


def inspect(words: Sequence[str]) -> None:
    """Runs ``cola inspect``.

    Args:
        words: its arguments.

    Raises:
        UserError: for invalid arguments.
    """
    parser = command_parser("inspect", SUBCOMMANDS["inspect"])
    add_checkpoint(parser, "Read this chain: type a run's folder, a checkpoint, a chain folder or a PEFT adapter's folder.")
    parser.add_argument("--plot", type=Path | None, metavar="FILE.png", help=PLOT)
    parser.add_argument("--json", action="store_true", help="Print JSON with the numbers of every layer instead of the table.")
    options = parse_options(parser, words)

    import rich

    from cola_lightning.chain.report import plot, report, table, to_json

    reports = report(read_chain(options.checkpoint, options.links))
    if options.plot is not None:
        plot(reports, options.plot)
    if options.json:
        print(json.dumps(to_json(reports), indent=2, allow_nan=False))
    else:
        rich.print(table(reports))
