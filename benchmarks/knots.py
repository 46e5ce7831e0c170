"""Knots that merge a share, and other ways to keep B small, on the small GPT: the table of runs that are not made any more.

    python -m benchmarks.knots

prints the table from ``knots.jsonl``. A plain training loop made the lines: ``benchmarks/knots.py`` of commit 70821ab. From it
come the knots of ``cola fit --chain.knot half --model.lr_schedule stable``.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.lines import Rows, grouped, main
from benchmarks.studies import short_cells
from cola_lightning.study.results import Result, at_best_rates
from cola_lightning.study.table import BASELINE, summarize

FILE = Path(__file__).with_suffix(".jsonl")
SETTINGS = [(8, 800), (1, 800), (8, 3200), (1, 3200)]  # rank, optimizer steps
COLUMNS = ("small GPT", "method", "rate", "seeds", "test loss", "difference to LoRA", "rank")
LORAS = ("lora-cosine", "lora-stable")
NAMES = {"lora-cosine": "LoRA, cosine", "lora-stable": "LoRA", "same-A-2": "A kept, 2 knots"}
NAMES |= {f"share-0.5-{n}": f"0.5 merged, {n} knots" for n in (4, 10, 20)}
NAMES |= {"share-0.5-4-cosine": "0.5 merged, 4 knots, cosine"}
NAMES |= {"decay-B-1": "LoRA, weight decay of B 1", "max-norm-B-3": "LoRA, norm of B at most 3"}


def rows(results: list[dict[str, Any]]) -> Rows:
    """A row for each method of each rank and number of steps, at the rate that is best on seed 0.

    Differences are to LoRA at its better schedule. The last cell is the mean effective rank of the update.
    """
    table = []
    for rank, steps in SETTINGS:
        lines = [line for line in results if (line["rank"], line["steps"]) == (rank, steps)]
        runs = [Result(**{name: line[name] for name in Result.__dataclass_fields__}) for line in lines]
        best = at_best_rates(runs, "min", [0])
        lora = min((best[name] for name in LORAS if name in best), key=lambda runs: runs[0].value("min"))
        for row in summarize({BASELINE: lora} | {name: best[name] for name in NAMES if name in best})[1:]:
            run = {"method": row.method, "learning_rate": row.learning_rate}
            ranks = [line["effective_rank"] for line in lines if run.items() <= line.items()]
            *cells, difference = short_cells(row, NAMES[row.method])
            cells += ["" if row.method == lora[0].method else difference, f"{fmean(ranks):.1f}"]
            table.append([f"rank {rank}, {steps:,} steps", *cells])
    return grouped(table)


if __name__ == "__main__":
    main(__doc__, FILE, lambda lines: None, [(COLUMNS, rows)])
