"""``cola inspect``: what each link of a chain did. It needs neither lightning nor transformers."""

import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from cola_lightning.chain.files import read_chain

LINKS = "how many links: the finished ones first, then the live one; 0 is the base (default: all)"


def inspect(words: Sequence[str]) -> None:
    """Runs ``cola inspect``.

    Args:
        words: what follows it on the command line.

    Raises:
        UserError: for what is written wrong.
    """
    parser = ArgumentParser(
        prog="cola inspect", description="Says what each link of a chain did.", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint, a chain folder, or a PEFT adapter")
    parser.add_argument("--links", type=int | None, metavar="N", help=LINKS)
    parser.add_argument("--plot", type=Path | None, metavar="FILE.png", help="draw norms and singular values")
    parser.add_argument("--json", action="store_true", help="print JSON, with every layer, in place of the table")
    options = parser.parse_args(list(words))

    import rich

    from cola_lightning.chain.report import plot, report, table, to_json

    reports = report(read_chain(options.checkpoint, options.links))
    if options.plot is not None:
        plot(reports, options.plot)
    if options.json:
        print(json.dumps(to_json(reports), indent=2, allow_nan=False))
    else:
        rich.print(table(reports))
