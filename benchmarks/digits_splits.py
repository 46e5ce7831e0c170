"""Digits 5 to 9 with a network that knows 0 to 4, over 20 splits of the rows, each with a seed of its own: rank 1, 2 and 4.

    python -m benchmarks.digits_splits

runs ``cola compare`` on ``examples/digits.yaml`` (about an hour on a CPU core) and prints the table. The chain is the
config's, ten links; in plateau-rank-1 a link ends where the validation loss has not fallen for two epochs. Rates are chosen by
the validation accuracy of three seeds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lines import Rows, grouped, main
from benchmarks.studies import Results, Study, best_of, run, short_cells
from cola_lightning.study.table import summarize

FILE = Path(__file__).with_suffix(".jsonl")
COLUMNS = ("", "method", "rate", "splits", "test accuracy", "difference to LoRA")
NAMES = {"lora": "LoRA", "cola": "10 links", "lora-sum-rank": "LoRA of the summed rank", "full": "full fine-tuning"}
NAMES |= {"relora": "ReLoRA, 10 links", "plateau": "links until a plateau"}
TUNING_SEEDS = 3

CHAIN = [1e-2, 2e-2, 4e-2]
RATES = {"lora": CHAIN, "cola": CHAIN}
# Full fine-tuning has no rank, and the head's weight (10 x 64) no rank of 20: both are run at rank 1.
RANK_1 = {"lora-sum-rank": [1e-2, 2e-2], "full": [2e-3, 4e-3], "relora": CHAIN}
PLATEAU = {"chain.every_n_epochs": None, "chain.patience": 2}


def studies() -> Iterator[Study]:
    """The studies, each as a call of ``cola compare``."""
    for name, rank, rates, more in [
        ("rank-1", 1, RATES | RANK_1, {}),
        ("rank-2", 2, RATES, {}),
        ("rank-4", 4, RATES, {}),
        ("plateau-rank-1", 1, {"cola": CHAIN}, PLATEAU),
    ]:
        options: dict[str, Any] = {
            "config": "examples/digits.yaml",
            "metric": "val_accuracy",
            "methods": [*rates],
            "learning_rates": rates,
        }
        options |= {"seeds": 20, "tuning_seeds": TUNING_SEEDS, "also_seeded": ["data.split_seed"]}
        yield Study(name, options, {"model.rank": rank, "model.alpha": rank, **more})


def rows(results: Results) -> Rows:
    """A row for each method at each rank."""
    table = []
    for rank in (1, 2, 4):
        chosen = best_of(results, f"rank-{rank}", "max", TUNING_SEEDS)
        if rank == 1:
            chosen["plateau"] = best_of(results, "plateau-rank-1", "max", TUNING_SEEDS)["cola"]
        table += [[f"rank {rank}", *short_cells(row, NAMES[row.method])] for row in summarize(chosen)]
    return grouped(table)


if __name__ == "__main__":
    main(__doc__, FILE, lambda lines: run(lines, studies()), [(COLUMNS, rows)])
