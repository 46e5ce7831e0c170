"""``cola inspect``: statistics of each link of a chain. It needs neither lightning nor transformers."""

import json
from collections.abc import Sequence

from cola_lightning.cli.help import add_sources, command_parser, parse_options, read_sources

SOURCES = (
    "Read this chain: type a run's folder, a checkpoint, a chain folder or a PEFT adapter's folder. Type several in the order "
)
SOURCES += "of their training. Write NAME=PATH to name one."


def inspect(words: Sequence[str]) -> None:
    """Runs ``cola inspect``.

    Args:
        words: its arguments.

    Raises:
        UserError: for invalid arguments.
    """
    parser = command_parser("inspect")
    parser.usage = "cola inspect PATH [PATH ...] [OPTIONS]"
    add_sources(parser, "sources", SOURCES)
    parser.add_argument("--json", action="store_true", help="Print JSON with the numbers of every layer instead of the table.")
    options = parse_options(parser, words)

    import rich

    from cola_lightning.chain.report import overlaps, overlaps_table, report, table, to_json

    chain = read_sources(options.sources, options)
    reports, shared = report(chain), overlaps(chain)
    if options.json:
        print(json.dumps(to_json(reports), indent=2, allow_nan=False))
    else:
        rich.print(table(reports))
        if shared:
            rich.print(overlaps_table(shared))
