"""Time and memory next to peft and TRL, in one table: the one of docs/speed.md.

    python -m benchmarks.peft_table
    python -m benchmarks.peft_table --measure

The first prints the table from the lines of the benchmarks that it names. The second first measures all of them anew, one after
the other (about an hour on a machine without other work), so that the table is of one machine and one day.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence

from benchmarks import commands, dpo, images, speed
from benchmarks.lines import Lines, Rows, show

BENCHMARKS = ["commands", "speed", "dpo", "images"]
COLUMNS = ("what", "time / theirs", "memory / theirs", "by `python -m`")


def cell(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios of both sides, round by round, and the smallest and largest of them."""
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def rows() -> Rows:
    """What is compared, the two ratios with their spread over the rounds, and what measures them."""
    table = []
    for line in Lines(commands.FILE).results:
        cells = [
            cell([one["cola"][unit] for one in line["rounds"]], [one["peft"][unit] for one in line["rounds"]])
            for unit in ("by_clock", "mib")
        ]
        table.append([f"a whole command: {line['task']}", *cells, "benchmarks.commands"])
    names = {"step": "a step", "experts": "a step with experts"}
    for line in Lines(speed.FILE).results:
        if line["what"] in names:
            cells = [cell(line[unit]["cola"], line[unit]["peft"]) for unit in ("seconds", "mib")]
            table.append([f"{names[line['what']]}, {line['length']} tokens a row", *cells, "benchmarks.speed"])
    for line in Lines(dpo.FILE).results:
        cells = [cell(line[unit]["cola"], line[unit]["trl"]) for unit in ("seconds", "mib")]
        table.append(["a step of DPO (TRL)", *cells, "benchmarks.dpo"])
    for line in Lines(images.FILE).results:
        table.append(["a step on pictures", cell(line["seconds"]["cola"], line["seconds"]["peft"]), "", "benchmarks.images"])
    return table


def main() -> None:
    """Measures, if asked to, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure all of its benchmarks anew first")
    if parser.parse_args().measure:
        for name in BENCHMARKS:
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--anew"], check=True)
    show(COLUMNS, rows())


if __name__ == "__main__":
    main()
