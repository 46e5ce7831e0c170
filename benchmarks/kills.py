"""Runs that are killed and resumed: are they what they would have been?

    python -m benchmarks.kills

trains five small set-ups with ``cola fit``: digits, also with knots that merge a third of a link; and a Llama of two layers on
prompts, also with knots that only record, and on preference pairs. It kills each at thirteen moments, resumes it from its
``last.ckpt``, and compares everything with the run that nobody killed: losses, learning rates, metrics and the order of the
data, batch by batch, and at the end the links, the optimizer and the schedule, to the bit (about fifteen minutes on two cores).
It writes ``kills.jsonl``, one kill a line, and prints a table; exit status 1 if anything differs.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from benchmarks.lines import Lines, show
from tests.helpers.kills import KILLS, SETUPS, Outcome, run_kill, run_whole


def run_all(folder: Path, output: Path) -> list[Outcome]:
    """All kills of all set-ups; each outcome is written as soon as it is there."""
    wholes = {}
    for setup in SETUPS:
        (folder / setup).mkdir(parents=True)
        wholes[setup] = run_whole(setup, folder / setup)
    lines, outcomes = Lines(output, is_new=True), []
    for setup, kill in track([(setup, kill) for setup in SETUPS for kill in KILLS], "kills"):
        outcomes.append(run_kill(setup, wholes[setup], kill))
        lines.add(dataclasses.asdict(outcomes[-1]))
    return outcomes


COLUMNS = ["set-up", "moment", "signal", "exit", "resumed from step", "steps, batches, validations twice", "equal"]


def rows(outcomes: list[Outcome]) -> Iterator[list[str]]:
    """One kill a row."""
    for o in outcomes:
        twice = f"{o.steps_twice}, {o.batches_twice}, {o.validations_twice}"
        start = "the beginning" if o.resumed_from is None else str(o.resumed_from)
        equal = f"no: {o.wrong[0]}" if o.wrong else "yes"
        yield [o.setup, o.moment, o.signal, str(o.status), start, twice, equal]


def main() -> int:
    """Kills, compares, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the outcomes, written anew")
    parser.add_argument("--folder", type=Path, help="a new folder for the runs, which stay there (default: they do not)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_all(options.folder or Path(folder), options.output)
    show(COLUMNS, rows(outcomes), width=160)
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
