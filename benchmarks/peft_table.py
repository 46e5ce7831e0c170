"""Time and memory next to peft and TRL, in one table: the one of docs/speed.md.

    python -m benchmarks.peft_table
    python -m benchmarks.peft_table --measure

The first prints the table from the lines of the benchmarks that ``BENCHMARKS`` names. The second first runs them all, one after
the other (about an hour on a machine without other work), so that the table is of one machine and one day.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import show

HERE = Path(__file__).parent
BENCHMARKS = [
    ["benchmarks.commands"],
    ["benchmarks.speed"],
    ["benchmarks.speed", "--experts"],
    ["benchmarks.dpo"],
    ["benchmarks.images"],
]
COLUMNS = ["what", "time / theirs", "memory / theirs", "by `python -m`"]


def lines_of(name: str) -> list[dict[str, Any]]:
    """The results of a benchmark."""
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def cell(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios of both sides, round by round, and the smallest and largest of them."""
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def rows() -> Iterator[list[str]]:
    """What is compared, the two ratios with their spread over the rounds, and what measures them."""
    for line in lines_of("commands"):
        rounds = line["rounds"]
        cells = [
            cell([one["cola"][unit] for one in rounds], [one["peft"][unit] for one in rounds]) for unit in ("by_clock", "mib")
        ]
        yield [f"a whole command: {line['task']}", *cells, "benchmarks.commands"]
    steps = {(line["what"], line["length"]): line for line in lines_of("speed")}
    for kind, module, (mine, theirs), memory in (
        ("a step", "benchmarks.speed", ("cola", "peft"), "peak_mib"),
        ("a step with experts", "benchmarks.speed --experts", ("cola experts", "peft experts"), "mib_above_model"),
    ):
        for length in (64, 256):
            found = [steps[f"{unit}: {mine} / {theirs}", length][unit] for unit in ("seconds", memory)]
            yield [f"{kind}, {length} tokens a row", *(cell(values[mine], values[theirs]) for values in found), module]
    of_pairs = {line["unit"]: cell(line["cola"], line["trl"]) for line in lines_of("dpo")}
    yield ["a step of DPO (TRL)", of_pairs["seconds"], of_pairs["MiB"], "benchmarks.dpo"]
    (pictures,) = lines_of("images")
    yield ["a step on pictures", cell(pictures["cola"], pictures["peft"]), "", "benchmarks.images"]


def main() -> None:
    """Measures, if asked to, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run all of its benchmarks first")
    if parser.parse_args().measure:
        for words in BENCHMARKS:
            subprocess.run([sys.executable, "-m", *words], check=True)
    show(COLUMNS, rows(), width=120)


if __name__ == "__main__":
    main()
