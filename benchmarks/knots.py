"""What a knot may keep, and when it should fall: variants of a knot in a plain training loop, compared with LoRA.

    python -m benchmarks.knots

trains the base of ``benchmarks/domain_shift.yaml`` with each method of ``METHODS``, on one CPU thread, and appends a line to
``knots/results.jsonl`` after each run. A second call does what is missing. A run of 800 steps takes about two minutes, and the
base's pre-training, once, 13.

    python -m benchmarks.knots --table

runs nothing, and prints a row for each method at the learning rate that is best on the validation of seed 0.

The loop uses neither the package's layers nor its chain, so that it can be compared with them.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.byte_gpt import PythonSourceDataModule, next_byte_loss, pretrained
from benchmarks.studies import grouped
from cola_lightning.study.results import Result, at_best_rates
from cola_lightning.study.table import BASELINE, short_cells, summarize

FILE = Path(__file__).parent / "knots" / "results.jsonl"
STABLE = 0.6  # share of a run over which the rate is constant, before it decays linearly to 0; knots fall into it
WARMUP = 0.03  # share of a run over which the rate rises from 0, at its start and after a knot with a new optimizer
BATCH_SIZE, EVAL_BATCH_SIZE, EVALUATIONS, CLIP, SCALING = 16, 64, 4, 1.0, 2.0


@dataclass(frozen=True)
class Method:
    """LoRA, or a chain of it.

    Attributes:
        schedule: of the learning rate: ``cosine`` over the run, or ``stable``: constant, then linear to 0.
        knots: their number, evenly over the first ``STABLE`` of the run.
        keeps_A: whether the next link begins with this link's A and optimizer; else with a new A and a new optimizer (COLA).
        share: of ``B A`` that a knot merges; the rest stays in B. Below 1 only if A stays.
        keeps_moments_of_A: whether a knot that leaves A leaves its moments, too. (Those of B stay.)
        decay_B: weight decay of B alone, times the learning rate, as in AdamW.
        max_norm_B: B is scaled down to this Frobenius norm after each step.
    """

    schedule: str = "stable"
    knots: int = 0
    keeps_A: bool = False
    share: float = 1.0
    keeps_moments_of_A: bool = True
    decay_B: float = 0.0
    max_norm_B: float = math.inf

    @property
    def title(self) -> str:
        """The method in words."""
        kept = "A kept with its moments" if self.keeps_moments_of_A else "A kept"
        knot = "COLA" if not self.keeps_A else kept if self.share == 1 else f"{self.share:g} merged"
        words = [f"{knot}, {self.knots} knots" if self.knots else "LoRA"]
        words += ["cosine"] if self.schedule == "cosine" else []
        words += [f"weight decay of B {self.decay_B:g}"] if self.decay_B else []
        words += [f"norm of B at most {self.max_norm_B:g}"] if math.isfinite(self.max_norm_B) else []
        return ", ".join(words)


METHODS = {
    "lora-cosine": Method("cosine"),
    "lora-stable": Method(),
    "cola-2": Method(knots=2),
    "cola-4": Method(knots=4),
    "same-A-2": Method(knots=2, keeps_A=True, keeps_moments_of_A=False),
    "same-A-4": Method(knots=4, keeps_A=True, keeps_moments_of_A=False),
    "share-1-2": Method(knots=2, keeps_A=True),
    "share-0.3-4": Method(knots=4, keeps_A=True, share=0.3),
    "share-0.5-4": Method(knots=4, keeps_A=True, share=0.5),
    "share-0.7-4": Method(knots=4, keeps_A=True, share=0.7),
    "share-0.5-10": Method(knots=10, keeps_A=True, share=0.5),
    "share-0.5-20": Method(knots=20, keeps_A=True, share=0.5),
    "share-0.5-4-cosine": Method("cosine", knots=4, keeps_A=True, share=0.5),
    "decay-B-0.1": Method(decay_B=0.1),
    "decay-B-1": Method(decay_B=1.0),
    "max-norm-B-3": Method(max_norm_B=3.0),  # about what the shares of 0.5 leave
    "max-norm-B-2": Method(max_norm_B=2.0),
}


class LoRALinear(nn.Module):
    """A frozen linear layer and a link: ``W x + SCALING B A x``."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Shape: ... x in -> ... x out."""
        y: Tensor = self.linear(x) + SCALING * F.linear(F.linear(x, self.A), self.B)
        return y

    def draw(self, generator: torch.Generator) -> None:
        """Draws A as PEFT does, Kaiming uniform, and zeroes B."""
        bound = self.linear.in_features**-0.5
        self.A.uniform_(-bound, bound, generator=generator)
        self.B.zero_()

    def update(self) -> Tensor:
        """``SCALING B A``: out x in."""
        return SCALING * self.B @ self.A


def learning_rate_factor(method: Method, step: int, steps: int, link_start: int) -> float:
    """The factor on the rate at a step, counted from 0; a link with a new optimizer begins with a warm-up of its own."""
    warmup = round(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = step / steps
    if method.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    else:
        factor = min(1.0, (1 - progress) / (1 - STABLE))
    return factor if method.keeps_A or not link_start else factor * min(1.0, (step - link_start + 1) / warmup)


@torch.no_grad()
def tie_knot(method: Method, layers: Sequence[LoRALinear], optimizer: Any, generator: torch.Generator) -> None:
    """Merges a share of each layer's link into its weight; a new A is drawn, or A and the rest of B stay."""
    for layer in layers:
        layer.linear.weight += method.share * layer.update()
        if not method.keeps_A:
            layer.draw(generator)
            optimizer.state.clear()
            continue
        layer.B.mul_(1 - method.share)
        if not method.keeps_moments_of_A:
            optimizer.state.pop(layer.A, None)


def train(method: Method, rank: int, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Trains one run.

    Returns:
        The validation loss at ``EVALUATIONS`` steps, the test loss, and the effective rank of the whole update: the exponential
        of the entropy of its squared singular values, as shares; the mean over layers.
    """
    data = PythonSourceDataModule()
    data.setup("fit")
    model = pretrained(3000, depth=4, width=128, heads=4, context=128).requires_grad_(False)
    layers: list[LoRALinear] = []
    for block in model.blocks:
        for name in ("qkv", "proj", "up", "down"):
            layers.append(LoRALinear(getattr(block, name), rank))
            setattr(block, name, layers[-1])
    order_generator, generator = (torch.Generator().manual_seed(number) for number in (seed, 1000 + seed))
    epochs = math.ceil(steps * BATCH_SIZE / len(data.train))
    order = torch.cat([torch.randperm(len(data.train), generator=order_generator) for _ in range(epochs)])
    with torch.no_grad():
        for layer in layers:
            layer.draw(generator)
    base = [layer.linear.weight.clone() for layer in layers]
    groups = [{"params": [layer.A for layer in layers]}, {"params": [layer.B for layer in layers]}]
    optimizer = torch.optim.Adam(groups, lr=rate)
    parameters = [parameter for group in groups for parameter in group["params"]]
    knots = [round(k * STABLE * steps / method.knots) for k in range(1, method.knots + 1)]
    curve, link_start = [], 0
    for step in range(steps):
        if step in knots:
            tie_knot(method, layers, optimizer, generator)
            link_start = step
        now = rate * learning_rate_factor(method, step, steps, link_start)
        for group in optimizer.param_groups:
            group["lr"] = now
        loss = next_byte_loss(model, data.train[order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for layer in layers:
                if method.decay_B:
                    layer.B.mul_(1 - now * method.decay_B)
                if math.isfinite(method.max_norm_B) and (norm := float(layer.B.norm())) > method.max_norm_B:
                    layer.B.mul_(method.max_norm_B / norm)
        if (step + 1) % (steps // EVALUATIONS) == 0:
            curve.append((step + 1, evaluate(model, data.val)))
    with torch.no_grad():
        updates = [layer.linear.weight + layer.update() - weight for weight, layer in zip(base, layers, strict=True)]
    return {
        "curve": curve,
        "validation": curve[-1][1],
        "test": evaluate(model, data.test),
        "knots": knots,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "effective_rank": sum(map(effective_rank, updates)) / len(updates),
        "norm_B": sum(float(layer.B.detach().norm()) for layer in layers) / len(layers),
    }


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    """The mean loss of the next byte, in nats."""
    losses = [next_byte_loss(model, windows[k : k + EVAL_BATCH_SIZE]).item() for k in range(0, len(windows), EVAL_BATCH_SIZE)]
    return sum(losses) / len(losses)


def effective_rank(update: Tensor) -> float:
    """The exponential of the entropy of a matrix' squared singular values, as shares of their sum."""
    shares = torch.linalg.svdvals(update) ** 2
    shares = shares / shares.sum()
    return math.exp(-float((shares * shares.clamp(min=1e-12).log()).sum()))


# ---------------------------------------------------------------------- which runs, and their table

RATES = {8: [1e-2, 7e-3, 1.4e-2], 1: [2e-2, 1.4e-2, 2.8e-2, 1e-2]}  # on seed 0; one more where the best lies at an edge
FIRST = ("lora-stable", "share-0.5-4", "same-A-2", "lora-cosine", "cola-2")
SETTINGS = [
    (8, 800, FIRST),
    (1, 800, FIRST),
    (8, 800, tuple(METHODS)),
    (1, 800, tuple(METHODS)),
    (8, 3200, (*FIRST, "share-0.5-10")),
    (1, 3200, (*FIRST, "share-0.5-20")),
]
SEEDS = 3


def missing_runs(results: Callable[[int, int], list[Result]]) -> Iterator[tuple[str, int, int, float, int]]:
    """What is to be run: each method's rates on seed 0, then the best of them on the other seeds.

    A rate at the edge of those that were tried has its neighbour tried, by a factor of the square root of 2.
    """
    for rank, steps, methods in SETTINGS:
        for name in methods:
            tried = {result.learning_rate for result in results(rank, steps) if result.method == name and result.seed == 0}
            yield from ((name, rank, steps, rate, 0) for rate in RATES[rank] if rate not in tried)
            while (edge := _next_rate(name, results(rank, steps))) is not None:
                yield name, rank, steps, edge, 0
        for seed in range(1, SEEDS):
            best = at_best_rates(results(rank, steps), "min", [0])
            for name in methods:
                if seed not in {result.seed for result in best[name]}:
                    yield name, rank, steps, best[name][0].learning_rate, seed


def _next_rate(name: str, results: Sequence[Result]) -> float | None:
    """The rate to be tried next, if a method's best is the lowest or the highest so far."""
    tuned = [result for result in results if result.method == name and result.seed == 0]
    rates = sorted(result.learning_rate for result in tuned)
    best = min(tuned, key=lambda result: result.value("min")).learning_rate
    if rates[0] < best < rates[-1]:
        return None
    return float(f"{best * (2**0.5 if best == rates[-1] else 2**-0.5):.2g}")


def read() -> list[dict[str, Any]]:
    """The lines that are there."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def results(rank: int, steps: int) -> list[Result]:
    """The results of a rank and a number of steps."""
    lines = [line for line in read() if (line["rank"], line["steps"]) == (rank, steps)]
    return [Result(**{name: line[name] for name in Result.__dataclass_fields__ if name in line}) for line in lines]


def table() -> list[list[str]]:
    """A row for each method of each rank and number of steps; differences are to LoRA at its better schedule.

    The last cell is the mean effective rank of the update.
    """
    rows = []
    for rank, steps in dict.fromkeys((rank, steps) for rank, steps, _ in SETTINGS):
        best = at_best_rates(results(rank, steps), "min", [0])
        loras = [best[name] for name in ("lora-cosine", "lora-stable") if name in best]
        if not loras:
            continue
        lora = min(loras, key=lambda runs: runs[0].value("min"))
        for row in summarize({BASELINE: lora} | {name: best[name] for name in METHODS if name in best})[1:]:
            keys = {"method": row.method, "learning_rate": row.learning_rate, "rank": rank, "steps": steps}
            ranks = [line["effective_rank"] for line in read() if keys.items() <= line.items()]
            *cells, difference = short_cells(row, METHODS[row.method].title)
            cells += ["" if row.method == lora[0].method else difference, f"{fmean(ranks):.1f}"]
            rows.append([f"rank {rank}, {steps:,} steps", *cells])
    return grouped(rows)


def main() -> None:
    """Runs what is missing, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing: only print the table")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        FILE.parent.mkdir(exist_ok=True)
        for name, rank, steps, rate, seed in missing_runs(results):
            start = time.perf_counter()
            values = train(METHODS[name], rank, steps, rate, seed)
            line = Result(
                method=name,
                seed=seed,
                learning_rate=rate,
                rank=rank,
                links=METHODS[name].knots + 1,
                validation=values["validation"],
                test=values["test"],
                steps=steps,
                seconds=round(time.perf_counter() - start, 1),
                peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                trainable_parameters=values["trainable_parameters"],
                knots=values["knots"],
                curve=values["curve"],
            )
            with FILE.open("a", encoding="utf-8") as file:
                more = {key: values[key] for key in ("effective_rank", "norm_B")}
                file.write(json.dumps(asdict(line) | more) + "\n")
            print(name, rank, steps, rate, seed, round(values["test"], 4), line.seconds, flush=True)
    for row in table():
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
