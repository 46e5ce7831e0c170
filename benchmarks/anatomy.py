"""The run that notebooks/anatomy_of_a_chain.ipynb takes apart: a chain and a LoRA of the same rank on the GPT on bytes.

    python benchmarks/anatomy.py

trains with ``configs/domain_shift.yaml``, in 800 steps: eight links of rank 4, one link of rank 4, and one of rank 32. Into
``notebooks/data/anatomy`` go the three chains as folders, and a CSV for each run: a line a step, and what a knot did. About
three minutes a run on a CPU core, after 13 of pre-training, once.
"""

import csv
import math
from pathlib import Path
from typing import Any

import torch
from byte_gpt import COLAByteGPT, PythonSourceDataModule, next_byte_loss
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from cola_lightning import ChainOfLoRA

FOLDER = Path(__file__).parent.parent / "notebooks" / "data" / "anatomy"
STEPS, LINKS, RANK = 800, 8, 4
RUNS = {"chain": (LINKS, RANK, 2e-2), "lora": (1, RANK, 2e-2), "lora-sum-rank": (1, LINKS * RANK, 1e-2)}  # links, rank, rate
HELD_BACK = 128  # windows on which the loss is measured at each tenth step, and on both sides of a knot


class Watched(ChainOfLoRA):
    """Ties knots, and notes at each step what the optimizer does.

    Args:
        windows: on which the loss is measured.
        every: a knot after so many steps; None: never.
    """

    def __init__(self, windows: Tensor, every: int | None) -> None:
        super().__init__(every_n_train_steps=every)
        self.windows, self.rows = windows, []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step, link = trainer.global_step, len(self.module.chain)
        self.row: dict[str, float] = {"step": step, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        if step % 10 == 0:
            self.row["held_back_loss"] = self._loss(pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if len(self.module.chain) > link:
            self.row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            self.row["held_back_loss_after_knot"] = self._loss(pl_module)
        self.row["link"] = len(self.module.chain)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for factor, parameters in _factors(pl_module).items():
            self.row[f"gradient_{factor}"] = _norm(p.grad for p in parameters)
            self.row[f"adam_mean_{factor}"] = _norm(_state(optimizer, p, "exp_avg") for p in parameters)
            self.row[f"adam_root_{factor}"] = _norm(_state(optimizer, p, "exp_avg_sq").sqrt() for p in parameters)
        self.before = _updates(pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        now = _updates(pl_module)
        self.row["step_norm"] = _norm(mine - theirs for mine, theirs in zip(now, self.before, strict=True))
        self.row["train_loss"] = outputs["loss"].item()
        self.rows.append(self.row)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.rows.append({"step": trainer.global_step, "held_back_loss": self._loss(pl_module)})

    def _loss(self, module: LightningModule) -> float:
        with torch.no_grad():
            return next_byte_loss(module.model, self.windows).item()


def _factors(module: LightningModule) -> dict[str, list[torch.nn.Parameter]]:
    layers = module.adapted.layers.values()
    return {"A": [layer.lora_A for layer in layers], "B": [layer.lora_B for layer in layers]}


def _state(optimizer: Optimizer, parameter: torch.nn.Parameter, name: str) -> Tensor:
    """Of Adam, before its step; zeros where it has none yet."""
    return optimizer.state[parameter].get(name, torch.zeros(1))


def _norm(tensors: Any) -> float:
    return math.hypot(*(tensor.norm().item() for tensor in tensors))


def _updates(module: LightningModule) -> list[Tensor]:
    """What the current link adds to each layer's weight."""
    with torch.no_grad():
        return [layer.scaling * (layer.lora_B @ layer.lora_A) for layer in module.adapted.layers.values()]


def train(name: str, links: int, rank: int, rate: float) -> None:
    """A run, into files that have its name."""
    seed_everything(0)
    data = PythonSourceDataModule()
    data.setup("fit")
    watched = Watched(data.val[:: len(data.val) // HELD_BACK], STEPS // links if links > 1 else None)
    module = COLAByteGPT(
        target_modules=["qkv", "proj", "up", "down"],
        rank=rank,
        alpha=2 * rank,
        seed=0,
        optimizer=lambda parameters: AdamW(parameters, lr=rate, weight_decay=0),
        lr_schedule="cosine",
        warmup_steps=0.03,
        schedule_scope="run",
        knot_warmup_steps=0.03,
    )
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[watched],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    module.full_chain().save(FOLDER / name, overwrite=True)
    names = list(dict.fromkeys(name for row in watched.rows for name in row))
    with (FOLDER / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: f"{v:.7g}" for n, v in row.items()} for row in watched.rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, of_run in RUNS.items():
        train(name, *of_run)
