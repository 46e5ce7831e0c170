"""What a step on pictures costs: this package next to peft under transformers' Trainer, on the same small vision transformer.

    python -m benchmarks.images

takes optimizer steps of rank 8 on all linear layers, with a new head that is trained whole, by the training loops of Lightning
and of transformers' Trainer, on the same rows in memory. Both sides take turns, and a ratio is the median over pairs of runs.
Seconds are the processor's for this process, because other programs disturb the clock's.
"""

import logging
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

from benchmarks.lines import Lines, Rows, main
from benchmarks.steps import BESIDE, SILENT, beside
from cola_lightning import COLAImageClassifier

FILE = Path(__file__).with_suffix(".jsonl")
SIDE, LABELS, RANK, BATCH_SIZE, STEPS, PAIRS = 32, 10, 8, 8, 20, 7


def model_folder(place: Path) -> str:
    """A folder with a vision transformer of random weights."""
    sizes: Any = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTConfig(image_size=SIDE, patch_size=8, **sizes)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(place)
    return str(place)


def pictures() -> list[dict[str, Any]]:
    """Random pictures, as the image processor makes them, with labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH_SIZE * STEPS, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(LABELS, (BATCH_SIZE * STEPS,), generator=generator)
    return [{"pixel_values": one, "labels": label} for one, label in zip(pixels, labels, strict=True)]


def cola_seconds(name: str, data: list[dict[str, Any]]) -> float:
    """Seconds of a fit of this package."""
    module = COLAImageClassifier(name, rank=RANK, alpha=2 * RANK, target_modules="all-linear", num_labels=LABELS, seed=0)
    module.configure_model()
    trainer = Trainer(accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, **SILENT)
    loader: Any = DataLoader(data, BATCH_SIZE, shuffle=True)  # type: ignore[arg-type]
    start = time.process_time()
    trainer.fit(module, loader)
    return time.process_time() - start


def peft_seconds(name: str, data: list[dict[str, Any]]) -> float:
    """Seconds of the same steps of peft under transformers' Trainer."""
    base = transformers.AutoModelForImageClassification.from_pretrained(name, num_labels=LABELS)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    options: Any = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1000}
    options |= {"per_device_train_batch_size": BATCH_SIZE, "num_train_epochs": 1, "learning_rate": 1e-3}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(folder, remove_unused_columns=False, **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def run(lines: Lines) -> None:
    """Measures both sides, if there is no line; the first pair of runs warms up."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if lines.missing([{}]):
        data, found = pictures(), {"cola": list[float](), "peft": list[float]()}
        with tempfile.TemporaryDirectory() as folder:
            name = model_folder(Path(folder))
            for _ in range(PAIRS + 1):
                found["cola"].append(round(cola_seconds(name, data) / STEPS, 4))
                found["peft"].append(round(peft_seconds(name, data) / STEPS, 4))
        lines.add({"seconds": {side: seconds[1:] for side, seconds in found.items()}})


def rows(results: list[dict[str, Any]]) -> Rows:
    """The ratio of the seconds."""
    return [beside("a step on pictures", line) for line in results]


if __name__ == "__main__":
    main(__doc__, FILE, run, [(BESIDE, rows)])
