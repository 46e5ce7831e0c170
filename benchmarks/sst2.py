"""SmolLM2 on SST-2: LoRA and chains of two and three links, side by side, through ``cola fit``.

    python benchmarks/sst2.py [--seeds 5] [--output benchmarks/sst2.jsonl]

It reads $COLA_DATA_DIR/sst2, or the hub. Runs are written as they end, and a second call goes on where the first stopped.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent

CONFIG = str(ROOT / "configs" / "sst2_smollm2.yaml")

# 64 optimizer steps in all, two epochs; knots as even as steps allow.
METHODS = {
    "LoRA": ["--chain.every_n_epochs", "null"],
    "2 links": ["--chain.every_n_epochs", "1"],
    "3 links": ["--chain.every_n_epochs", "null", "--chain.at_steps", "[22, 43]"],
}


def run(method: str, seed: int) -> dict[str, object]:
    """One run: validation accuracy before and after training, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        options = ["--seed_everything", str(seed), "--trainer.default_root_dir", folder, *METHODS[method]]
        options += ["--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"]
        command = [sys.executable, "-m", "cola_lightning", "fit", "--config", CONFIG, *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        (path,) = Path(folder).rglob("metrics.csv")
        with path.open() as file:
            accuracies = [float(row["val_accuracy"]) for row in csv.DictReader(file) if row.get("val_accuracy")]
    (before,) = [line.rpartition("val_accuracy ")[2] for line in done.stdout.splitlines() if line.startswith("before training")]
    return {
        "method": method,
        "seed": seed,
        "before": float(before),
        "val_accuracy": round(accuracies[-1], 4),
        "seconds": round(seconds),
    }


def table(results: list[dict[str, object]]) -> Table:
    """One row a method: mean, standard deviation, each seed."""
    made = Table("method", "mean", "sd", "each seed", "before", "seconds", title="SST-2, 400 validation rows: accuracy")
    for method in METHODS:
        rows = [result for result in results if result["method"] == method]
        values = [float(str(row["val_accuracy"])) for row in rows]
        if len(values) < 2:
            continue
        made.add_row(
            method,
            f"{statistics.mean(values):.3f}",
            f"{statistics.stdev(values):.3f}",
            " ".join(f"{value:.3f}" for value in values),
            str(rows[0]["before"]),
            f"{statistics.median(int(str(row['seconds'])) for row in rows):.0f}",
        )
    return made


def main() -> None:
    """Runs what is not in the output yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "sst2.jsonl")
    arguments = parser.parse_args()
    results = [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    done = {(result["method"], result["seed"]) for result in results}
    for seed in range(arguments.seeds):
        for method in METHODS:
            if (method, seed) not in done:
                results.append(run(method, seed))
                with arguments.output.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                print(results[-1], flush=True)
    Console(width=120).print(table(results))


if __name__ == "__main__":
    main()
