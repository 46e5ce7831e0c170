"""The run that notebooks/anatomy_of_a_chain.ipynb takes apart: a chain and a LoRA of the same rank on the GPT on bytes.

    python -m benchmarks.anatomy

trains with ``benchmarks/domain_shift.yaml``, in 800 steps: eight links of rank 4, one link of rank 4, and one of rank 32. Into
``notebooks/data/anatomy`` go a CSV for each run (for the chain a line a step, for the others one every ten steps), and
``updates.json``: singular values, angles and ranks of the links' updates. The chains themselves are in ``build/anatomy``. About
three minutes a run on a CPU core, after 13 of pre-training, once.
"""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from benchmarks.byte_gpt import COLAByteGPT, PythonSourceDataModule, next_byte_loss
from cola_lightning import Chain, ChainOfLoRA, COLAModule
from cola_lightning.chain.chain import Link
from cola_lightning.chain.report import effective_rank, report

ROOT = Path(__file__).parent.parent
FOLDER, CHAINS = ROOT / "notebooks" / "data" / "anatomy", ROOT / "build" / "anatomy"
SHOWN = "blocks.3.down"  # the layer whose singular values are listed
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
        self.windows = windows
        self.rows: list[dict[str, float]] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step, link = trainer.global_step, len(self.module.chain)
        self.row: dict[str, float] = {"step": step, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        if step % 10 == 0:
            self.row["held_back_loss"] = self._loss(self.module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if len(self.module.chain) > link:
            self.row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            self.row["held_back_loss_after_knot"] = self._loss(self.module)
        self.row["link"] = len(self.module.chain)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for factor, parameters in _factors(self.module).items():
            self.row[f"gradient_{factor}"] = _norm(p.grad for p in parameters)
            self.row[f"adam_mean_{factor}"] = _norm(_state(optimizer, p, "exp_avg") for p in parameters)
            self.row[f"adam_root_{factor}"] = _norm(_state(optimizer, p, "exp_avg_sq").sqrt() for p in parameters)
        self.before = _updates(self.module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        now = _updates(self.module)
        self.row["step_norm"] = _norm(mine - theirs for mine, theirs in zip(now, self.before, strict=True))
        self.row["train_loss"] = outputs["loss"].item()
        self.rows.append(self.row)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.rows.append({"step": trainer.global_step, "held_back_loss": self._loss(self.module)})

    def _loss(self, module: COLAModule) -> float:
        with torch.no_grad():
            return next_byte_loss(module.model, self.windows).item()


def _factors(module: COLAModule) -> dict[str, list[torch.nn.Parameter]]:
    layers = module.adapted.layers.values()
    return {"A": [layer.lora_A for layer in layers], "B": [layer.lora_B for layer in layers]}


def _state(optimizer: Optimizer, parameter: torch.nn.Parameter, name: str) -> Tensor:
    """Of Adam, before its step; zeros where it has none yet."""
    value: Tensor = optimizer.state[parameter].get(name, torch.zeros(1))
    return value


def _norm(tensors: Any) -> float:
    return math.hypot(*(tensor.norm().item() for tensor in tensors))


def _updates(module: COLAModule) -> list[Tensor]:
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
    module.full_chain().save(CHAINS / name, overwrite=True)
    rows = watched.rows
    if name != "chain":
        rows = [{key: row[key] for key in ("step", "held_back_loss")} for row in rows if "held_back_loss" in row]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (FOLDER / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: f"{v:.7g}" for n, v in row.items()} for row in rows)


def spaces(link: Link, name: str) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of a link's output space (columns of B) and input space (rows of A) in a layer."""
    lora_A, lora_B = (factor.double() for factor in link.factors[name])
    return torch.linalg.qr(lora_B).Q, torch.linalg.qr(lora_A.T).Q


def overlaps(chain: Chain) -> tuple[Tensor, Tensor]:
    """How much the spaces of two links have in common: the mean squared cosine of their principal angles, over the layers.

    Returns:
        Side (output, input) x link x link, and for each side what it is for random spaces of that rank.
    """
    n_links, n_layers, rank = len(chain), len(chain.layers), chain.links[0].rank
    found, at_random = torch.zeros(2, n_links, n_links), torch.zeros(2)
    for name in chain.layers:
        of_links = [spaces(link, name) for link in chain.links]
        for side in range(2):
            at_random[side] += rank / of_links[0][side].shape[0] / n_layers
            for k, one in enumerate(of_links):
                for j, other in enumerate(of_links):
                    cosines = torch.linalg.svdvals(one[side].T @ other[side])
                    found[side, k, j] += cosines.square().mean() / n_layers
    return found, at_random


def measure(chains: Mapping[str, Chain]) -> dict[str, Any]:
    """The numbers of the notebook: of the chain's links, and of the whole update of each run."""
    chain = chains["chain"]
    found, at_random = overlaps(chain)
    links = [
        {
            "start_step": link.start_step,
            "norm": link.norm(),
            "relative_norm": _mean([layer.relative_norm for layer in of_link.layers.values()]),
            "effective_rank": of_link.effective_rank,
            "singular_values": [list(layer.singular_values) for layer in of_link.layers.values()],
        }
        for link, of_link in zip(chain.links, report(chain), strict=True)
    ]
    sums = []
    for k in range(1, len(chain) + 1):
        spectra = [torch.linalg.svdvals(chain.truncate(k).delta(name).double()) for name in chain.layers]
        ranks = [effective_rank(spectrum) for spectrum in spectra]
        numerical = [int((spectrum > 1e-5 * spectrum[0]).sum()) for spectrum in spectra]
        norm = math.sqrt(sum(spectrum.square().sum().item() for spectrum in spectra))
        sums.append({"effective_rank": _mean(ranks), "numerical_rank": _mean(numerical), "norm": norm})
    runs = {}
    for name, of_run in chains.items():
        by_layer = {layer: torch.linalg.svdvals(of_run.delta(layer).double()) for layer in of_run.layers}
        ranks = [effective_rank(spectrum) for spectrum in by_layer.values()]
        runs[name] = {"effective_rank": _mean(ranks), "singular_values": by_layer[SHOWN][: LINKS * RANK].tolist()}
    overlap = {"of_links": found.tolist(), "at_random": at_random.tolist()}
    return {"rank": RANK, "layers": len(chain.layers), "links": links, "sums": sums, "overlap": overlap, "runs": runs}


def _mean(values: list[Any]) -> float:
    return float(sum(values) / len(values))


def _rounded(value: Any) -> Any:
    """Numbers to seven digits, at any depth."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def write_updates() -> None:
    """Measures the stored chains."""
    chains = {name: Chain.load(CHAINS / name) for name in RUNS}
    (FOLDER / "updates.json").write_text(json.dumps(_rounded(measure(chains))) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, of_run in RUNS.items():
        train(name, *of_run)
    write_updates()
