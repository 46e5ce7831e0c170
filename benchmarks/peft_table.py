"""Time and memory next to peft and TRL, in one table: the one of docs/speed.md.

    python -m benchmarks.peft_table
    python -m benchmarks.peft_table --measure

The first prints the table from the lines of the benchmarks that it names. The second first measures all of them anew, one after
the other (about an hour on a machine without other work), so that the table is of one machine and one day.
"""

import argparse
import subprocess
import sys

from benchmarks import commands, dpo, speed
from benchmarks.lines import Lines, Rows, show
from benchmarks.steps import BESIDE

COLUMNS = (*BESIDE, "by `python -m`")
TABLES = [(commands, commands.rows), (speed, speed.rows_beside), (dpo, dpo.rows)]


def rows() -> Rows:
    """What is compared, the two ratios, and what measures them."""
    return [[*row, module.__name__] for module, table in TABLES for row in table(Lines(module.FILE).results)]


def main() -> None:
    """Measures, if asked to, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure all of its benchmarks anew first")
    if parser.parse_args().measure:
        for module, _ in TABLES:
            subprocess.run([sys.executable, "-m", module.__name__, "--anew"], check=True)
    show(COLUMNS, rows())


if __name__ == "__main__":
    main()
