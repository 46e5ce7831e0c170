"""The paper's main table in small: LoRA and a chain of two links (3 and 2 epochs) on six of its tasks, with SmolLM2-135M.

    python benchmarks/paper_table.py

runs ``cola compare`` on ``configs/smollm2.yaml`` with the paper's settings (the commands below, which it prints), on one CPU
thread; each task's study is a folder of ``benchmarks/paper_table``, with a line a run in ``results.jsonl``. The rows are the
protocol's: at most 1,000 for training, 500 for validation, 1,000 for test, from $COLA_DATA_DIR or the hub. A second call does
what is missing. A run of CB takes more than six minutes, and those of the longer tasks several times as long.

    python benchmarks/paper_table.py COPA CB

runs only these tasks (and prints the table of all), so that several processes can share the work.

    python benchmarks/paper_table.py --table

prints the table, from the lines that are there. With ``--output FOLDER``, an empty one, all of it is run anew.
"""

import argparse
import os
from pathlib import Path

from studies import compare, run

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


def words(task: str) -> list[str]:
    """What follows ``cola``."""
    options = {"config": str(CONFIG), "output": str(FOLDER / task.lower()), "metric": "val_accuracy", "methods": "[lora, cola]"}
    options |= {"learning_rates": "[1e-3, 5e-4]", "seeds": SEEDS, "tuning_seeds": TUNING_SEEDS}
    return compare(options, {"data.task": task} | OF_FIT)


def rows() -> list[list[str]]:
    """A row a method of each task, from the lines that are there."""
    table = []
    for task in TASKS:
        if not (path := FOLDER / task.lower() / "results.jsonl").exists():
            continue
        for row in summarize(at_best_rates(read(path), "max", range(TUNING_SEEDS))):
            table.append([task, *short_cells(row, NAMES[row.method])])
    return table


def main() -> None:
    """Runs what is missing, and prints the table."""
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the studies (default: %(default)s)")
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"tasks to run (default: all): {', '.join(TASKS)}")
    options = parser.parse_args()
    FOLDER = options.output
    if unknown := [task for task in options.tasks if task not in TASKS]:
        parser.error(f"expected {', '.join(TASKS)}, received {unknown[0]}")
    if options.table and options.tasks:
        parser.error("expected no task beside --table")
    if not options.table:
        for task in options.tasks or TASKS:
            run(words(task))
    for row in rows():
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
