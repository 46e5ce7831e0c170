"""``cola inspect``: statistics of each link of a chain. It needs neither lightning nor transformers."""

import json
from collections.abc import Sequence
from dataclasses import replace

from cola_lightning.cli.help import OPTIONS, add_sources, command_parser, parse_options, read_sources

SOURCES = (
    "Read this chain: type a run's folder, a checkpoint, a chain folder or a PEFT adapter's folder. Type several in the order "
)
SOURCES += "of their training. Write NAME=PATH to name one."
OF_BASE = " With it, the size of an adapter's update is shown relative to its weights. A run knows its base."


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
    parser.add_argument("--base", metavar="NAME", help=OPTIONS["base"] + OF_BASE)
    parser.add_argument("--json", action="store_true", help="Print JSON with the numbers of every layer instead of the table.")
    options = parse_options(parser, words)

    import rich

    from cola_lightning.chain.report import overlaps, overlaps_table, report, table, to_json
    from cola_lightning.chain.sources import notes_on_base, sources_of, with_names

    sources = with_names(sources_of(options.sources))
    chain, notes = read_sources(sources, options), list[str]()
    if options.base is not None:
        from cola_lightning.files.plan import check_base, make_plan, weight_norms
        from cola_lightning.files.stored import ModelFolder

        plan = make_plan(ModelFolder.open(options.base), chain)
        check_base(plan)
        chain.base = replace(chain.base, weight_norms=weight_norms(plan))
        notes = notes_on_base(sources, options.base)
    reports, shared = report(chain), overlaps(chain)
    if options.json:
        print(json.dumps(to_json(reports), indent=2, allow_nan=False))
    else:
        rich.print(table(reports))
        if shared:
            rich.print(overlaps_table(shared))
        for note in notes:
            print(note)
