"""The rows of docs/results.md on digits over splits, from the lines that are there.

python benchmarks/digits_splits/table.py
"""

from pathlib import Path

from cola_lightning.study.results import at_best_rates, read
from cola_lightning.study.table import summarize

HERE = Path(__file__).parent
NAMES = {"lora": "LoRA", "cola": "10 links", "lora-sum-rank": "LoRA of the summed rank", "full": "full fine-tuning"}
NAMES |= {"rac": "RAC-LoRA, 10 links"}
TUNING_SEEDS = 3  # as in run.sh


def rows() -> list[list[str]]:
    """A row a method of each rank."""
    table = []
    for path in sorted(HERE.glob("rank-*/results.jsonl")):
        for row in summarize(at_best_rates(read(path), "max", range(TUNING_SEEDS))):
            test = "" if row.test is None else f"{row.test:.3f}" + ("" if row.deviation is None else f" ± {row.deviation:.3f}")
            difference = "" if row.difference is None else f"{row.difference:+.3f}"
            if row.low is not None and row.high is not None:
                difference += f" [{row.low:+.3f}, {row.high:+.3f}]"
            place = path.parent.name.replace("-", " ")
            table.append([place, NAMES[row.method], f"{row.learning_rate:g}", str(row.seeds), test, difference])
    return table


if __name__ == "__main__":
    for row in rows():
        print(f"| {' | '.join(row)} |")
