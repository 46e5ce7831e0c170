"""What is a new link per task good for? A model is trained on several tasks, one after another.

    python -m benchmarks.stages
    python -m benchmarks.stages encoder

trains the runs that have no line in ``language.jsonl`` or ``encoder.jsonl``, the most telling ones first, on one CPU thread. It
appends a line after each run, so you can stop it at any time and call it again. The rows come from ``$COLA_DATA_DIR``.

    python -m benchmarks.stages --table

runs nothing, prints the tables from the lines, and draws ``encoder.png``. In every arm a stage has a new optimizer and a new
learning-rate schedule. The arms differ in what happens between two stages.
"""

import argparse
import os
from pathlib import Path

import torch

from benchmarks.lines import Lines, show
from benchmarks.stages.encoder import ENCODER
from benchmarks.stages.language import LANGUAGE
from benchmarks.stages.learnable import try_alone
from benchmarks.stages.picture import draw
from benchmarks.stages.plan import run_missing
from benchmarks.stages.sequence import TaskSequence
from benchmarks.stages.tables import table, table_of_rates
from cola_lightning.hub import quiet

SEQUENCES: dict[str, TaskSequence] = {sequence.name: sequence for sequence in (LANGUAGE, ENCODER)}


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", nargs="?", choices=SEQUENCES, default="language", help="which tasks (default: language)")
    parser.add_argument("--table", action="store_true", help="run nothing: only print the tables")
    options = parser.parse_args()
    sequence = SEQUENCES[options.sequence]
    lines = Lines(sequence.file)
    if not options.table:
        torch.set_num_threads(1)
        folder = Path(os.environ.get("COLA_DATA_DIR", "."))
        with quiet():
            try_alone(sequence, lines, folder)
            run_missing(sequence, lines, sequence.read_data(folder))
    for rows in (table_of_rates(sequence, lines), table(sequence, lines)):
        show(rows[0], rows[1:])
        print()
    draw(sequence, lines, sequence.file.with_suffix(".png"))


if __name__ == "__main__":
    main()
