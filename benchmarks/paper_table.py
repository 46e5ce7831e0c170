"""The paper's main table in small: LoRA and a chain of two links (3 and 2 epochs) on six of its tasks, with SmolLM2-135M.

    python -m benchmarks.paper_table

runs ``cola compare`` on ``configs/smollm2.yaml`` with the paper's settings (the commands below, which it prints), on one CPU
thread; each task's study is a folder of ``benchmarks/paper_table``, with a line a run in ``results.jsonl``. The rows are the
protocol's: at most 1,000 for training, 500 for validation, 1,000 for test, from $COLA_DATA_DIR or the hub. A second call does
what is missing. A run of CB takes more than six minutes, and those of the longer tasks several times as long.

    python -m benchmarks.paper_table --table

prints the table, from the lines that are there. With ``--output FOLDER``, an empty one, all of it is run anew.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.studies import compare, grouped, main
from cola_lightning.study.results import at_best_rates, read
from cola_lightning.study.table import short_cells, summarize

HERE = Path(os.path.relpath(Path(__file__).parent))
FOLDER = HERE / "paper_table"
CONFIG = HERE.parent / "configs" / "smollm2.yaml"

TASKS = ["COPA", "CB", "WSC", "SST2", "WIC", "RTE"]  # the quickest first
NAMES = {"lora": "LoRA", "cola": "2 links"}
SEEDS, TUNING_SEEDS = 3, 1

# Of each run: the paper's numbers of rows and epochs, and one decay of the rate over the run. The accuracy on validation, which
# chooses the rate, is measured once, at the end.
OF_FIT = {"data.train_size": "null", "data.val_size": "null", "data.test_size": "null"}
OF_FIT |= {"chain.every_n_train_steps": "null", "chain.at_epochs": "[3]", "trainer.max_epochs": "5"}
OF_FIT |= {"model.schedule_scope": "run", "model.knot_warmup_steps": "0.03", "model.optimizer.weight_decay": "0"}
OF_FIT |= {"trainer.gradient_clip_val": "1", "trainer.check_val_every_n_epoch": "5", "trainer.num_sanity_val_steps": "0"}


def calls(folder: Path) -> Iterator[list[str]]:
    """The studies, each as what follows ``cola``."""
    for task in TASKS:
        options: dict[str, object] = {"config": str(CONFIG), "output": str(folder / task.lower()), "metric": "val_accuracy"}
        options |= {"methods": ["lora", "cola"], "learning_rates": [1e-3, 5e-4], "seeds": SEEDS, "tuning_seeds": TUNING_SEEDS}
        yield compare(options, {"data.task": task} | OF_FIT)


def rows(folder: Path = FOLDER) -> list[list[str]]:
    """A row for each method of each task, from the lines that are there."""
    table = []
    for task in TASKS:
        if (path := folder / task.lower() / "results.jsonl").exists():
            for row in summarize(at_best_rates(read(path), "max", range(TUNING_SEEDS))):
                table.append([task, *short_cells(row, NAMES[row.method])])
    return grouped(table)


if __name__ == "__main__":
    main(__doc__, FOLDER, calls, [rows])
