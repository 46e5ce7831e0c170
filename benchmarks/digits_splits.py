"""Digits 5 to 9 with a network that knows 0 to 4, over 20 splits of the rows, each with a seed of its own: rank 1, 2 and 4.

    python -m benchmarks.digits_splits

runs ``cola compare`` on ``benchmarks/digits.yaml`` (about an hour on a CPU core); each study is a folder of
``benchmarks/digits_splits``. A second call does what is missing; ``--table`` only prints the table; with an empty folder
(``--output FOLDER``) everything is run anew. The chain is the config's, ten links; in plateau-rank-1 a link ends where the
validation loss has not fallen for two epochs. Rates are chosen by the validation accuracy of three seeds.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.studies import compare, grouped, main
from cola_lightning.study.results import at_best_rates, read
from cola_lightning.study.table import short_cells, summarize

HERE = Path(os.path.relpath(Path(__file__).parent))
FOLDER = HERE / "digits_splits"
CONFIG = HERE / "digits.yaml"
NAMES = {"lora": "LoRA", "cola": "10 links", "lora-sum-rank": "LoRA of the summed rank", "full": "full fine-tuning"}
NAMES |= {"rac": "RAC-LoRA, 10 links", "relora": "ReLoRA, 10 links"}
NAMES |= {"asymmetric": "LoRA, B alone trained", "plateau": "links until a plateau"}
TUNING_SEEDS = 3

CHAIN = [1e-2, 2e-2, 4e-2]
ONE_FACTOR = [2e-2, 4e-2, 8e-2, 16e-2, 1e-2, 32e-2]
RATES = {"lora": CHAIN, "cola": CHAIN, "rac": ONE_FACTOR}
# Full fine-tuning has no rank, and the head's weight (10 x 64) no rank of 20: both are run at rank 1.
RANK_1 = {"lora-sum-rank": [1e-2, 2e-2], "full": [2e-3, 4e-3], "relora": CHAIN, "asymmetric": ONE_FACTOR}
PLATEAU = {"chain.every_n_epochs": None, "chain.patience": 2}


def calls(folder: Path) -> Iterator[list[str]]:
    """The studies, each as what follows ``cola``."""
    for name, rank, rates, more in [
        ("rank-1", 1, RATES | RANK_1, {}),
        ("rank-2", 2, RATES, {}),
        ("rank-4", 4, RATES, {}),
        ("plateau-rank-1", 1, {"cola": CHAIN}, PLATEAU),
    ]:
        options: dict[str, object] = {
            "config": str(CONFIG),
            "output": str(folder / name),
            "metric": "val_accuracy",
            "methods": [*rates],
        }
        options |= {"learning_rates": rates, "seeds": 20, "tuning_seeds": TUNING_SEEDS, "also_seeded": ["data.split_seed"]}
        yield compare(options, {"model.rank": rank, "model.alpha": rank, **more})


def rows(folder: Path = FOLDER) -> list[list[str]]:
    """A row for each method at each rank, from the lines that are there."""
    table = []
    for path in sorted(folder.glob("rank-*/results.jsonl")):
        chosen = at_best_rates(read(path), "max", range(TUNING_SEEDS))
        if (plateau := folder / f"plateau-{path.parent.name}" / "results.jsonl").exists():
            chosen["plateau"] = at_best_rates(read(plateau), "max", range(TUNING_SEEDS))["cola"]
        for row in summarize(chosen):
            table.append([path.parent.name.replace("-", " "), *short_cells(row, NAMES[row.method])])
    return table


if __name__ == "__main__":
    main(__doc__, FOLDER, calls, [lambda folder: grouped(rows(folder))])
