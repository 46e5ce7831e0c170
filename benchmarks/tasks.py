"""What a small chain learns on each of the paper's eleven tasks: SmolLM2, 64 examples, one epoch, two links.

    python benchmarks/tasks.py

runs ``cola fit`` and ``cola test`` on ``configs/smollm2.yaml`` for each task (about half an hour on two cores in all). It reads
$COLA_DATA_DIR, or the hub. Runs are written to ``tasks.jsonl`` as they end; a second call does what is missing. The training
loss is over all training rows, by the base and at the end.
"""

import argparse
import csv
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lines import Lines, show

from cola_lightning import COLACausalLM, PromptDataModule
from cola_lightning.cli import main as cola
from cola_lightning.data.tasks import TASKS

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "smollm2.yaml"

# The local copy of ReCoRD has 32 rows in each split, three steps of training; writing an answer takes long.
OWN = {
    "ReCoRD": {"data.train_size": 24, "data.val_size": 8, "data.test_size": 32, "chain.every_n_train_steps": 2},
    "SQuAD": {"data.test_size": 24},
    "DROP": {"data.test_size": 24},
}


def run(task: str) -> dict[str, Any]:
    """One ``cola fit``, one ``cola test``, and the training loss before and after."""
    own = [f"--{name}={value}" for name, value in OWN.get(task, {}).items()]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--config", str(CONFIG), "--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false"]
        options += ["--data.task", task, *own]
        start = time.perf_counter()
        assert cola(["fit", *options]) == 0
        seconds = time.perf_counter() - start
        checkpoint = Path(folder) / "runs" / "version_0" / "checkpoints" / "last.ckpt"
        assert cola(["test", *options, "--ckpt_path", str(checkpoint)]) == 0
        test = last_row(Path(folder) / "runs" / "version_1" / "metrics.csv")
        before, after = (training_loss(checkpoint, task, links) for links in (0, None))
    metric = next(name for name in ("accuracy", "f1") if f"test_{name}" in test)
    result = {"task": task, "train_loss_before": before, "train_loss_after": after, "metric": metric}
    return result | {"test": round(float(test[f"test_{metric}"]), 4), "seconds": round(seconds)}


class OnTraining(PromptDataModule):
    """The data with its rows of training in the place of those of validation."""

    def setup(self, stage: str) -> None:
        """As a fit does."""
        super().setup("fit")
        self.val = self.train


def training_loss(checkpoint: Path, task: str, links: int | None) -> float:
    """The mean loss over the training rows of a checkpoint's first links."""
    arguments = yaml.safe_load(CONFIG.read_text())["data"]["init_args"] | {"task": task}
    own = {name.removeprefix("data."): value for name, value in OWN.get(task, {}).items() if name.startswith("data.")}
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module = COLACausalLM.load_from_checkpoint(checkpoint, links=links)
    (metrics,) = trainer.validate(module, datamodule=OnTraining(**arguments | own), verbose=False)
    return round(metrics["val_loss"], 4)


def last_row(path: Path) -> dict[str, str]:
    """The last line of a run's CSV file, by column."""
    with path.open() as file:
        return list(csv.DictReader(file))[-1]


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table's rows: a task, its training loss before and after, its test metric, and the seconds of its fit."""
    return [
        [
            result["task"],
            f"{result['train_loss_before']:.2f} → {result['train_loss_after']:.2f}",
            f"{result['test']:.2f} ({result['metric']})",
            str(result["seconds"]),
        ]
        for result in results
    ]


def main() -> None:
    """Runs what is not in the output yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "tasks.jsonl")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lines = Lines(arguments.output)
    for one in lines.missing({"task": task} for task in TASKS):
        lines.add(run(**one))
        print(lines.results[-1], flush=True)
    ordered = sorted(lines.results, key=lambda result: list(TASKS).index(result["task"]))
    show(["task", "training loss", "test", "seconds"], rows(ordered))


if __name__ == "__main__":
    main()
