"""Which base, which mode: what a chain loses, holds and costs on bases of several dtypes, with links merged or stacked.

    python -m benchmarks.bases

measures on one CPU thread (about ten minutes):

* ``error``: ten links of 1e-3 of the weight's size each, on a layer 1024 wide: how far what the layer then adds is from the sum
  of the links in float64, relative to it. ``merged as it is``: added to the bf16 weight, which this package refuses to do.
* ``weights_mb``: weights and links of a model of OPT-125m's shape, and ``knot_mb``: what a finished link of rank 8 adds to them
  (beside its float32 copy in the chain, in the CPU's memory).
* ``seconds``: training steps of that model (8 rows of 64 tokens), with one link and with 64 finished ranks. All of them take
  turns: a ratio is the median over rounds of two times of one round.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OPTConfig

from benchmarks.lines import Lines, Rows, main
from benchmarks.speed import FULL, TARGETS, cola_step
from benchmarks.steps import RandomCausalLM, build, ratio, take_turns
from cola_lightning import COLACausalLM, LoRAConfig
from cola_lightning.lora.inject import lora_class
from cola_lightning.lora.quantization import quantize

Mode = tuple[str, str]  # base, what becomes of finished links
MODES: list[Mode] = [
    ("float32", "merge"),
    ("float32", "stack"),
    ("bfloat16", "merge"),
    ("bfloat16", "stack"),
    ("nf4", "stack"),
]
PLAIN: Mode = ("bfloat16", "merged as it is")
FILE = Path(__file__).with_suffix(".jsonl")
LINKS, RANK = 8, 8
BASELINE = "float32 merge, one link"


def cola_module(config: OPTConfig, base: str, finished_links: str, targets: Sequence[str] | str = TARGETS) -> RandomCausalLM:
    """The package's module around a model of this size, in a mode."""
    dtype = "bfloat16" if base == "nf4" else base
    module = RandomCausalLM(
        lambda: build(config).to(getattr(torch, dtype)),
        target_modules=targets,
        dtype=dtype,
        quantization="nf4" if base == "nf4" else None,
        finished_links=finished_links,
    )
    module.configure_model()
    return module


@torch.no_grad()
def learn(module: RandomCausalLM) -> None:
    """Gives the current link something to hold."""
    for layer in module.adapted.layers.values():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(module.n_finished)) * 1e-3)


def random_links(width: int, weight: Tensor, size: float, n: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Random factors whose products are of the given size beside the weight."""
    generator = torch.Generator().manual_seed(1)
    links = []
    for _ in range(n):
        A, B = torch.randn(RANK, width, generator=generator), torch.randn(width, RANK, generator=generator)
        links.append((A, B * (size * weight.float().norm() / (B @ A).norm())))
    return links


@torch.no_grad()
def error_of_update(mode: Mode, width: int = 1024, size: float = 1e-3) -> float:
    """How far what a layer adds after ten links is from their sum, relative to it."""
    base, finished_links = mode
    torch.manual_seed(0)
    linear = nn.Linear(width, width, bias=False)
    model = nn.Sequential(linear)
    nn.init.normal_(linear.weight, std=0.02)
    model.to(torch.bfloat16 if base in ("bfloat16", "nf4") else torch.float32)
    links = random_links(width, linear.weight, size)
    if base == "nf4":
        quantize(model, torch.bfloat16)
    expected = torch.stack([B.double() @ A.double() for A, B in links]).sum(0)
    if mode == PLAIN:
        before = linear.weight.detach().clone()
        for A, B in links:
            linear.weight.add_((B @ A).to(before.dtype))
        update = linear.weight.double() - before.double()
    else:
        config = LoRAConfig(rank=RANK, alpha=RANK, finished_links=finished_links)  # type: ignore
        layer = lora_class(model[0]).adapt_(model[0], config)  # type: ignore
        before = layer.full_weight().clone()
        for A, B in links:
            layer.add_finished_link(A, B, 1.0)
        if layer.stack is None:
            update = layer.weight.double() - before.double()
        else:
            A, B = layer.stack.factors
            update = B.double() @ A.double()
    return float((update - expected).norm() / expected.norm())


def megabytes(module: COLACausalLM) -> float:
    """Weights, links and what is stacked, in 1e6 bytes."""
    stacks = [layer.stack for layer in module.adapted.layers.values() if layer.stack is not None]
    tensors = [*module.model.parameters(), *module.model.buffers()]
    return (sum(tensor.nbytes for tensor in tensors) + sum(stack.A.nbytes + stack.B.nbytes for stack in stacks)) / 1e6


def measure_steps(
    config: OPTConfig, targets: Sequence[str] | str, repeats: int = 7, modes: Sequence[Mode] = MODES, length: int = 64
) -> dict[str, Any]:
    """Sizes and seconds of the modes, with one link and with eight finished ones beside it, on rows of so many tokens."""
    works, sizes = {}, {}
    for mode in modes:
        module = cola_module(config, *mode, targets)
        works[f"{' '.join(mode)}, one link"] = cola_step(config, length, module)
        before = megabytes(module)
        if mode[1] == "merge":  # nothing grows
            sizes[" ".join(mode)] = {"weights_mb": before, "knot_mb": 0.0}
            continue
        chained = cola_module(config, *mode, targets)
        for _ in range(LINKS):
            learn(chained)
            chained.tie_knot()
        works[f"{' '.join(mode)}, 64 ranks"] = cola_step(config, length, chained)
        sizes[" ".join(mode)] = {"weights_mb": before, "knot_mb": (megabytes(chained) - before) / LINKS}
    return {"sizes": sizes, "seconds": take_turns(works, repeats)}


COLUMNS = ("base", "links", "error of ten links", "MB", "MB per knot", "step", "step, rank 64")


def rows(results: list[dict[str, Any]]) -> Rows:
    """The table's rows; where two choices of targets were measured, a cell holds both."""
    errors = {result["mode"]: result["error"] for result in results if "error" in result}
    steps = [result for result in results if "seconds" in result]
    table = []
    for mode in [*MODES, PLAIN]:
        name = " ".join(mode)
        cells = [*mode, f"{errors[name]:.1e}"]
        if mode == PLAIN:
            table.append([*cells, "", "", "", ""])
            continue
        sizes, seconds = [result["sizes"][name] for result in steps], [result["seconds"] for result in steps]
        one, many = f"{name}, one link", f"{name}, 64 ranks"
        cells.append(" / ".join(f"{size['weights_mb']:.0f}" for size in sizes))
        cells.append(" / ".join(f"{size['knot_mb']:.2f}" for size in sizes) if mode[1] == "stack" else "0")
        cells.append(" / ".join(f"{ratio(some, one, BASELINE):.2f}" for some in seconds))
        cells.append(" / ".join(f"{ratio(some, many, one):.2f}" for some in seconds) if mode[1] == "stack" else "1")
        table.append(cells)
    return table


def run(lines: Lines) -> None:
    """Measures what no line has."""
    warnings.simplefilter("ignore")
    for mode in [*MODES, PLAIN]:
        for one in lines.missing([{"mode": " ".join(mode)}]):
            lines.add(one | {"error": error_of_update(mode)})
    for one in lines.missing([{"targets": TARGETS}, {"targets": "all-linear"}]):
        lines.add(one | measure_steps(FULL, one["targets"]))


if __name__ == "__main__":
    main(__doc__, FILE, run, [(COLUMNS, rows)])
