"""Digits 5 to 9 with a network that knows 0 to 4: how far LoRA, chains of LoRA and full fine-tuning get.

    python benchmarks/digits.py

runs ``cola fit`` and ``cola test`` on ``configs/digits.yaml`` for each method and seed (about four minutes on two cores),
writes ``digits.jsonl`` (one run a line; a second call does only what is missing), prints a table and draws ``digits.png``.
"""

import argparse
import csv
import statistics
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from lines import Lines, show
from matplotlib import pyplot as plt
from rich.progress import track

from cola_lightning.cli import main as cola

HERE = Path(__file__).parent
CONFIG = str(HERE.parent / "configs" / "digits.yaml")
sys.path.append(str(HERE.parent))  # where the config's class paths begin
EPOCHS = 50


def chain(links: int) -> list[str]:
    """Options for a chain of so many links over the config's epochs; one link is plain LoRA."""
    return ["--chain.every_n_epochs", str(EPOCHS // links) if links > 1 else "null"]


METHODS = {
    "LoRA": chain(1),
    "2 links": chain(2),
    "5 links": chain(5),
    "10 links": chain(10),
    "25 links": chain(25),
    "LoRA, rank 10": [*chain(1), "--model.rank", "10", "--model.alpha", "10"],
    "full fine-tuning": [*chain(1), "--model.target_modules", "null", "--model.optimizer.lr", "2e-3"],
}


def run(method: str, seed: int) -> dict[str, object]:
    """One ``cola fit`` and one ``cola test``: the validation accuracy after each epoch and the test accuracy at the end."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--config", CONFIG, "--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false"]
        options += ["--trainer.enable_model_summary", "false", "--seed_everything", str(seed), *METHODS[method]]
        assert cola(["fit", *options]) == 0
        runs = Path(folder) / "runs"
        assert cola(["test", *options, "--ckpt_path", str(runs / "version_0" / "checkpoints" / "last.ckpt")]) == 0
        curve = [float(row["val_accuracy"]) for row in rows(runs / "version_0") if row.get("val_accuracy")]
        (accuracy,) = [float(row["test_accuracy"]) for row in rows(runs / "version_1")]
    return {"method": method, "seed": seed, "test_accuracy": accuracy, "val_accuracy": curve}


def rows(folder: Path) -> list[dict[str, str]]:
    """What a run logged."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def deviation(values: list[float]) -> float | None:
    """The standard deviation; one value has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def draw(results: list[dict], path: Path) -> None:
    """Left: test accuracy by method. Right: how the validation accuracy of the first seed runs on."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for place, method in enumerate(METHODS):
        values = [r["test_accuracy"] for r in results if r["method"] == method]
        left.barh(place, statistics.mean(values), xerr=deviation(values), color="#9ecae1", height=0.7)
        left.plot(values, [place] * len(values), ".", color="black", markersize=3)
    left.set_yticks(range(len(METHODS)), METHODS)
    left.invert_yaxis()
    left.set_xlim(0.5, 1)
    left.set_xlabel("test accuracy (mean, deviation, each seed)")
    for method in ("LoRA", "2 links", "10 links", "full fine-tuning"):
        curve = next(r["val_accuracy"] for r in results if r["method"] == method)
        right.plot(range(1, EPOCHS + 1), curve, label=method, linewidth=1.5)
    for epoch in range(5, EPOCHS, 5):
        right.axvline(epoch, color="0.85", linewidth=0.8, zorder=0)
    right.set_xlabel("epoch (lines: the knots of 10 links)")
    right.set_ylabel("validation accuracy, first seed")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def table_rows(results: list[dict]) -> list[list[str]]:
    """The table's rows: a method, its mean, its standard deviation, and each seed's accuracy."""
    table = []
    for method in METHODS:
        values = [r["test_accuracy"] for r in results if r["method"] == method]
        spread = deviation(values)
        each = " ".join(f"{value:.3f}" for value in values)
        table.append([method, f"{statistics.mean(values):.3f}", "" if spread is None else f"{spread:.3f}", each])
    return table


def main() -> None:
    """Runs what is missing, then prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method, with the seeds 0, 1, ... (default: 5)")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of digits.jsonl and digits.png")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lines = Lines(options.output / "digits.jsonl")
    wanted = [{"method": method, "seed": seed} for method in METHODS for seed in range(options.seeds)]
    for one in track(lines.missing(wanted), "digits"):
        lines.add(run(**one))
    show(["method", "test accuracy", "standard deviation", "each seed"], table_rows(lines.results), width=100)
    draw(lines.results, options.output / "digits.png")


if __name__ == "__main__":
    main()
