"""What a step on pictures costs: this package next to peft under transformers' Trainer, on the same small vision transformer.

    OMP_NUM_THREADS=1 python -m benchmarks.images

takes optimizer steps of rank 8 on all linear layers, with a new head that is trained whole, by the training loops of Lightning
and of transformers' Trainer, on the same rows in memory. Both sides take turns, and a ratio is the median over pairs of runs.
Seconds are the processor's for this process, because other programs disturb the clock's. It writes ``images.jsonl``.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from benchmarks.lines import Lines, show
from cola_lightning import COLAImageClassifier

FILE = Path(__file__).parent / "images.jsonl"
LIMIT = 0.9  # of the time of peft under transformers' Trainer
SIDE, LABELS, RANK, ROWS, STEPS, PAIRS = 32, 10, 8, 8, 20, 7


def model_folder(place: Path) -> str:
    """A folder with a vision transformer of random weights."""
    sizes: Any = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTConfig(image_size=SIDE, patch_size=8, **sizes)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(place)
    return str(place)


def rows() -> list[dict[str, Any]]:
    """Random pictures, as the image processor makes them, with labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(ROWS * STEPS, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(LABELS, (ROWS * STEPS,), generator=generator)
    return [{"pixel_values": one, "labels": label} for one, label in zip(pixels, labels, strict=True)]


def cola_seconds(name: str, data: list[dict[str, Any]]) -> float:
    """Seconds of a fit of this package."""
    module = COLAImageClassifier(name, rank=RANK, alpha=2 * RANK, target_modules="all-linear", num_labels=LABELS, seed=0)
    module.configure_model()
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, **quiet)
    loader: Any = DataLoader(data, ROWS, shuffle=True)  # type: ignore[arg-type]
    start = time.process_time()
    trainer.fit(module, loader)
    return time.process_time() - start


def trainer_seconds(name: str, data: list[dict[str, Any]]) -> float:
    """Seconds of the same steps of peft under transformers' Trainer."""
    base = transformers.AutoModelForImageClassification.from_pretrained(name, num_labels=LABELS)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    options: Any = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1000}
    options |= {"per_device_train_batch_size": ROWS, "num_train_epochs": 1, "learning_rate": 1e-3}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(folder, remove_unused_columns=False, **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def main() -> None:
    """Measures both, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=FILE)
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sides = {"cola": cola_seconds, "peft": trainer_seconds}
    data, found = rows(), {side: list[float]() for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        name = model_folder(Path(folder))
        for pair in range(PAIRS + 1):
            for side, seconds in sides.items():
                value = seconds(name, data) / STEPS
                if pair:  # the first one warms up
                    found[side].append(round(value, 4))
    ratio = statistics.median(mine / theirs for mine, theirs in zip(found["cola"], found["peft"], strict=True))
    Lines(output, is_new=True).add({**found, "ratio": round(ratio, 3), "limit": LIMIT})
    medians = [f"{statistics.median(found[side]) * 1000:.1f} ms" for side in sides]
    show(["a step", "cola", "peft, Trainer", "ratio", "limit"], [["small ViT", *medians, f"{ratio:.3f}", f"{LIMIT}"]])


if __name__ == "__main__":
    main()
