"""What is proved of chains, and what is proved against them, on problems whose optimum is known.

    python -m benchmarks.convergence

takes a minute on a CPU core, writes ``convergence/results.jsonl`` and a figure for each of three experiments:

* ``tail.png``: least squares towards a matrix of full rank by links of rank 2. With exact inner solves the error after k links
  is the truncated singular value decomposition's; with links that AdamW trains it is close to it.
* ``gap.png``: the idealised chain of theorem 4.1 (Frank-Wolfe over a nuclear-norm ball, whose links have rank 1): the mean of
  its gap, and the theorem's bound. The practical chain takes the whole step, and the theorem is not about it.
* ``counter_example.png``: RAC-LoRA's quadratic in a 3 x 3 matrix, rank 1, gradient descent with a step of 1/L, by LoRA, COLA
  and RAC-LoRA. COLA diverges with that step and reaches the optimum with a tenth of it; LoRA stays at the best matrix of
  rank 1; RAC-LoRA reaches the optimum. In that paper LoRA, too, diverges with 1/L, and smaller steps end both at a poor
  stationary point.

Source: Xia et al. (arXiv 2401.04151), theorem 4.1; Malinovsky et al. (arXiv 2410.08305), section 3.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from cola_lightning import AdaptedModel, LoRAConfig
from cola_lightning.lora.config import TrainedFactors

HERE = Path(__file__).parent / "convergence"

SIZE, RANK, LINKS = 32, 2, 12
BLUE, RED, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.4"


def zero_matrix(size: int) -> nn.Module:
    """A linear layer whose weight is zero, in float64."""
    layer = nn.Linear(size, size, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(layer)


def chain(size: int, rank: int, seed: int, trained: TrainedFactors = "both") -> AdaptedModel:
    """A chain of links from the zero matrix; alpha is the rank, so that an update is B A."""
    config = LoRAConfig(["0"], rank=rank, alpha=rank, init="gaussian", trained_factors=trained)
    return AdaptedModel(lambda: zero_matrix(size), config, seed=seed)


def matrix(adapted: AdaptedModel) -> Tensor:
    """The matrix that the layer computes with, links included."""
    product: Tensor = adapted.model(torch.eye(adapted.layers["0"].weight.shape[1], dtype=torch.float64)).T
    return product


# ---------------------------------------------------------------------- the tail of a spectrum


def target(size: int = SIZE, decay: float = 0.9) -> Tensor:
    """A matrix of full rank whose singular values fall by a factor of ``decay``."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q for _ in range(2))
    values = torch.pow(decay, torch.arange(size, dtype=torch.float64))
    matrix: Tensor = left @ torch.diag(values) @ right
    return matrix


def tail(wanted: Tensor, rank: int, links: int) -> list[float]:
    """The error of the best approximation of rank 0, r, 2 r, ...: the norm of the singular values that are left out."""
    values = torch.linalg.svdvals(wanted)
    return [float(values[k * rank :].norm()) for k in range(links + 1)]


def exact_links(wanted: Tensor, rank: int, links: int) -> list[float]:
    """The error after each link, each of which is the best of its rank for what is left."""
    adapted = chain(wanted.shape[0], rank, seed=0)
    layer, errors = adapted.layers["0"], [float(wanted.norm())]
    for _ in range(links):
        with torch.no_grad():
            left, values, right = torch.linalg.svd(wanted - layer.weight)
            layer.lora_B.copy_(left[:, :rank] * values[:rank])
            layer.lora_A.copy_(right[:rank])
        adapted.tie_knot()
        errors.append(float((wanted - layer.weight).norm()))
    return errors


def trained_links(wanted: Tensor, rank: int, links: int, steps: int = 400, rate: float = 0.03) -> list[float]:
    """The error after each link, each trained by AdamW with a rate that falls to zero."""
    adapted = chain(wanted.shape[0], rank, seed=0)
    errors = [float(wanted.norm())]
    for _ in range(links):
        optimizer = AdamW(adapted.trained_parameters(), lr=rate, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            (wanted - matrix(adapted)).square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
        adapted.tie_knot()
        errors.append(float((wanted - matrix(adapted)).detach().norm()))
    return errors


# ---------------------------------------------------------------------- the theorem's bound


def frank_wolfe(wanted: Tensor, steps: int) -> tuple[float, float]:
    """The mean Frank-Wolfe gap of half the squared distance over the nuclear-norm ball that just holds the target; its bound.

    Each step goes a fixed share of the way to a matrix of rank 1: beta is 1, the diameter twice the ball's radius, and M the
    loss at the start.
    """
    radius = float(torch.linalg.svdvals(wanted).sum())
    bound_of_loss, diameter = 0.5 * float(wanted.square().sum()), 2 * radius
    share = min(1.0, math.sqrt(2 * bound_of_loss / (diameter**2 * steps)))
    weight, gaps = torch.zeros_like(wanted), []
    for _ in range(steps):
        gradient = weight - wanted
        left, _, right = torch.linalg.svd(gradient)
        vertex = -radius * torch.outer(left[:, 0], right[0])
        gaps.append(float((gradient * (weight - vertex)).sum()))
        weight = weight + share * (vertex - weight)
    return sum(gaps) / steps, 2 * math.sqrt(bound_of_loss) * diameter / math.sqrt(steps)


# ---------------------------------------------------------------------- RAC-LoRA's counter-example

CURVATURE = torch.ones(3, 3, dtype=torch.float64).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(10.0).double())
SMOOTHNESS = 10.0


def quadratic(weight: Tensor) -> Tensor:
    """Half of x' diag(10, 1, ..., 1) x plus the sum of x, of the nine entries x; 0 at its optimum, which has rank 2."""
    return (0.5 * CURVATURE * weight.square() + weight + 0.5 / CURVATURE).sum()


def descend(
    trained: TrainedFactors, seed: int, link_steps: int | None, steps: int = 1000, step: float = 1 / SMOOTHNESS
) -> list[float]:
    """The quadratic after each step of gradient descent; infinite from where it exceeds 1e12.

    A frozen factor is scaled to length 1, so that a link's step is the projected gradient step that RAC-LoRA's theory has.

    Args:
        trained: which factors a link trains.
        seed: of the links' draws.
        link_steps: steps of a link; None: one link.
        steps: of the run.
        step: the step size.
    """
    adapted, losses = chain(3, 1, seed, trained), []
    optimizer: SGD | None = None
    for k in range(steps):
        if link_steps and k and k % link_steps == 0:
            adapted.tie_knot()
            optimizer = None
        if optimizer is None:
            with torch.no_grad():
                for factor in adapted.frozen_factors():
                    factor.div_(factor.norm())
            optimizer = SGD(adapted.trained_parameters(), lr=step)
        loss = quadratic(matrix(adapted))
        losses.append(float(loss.detach()))
        if not losses[-1] < 1e12:
            return losses[:-1] + [math.inf] * (steps - k)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


RULES: dict[str, dict[str, Any]] = {
    "LoRA": {"trained": "both", "link_steps": None},
    "COLA, links of 10 steps": {"trained": "both", "link_steps": 10},
    "COLA, links of 10 steps, step 0.1/L": {"trained": "both", "link_steps": 10, "step": 0.1 / SMOOTHNESS},
    "RAC-LoRA, links of 10 steps": {"trained": "random", "link_steps": 10},
}


# ---------------------------------------------------------------------- figures


def figure(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    """An empty figure with a logarithmic axis."""
    made = Figure(figsize=(5.6, 3.8), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.add_subplot()
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def draw_tail(best: Sequence[float], exact: Sequence[float], trained: Sequence[float], path: Path) -> None:
    """The error after k links."""
    made, axes = figure(f"links of rank {RANK}", "distance from the optimum")
    axes.plot(best, color=GREY, linewidth=5, alpha=0.35, label="truncated SVD of the same rank")
    axes.plot(exact, "o", color=BLUE, markersize=4, label="chain, exact inner solves")
    axes.plot(trained, "x-", color=RED, markersize=5, linewidth=1, label="chain, each link 400 steps of AdamW")
    axes.legend(frameon=False)
    made.savefig(path, dpi=130)


def draw_gap(horizons: Sequence[int], gaps: Sequence[tuple[float, float]], path: Path) -> None:
    """The mean gap and its bound."""
    made, axes = figure("links of rank 1 (T)", "mean Frank-Wolfe gap")
    axes.set_xscale("log")
    axes.plot(horizons, [bound for _, bound in gaps], "--", color=GREY, label="bound of theorem 4.1")
    axes.plot(horizons, [gap for gap, _ in gaps], "o-", color=BLUE, markersize=4, label="measured")
    axes.legend(frameon=False)
    made.savefig(path, dpi=130)


def draw_counter_example(runs: dict[str, list[list[float]]], path: Path) -> None:
    """The quadratic over the steps, a line a seed."""
    made, axes = figure("steps of gradient descent", "loss above the optimum")
    for (name, of_rule), color in zip(runs.items(), (BLUE, RED, PINK, GREEN), strict=True):
        for place, losses in enumerate(of_rule):
            shown = [min(max(loss, 1e-12), 1e8) for loss in losses]
            axes.plot(shown, color=color, linewidth=0.9, alpha=0.8, label=None if place else name)
    axes.set_ylim(3e-13, 1e6)
    axes.legend(frameon=False, fontsize=8)
    made.savefig(path, dpi=130)


def main(output: Path = HERE, links: int = LINKS, seeds: int = 5, steps: int = 1000, longest: int = 1000) -> None:
    """Runs the experiments, prints what they come to, and draws the figures."""
    output.mkdir(parents=True, exist_ok=True)
    wanted = target()
    best, exact, trained = (solve(wanted, RANK, links) for solve in (tail, exact_links, trained_links))
    draw_tail(best, exact, trained, output / "tail.png")
    horizons = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n <= longest]
    gaps = [frank_wolfe(wanted, horizon) for horizon in horizons]
    draw_gap(horizons, gaps, output / "gap.png")
    runs = {name: [descend(**rule, seed=seed, steps=steps) for seed in range(seeds)] for name, rule in RULES.items()}
    draw_counter_example(runs, output / "counter_example.png")
    lines: list[dict[str, Any]] = [{"experiment": "tail", "best": best, "exact": exact, "trained": trained}]
    lines += [
        {"experiment": "gap", "links": n, "gap": gap, "bound": bound} for n, (gap, bound) in zip(horizons, gaps, strict=True)
    ]
    for name, of_rule in runs.items():
        ends = [losses[-1] if math.isfinite(losses[-1]) else None for losses in of_rule]
        lines.append({"experiment": "counter-example", "rule": name, "steps": steps, "loss at the end, a seed each": ends})
    (output / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
