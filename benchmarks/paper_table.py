"""The paper's main table in small: LoRA and a chain of two links (3 and 2 epochs) on six of its tasks, with SmolLM2-135M.

    python -m benchmarks.paper_table

runs ``cola compare`` on ``configs/smollm2.yaml`` with the paper's settings, on one CPU thread, and prints the table. The rows
are the protocol's: at most 1,000 for training, 500 for validation, 1,000 for test, from $COLA_DATA_DIR or the hub. A run of CB
takes more than six minutes, and those of the longer tasks several times as long.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lines import Rows, grouped, main
from benchmarks.studies import Results, Study, best_of, run, short_cells
from cola_lightning.study.table import summarize

FILE = Path(__file__).with_suffix(".jsonl")
COLUMNS = ("paper's task", "method", "rate", "seeds", "test accuracy", "difference to LoRA")
TASKS = ["COPA", "CB", "WSC", "SST2", "WIC", "RTE"]  # the quickest first
NAMES = {"lora": "LoRA", "cola": "2 links"}

# Of each run: the paper's numbers of rows and epochs, and one decay of the rate over the run. The accuracy on validation, which
# chooses the rate, is measured once, at the end.
OF_FIT: dict[str, Any] = {"data.train_size": None, "data.val_size": None, "data.test_size": None}
OF_FIT |= {"chain.every_n_train_steps": None, "chain.at_epochs": [3], "trainer.max_epochs": 5}
OF_FIT |= {"model.schedule_scope": "run", "model.knot_warmup_steps": 0.03, "model.optimizer.weight_decay": 0}
OF_FIT |= {"trainer.gradient_clip_val": 1, "trainer.check_val_every_n_epoch": 5, "trainer.num_sanity_val_steps": 0}


def studies() -> Iterator[Study]:
    """The studies, each as a call of ``cola compare``."""
    options: dict[str, Any] = {"config": "configs/smollm2.yaml", "metric": "val_accuracy", "methods": [*NAMES]}
    options |= {"learning_rates": [1e-3, 5e-4], "seeds": 3, "tuning_seeds": 1}
    for task in TASKS:
        yield Study(task.lower(), options, {"data.task": task, **OF_FIT})


def rows(results: Results) -> Rows:
    """A row for each method of each task."""
    chosen = {task: summarize(best_of(results, task.lower(), "max")) for task in TASKS}
    return grouped([task, *short_cells(row, NAMES[row.method])] for task, found in chosen.items() for row in found)


if __name__ == "__main__":
    main(__doc__, FILE, lambda lines: run(lines, studies()), [(COLUMNS, rows)])
