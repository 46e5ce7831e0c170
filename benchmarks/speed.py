"""What a training step costs here, against peft's LoRA and against the least that any LoRA has to do.

    python benchmarks/speed.py

trains a model of OPT-125m's shape (random weights) on one CPU thread, on rows whose loss is at one position, as a prompt's
answer is. It writes ``speed.jsonl`` (one result a line) and prints each ratio beside its limit; about ten minutes.

* ``peft``: peft's LoRA, with the loss that the model itself computes, and so with the logits of all positions;
* ``cola``: this package's step: the links, and the logits of the position that carries the loss;
* ``floor``: the frozen model's forward, the logits of that position, and the backward to the inputs: no weight's gradient.

Steps take turns, and a ratio is the median over the rounds of one step's time over the other's in the same round, so that a
machine that slows down slows both. Each peak of memory is that of a process of its own: interpreter, libraries and weights too.
"""

import argparse
import json
import logging
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

from cola_lightning import ChainOfLoRA, COLACausalLM

HERE = Path(__file__).parent
TARGETS = ["q_proj", "v_proj"]
TIME_LIMITS, MEMORY_LIMITS = {64: 0.72, 256: 0.58}, {64: 0.80, 256: 0.62}  # ours over peft's, by tokens a row
FLOOR_LIMIT, KNOT_LIMIT, LINKS_LIMIT = 1.05, 1.0, 1.05


class Shape(NamedTuple):
    """A model's size."""

    layers: int
    width: int
    vocabulary: int


FULL = Shape(layers=12, width=768, vocabulary=50272)  # OPT-125m
SMALL = Shape(layers=2, width=128, vocabulary=8000)
CHAINED = Shape(layers=4, width=256, vocabulary=2000)

Batch = Mapping[str, Tensor]
Result = dict[str, Any]


def build(shape: Shape) -> OPTForCausalLM:
    """The same model at each call, without dropout."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, word_embed_proj_dim=shape.width, ffn_dim=4 * shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.width // 64, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config)


def make_batch(shape: Shape, length: int, size: int = 8) -> Batch:
    """Rows of so many tokens without padding; the last token is the answer, the only one with a loss."""
    ids = torch.randint(3, shape.vocabulary, (size, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class ShapedCausalLM(COLACausalLM):
    """The package's module around a model of that shape; the model's name stands for nothing."""

    def __init__(self, shape: Shape) -> None:
        super().__init__("random", target_modules=TARGETS, rank=8, alpha=16, seed=0)
        self.shape = shape

    def build_model(self) -> nn.Module:
        """See the base class."""
        return build(self.shape)


def peft_step(shape: Shape, batch: Batch) -> Callable[[], None]:
    """One step of peft's LoRA, as its documentation has it."""
    model = get_peft_model(build(shape), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0))
    return _training_step(model, lambda: model(**batch).loss)


def cola_step(shape: Shape, batch: Batch) -> Callable[[], None]:
    """One step of this package."""
    module = ShapedCausalLM(shape)
    module.configure_model()
    return _training_step(module, lambda: module.step(batch).loss)


def _training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_step(shape: Shape, batch: Batch) -> Callable[[], None]:
    """What no LoRA goes without: forward, one position's logits, and backward through all layers."""
    model = build(shape).requires_grad_(False)
    place = torch.tensor([batch["input_ids"].shape[1] - 2])

    def step() -> None:
        inputs = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        mask = batch["attention_mask"]
        logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False, logits_to_keep=place).logits
        F.cross_entropy(logits[:, 0], batch["labels"][:, -1]).backward()

    return step


STEPS = {"peft": peft_step, "cola": cola_step, "floor": floor_step}


def clock(work: Callable[[], object]) -> float:
    """Seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(works: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """What each of the works returns (its seconds), in rounds of all of them; the first rounds do not count."""
    rounds = [{name: work() for name, work in works.items()} for _ in range(warm_up + repeats)]
    return {name: [one[name] for one in rounds[warm_up:]] for name in works}


def ratio(seconds: Mapping[str, list[float]], mine: str, other: str) -> float:
    """The median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[mine], seconds[other], strict=True))


def step_seconds(shape: Shape, length: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of the three steps."""
    batch = make_batch(shape, length)
    return take_turns({name: partial(clock, make(shape, batch)) for name, make in STEPS.items()}, repeats)


def knot_seconds(shape: Shape, repeats: int, length: int = 64) -> dict[str, list[float]]:
    """Seconds of a knot, and of a step of the very module."""
    module, batch = ShapedCausalLM(shape), make_batch(shape, length)
    module.configure_model()
    step = _training_step(module, lambda: module.step(batch).loss)
    return take_turns({"step": partial(clock, step), "knot": partial(clock, module.tie_knot)}, repeats)


def chain_seconds(shape: Shape, repeats: int, length: int = 32, steps: int = 100) -> dict[str, list[float]]:
    """Seconds of ``Trainer.fit`` over five links, and over as many steps of one."""

    def fit(*callbacks: ChainOfLoRA) -> float:
        module = ShapedCausalLM(shape)
        module.configure_model()  # as long for both: it would hide a little of what knots cost
        off = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **off)
        return clock(partial(trainer.fit, module, DataLoader([make_batch(shape, length)] * steps, batch_size=None)))

    works = {"5 links": lambda: fit(ChainOfLoRA(every_n_train_steps=steps // 5)), "1 link": fit}
    return take_turns(works, repeats, warm_up=1)


def peak_mib(name: str, length: int, *, is_small: bool) -> float:
    """The peak memory of a process that takes a few of these steps."""
    command = [sys.executable, __file__, "--measure", name, "--lengths", str(length)]
    return float(subprocess.run([*command, *["--small"] * is_small], check=True, capture_output=True, text=True).stdout)


def own_peak_mib() -> float:
    """This process' peak memory, from Linux: ``getrusage`` would give a child its parent's, were that larger."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 1024


def measure(lengths: Iterable[int], repeats: int, *, is_small: bool) -> Iterator[Result]:
    """All results, each as soon as it is there."""
    shape = SMALL if is_small else FULL
    for length in lengths:
        peaks = {name: peak_mib(name, length, is_small=is_small) for name in STEPS}
        share, limit = peaks["cola"] / peaks["peft"], MEMORY_LIMITS.get(length)
        yield {"what": "peak memory, cola / peft", "length": length, "peak_mib": peaks, "ratio": share, "limit": limit}
        timed = {"length": length, "seconds": (seconds := step_seconds(shape, length, repeats))}
        over_peft = ratio(seconds, "cola", "peft")
        yield {"what": "step, cola / peft", **timed, "ratio": over_peft, "limit": TIME_LIMITS.get(length)}
        yield {"what": "step, cola / floor", **timed, "ratio": ratio(seconds, "cola", "floor"), "limit": FLOOR_LIMIT}
    seconds = knot_seconds(shape, repeats)
    yield {"what": "knot / step", "length": 64, "seconds": seconds, "ratio": ratio(seconds, "knot", "step"), "limit": KNOT_LIMIT}
    seconds = chain_seconds(SMALL if is_small else CHAINED, repeats)
    share = ratio(seconds, "5 links", "1 link")
    yield {"what": "fit, 5 links / 1 link", "length": 32, "seconds": seconds, "ratio": share, "limit": LINKS_LIMIT}


def as_row(result: Result) -> list[str]:
    """A result's row in the table."""
    if peaks := result.get("peak_mib"):
        each = ", ".join(f"{name} {value:.0f} MiB" for name, value in peaks.items())
    else:
        each = ", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in result["seconds"].items())
    value, limit = result["ratio"], result["limit"]
    verdict = "" if limit is None else "met" if value <= limit else "missed"
    return [result["what"], str(result["length"]), f"{value:.3f}", f"{limit:.2f}" if limit else "", verdict, each]


def main() -> None:
    """Measures, writes each result, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256], help="tokens a row (default: 64 256)")
    parser.add_argument("--output", type=Path, default=HERE / "speed.jsonl", help="file of the results, written anew")
    parser.add_argument("--small", action="store_true", help="a small model: to see it run; the limits are not for it")
    parser.add_argument("--measure", choices=STEPS, help="only take a few such steps and print this process' peak in MiB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft 0.21 under transformers 5.24
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.measure:
        shape = SMALL if options.small else FULL
        take_turns({options.measure: partial(clock, STEPS[options.measure](shape, make_batch(shape, options.lengths[0])))}, 1)
        print(own_peak_mib())
        return
    options.output.write_text("")
    table = Table("what", "tokens", "ratio", "limit", "", "median of each", title="cost of a step")
    for result in measure(options.lengths, options.repeats, is_small=options.small):
        with options.output.open("a") as file:
            file.write(json.dumps(result) + "\n")
        table.add_row(*as_row(result))
    Console(width=128).print(table)


if __name__ == "__main__":
    main()
