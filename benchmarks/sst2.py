"""SmolLM2 on SST-2: LoRA and chains of two and three links, side by side.

    python -m benchmarks.sst2

runs ``cola fit`` and ``cola test`` on ``configs/smollm2.yaml``, with 256 examples and two epochs, for each method and seed
(about two minutes a run on two cores). It reads $COLA_DATA_DIR/sst2, or the hub. Runs are written to ``sst2.jsonl`` as they
end; a second call does what is missing.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lines import Lines, show
from cola_lightning.cli import main as cola
from cola_lightning.study.config import as_words

ROOT = Path(__file__).parent.parent

# 64 optimizer steps in all; no clipping. The chain's options are the methods'.
OPTIONS = ["--config", str(ROOT / "configs" / "smollm2.yaml"), "--chain.every_n_train_steps", "null"]
OPTIONS += as_words(
    {
        "model.optimizer.lr": 5e-4,
        "data.train_size": 256,
        "data.val_size": 400,
        "data.test_size": 400,
        "data.eval_batch_size": 40,
        "data.max_length": 2048,
        "trainer.max_epochs": 2,
        "trainer.gradient_clip_val": None,
    }
)
EACH_EPOCH = ["--chain.every_n_epochs", "1"]
METHODS = {"LoRA": [], "2 links": EACH_EPOCH, "3 links": ["--chain.at_steps", "[22, 43]"]}  # knots as even as steps allow


def run(method: str, seed: int) -> dict[str, object]:
    """One ``cola fit`` and one ``cola test``: accuracies at the end, and the seconds of the fit."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*OPTIONS, "--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false"]
        options += ["--trainer.num_sanity_val_steps", "0", "--trainer.check_val_every_n_epoch", "2"]
        options += ["--seed_everything", str(seed), *METHODS[method]]
        start = time.perf_counter()
        assert cola(["fit", *options]) == 0
        seconds = time.perf_counter() - start
        made = Path(folder) / "runs" / "version_0"
        assert cola(["test", *options, "--ckpt_path", str(made)]) == 0
        validation, test = last(made, "val_accuracy"), last(made / "test" / "version_0", "test_accuracy")
    return {"method": method, "seed": seed, "val_accuracy": validation, "test_accuracy": test, "seconds": round(seconds)}


def last(folder: Path, name: str) -> float:
    """The last value of a metric in a run's CSV file."""
    with (folder / "metrics.csv").open() as file:
        return [round(float(row[name]), 4) for row in csv.DictReader(file) if row.get(name)][-1]


def table_rows(results: list[dict[str, object]]) -> Iterator[list[str]]:
    """One row a method: mean accuracies, and each seed's."""
    for method in METHODS:
        rows = [result for result in results if result["method"] == method]
        values = {name: [float(str(row[name])) for row in rows] for name in ("val_accuracy", "test_accuracy", "seconds")}
        yield [
            method,
            f"{statistics.mean(values['val_accuracy']):.3f}",
            f"{statistics.mean(values['test_accuracy']):.3f}",
            " ".join(f"{value:.3f}" for value in values["test_accuracy"]),
            f"{statistics.median(values['seconds']):.0f}",
        ]


def main() -> None:
    """Runs what is not in the output yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "sst2.jsonl")
    arguments = parser.parse_args()
    lines = Lines(arguments.output)
    for one in lines.missing({"method": method, "seed": seed} for seed in range(arguments.seeds) for method in METHODS):
        lines.add(run(**one))
        print(lines.results[-1], flush=True)
    show(["method", "validation", "test", "each seed's test", "seconds"], table_rows(lines.results), width=120)


if __name__ == "__main__":
    main()
