"""The rows of docs/results.md on digits over splits, from the lines that are there.

python benchmarks/digits_splits/table.py [FOLDER]
"""

import sys
from pathlib import Path

from cola_lightning.study.results import at_best_rates, read
from cola_lightning.study.table import short_cells, summarize

HERE = Path(__file__).parent
NAMES = {"lora": "LoRA", "cola": "10 links", "lora-sum-rank": "LoRA of the summed rank", "full": "full fine-tuning"}
NAMES |= {"rac": "RAC-LoRA, 10 links", "relora": "ReLoRA, 10 links"}
NAMES |= {"asymmetric": "LoRA, B alone trained", "plateau": "links until a plateau"}
TUNING_SEEDS = 3  # as in run.sh


def rows(folder: Path = HERE) -> list[list[str]]:
    """A row a method of each rank."""
    table = []
    for path in sorted(folder.glob("rank-*/results.jsonl")):
        chosen = at_best_rates(read(path), "max", range(TUNING_SEEDS))
        if (plateau := folder / f"plateau-{path.parent.name}" / "results.jsonl").exists():
            chosen["plateau"] = at_best_rates(read(plateau), "max", range(TUNING_SEEDS))["cola"]
        for row in summarize(chosen):
            table.append([path.parent.name.replace("-", " "), *short_cells(row, NAMES[row.method])])
    return table


if __name__ == "__main__":
    for row in rows(Path(sys.argv[1]) if sys.argv[1:] else HERE):
        print(f"| {' | '.join(row)} |")
