"""What a training step costs: this package, peft's LoRA, and the least that any LoRA has to do.

``python -m benchmarks.speed`` trains a model of OPT-125m's shape (random weights) on one CPU thread, on rows with a loss at one
position, as a prompt's answer has. Results go to ``speed.jsonl``, one a line, and into a table; it takes about ten minutes.

* ``peft``: peft's LoRA with the loss that the model itself computes, and so with the logits of all positions;
* ``cola``: this package's step: the links, and the logits of the position that carries the loss;
* ``floor``: the frozen model's forward, that position's logits, and the backward to the inputs: no weight's gradient.

They take turns: a ratio is the median over rounds of two times of one round. A peak of memory is that of a new process, above
what the interpreter and the libraries hold before there is a model.

``--experts`` compares links on experts alone, of a Qwen3-MoE with 64 experts of which a token has 8 (2 layers, 512 wide,
experts 256 wide): ``cola experts`` and ``peft experts``, with the model's own loss. A peak is above the
model's weights, too.
"""

import argparse
import logging
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import OPTConfig, PreTrainedConfig, Qwen3MoeConfig

from benchmarks.lines import Lines, show
from benchmarks.memory import mib
from benchmarks.random_model import SILENT, RandomCausalLM, build
from cola_lightning import ChainOfLoRA, LoRAConfig, inject_lora

TARGETS = ["q_proj", "v_proj"]
TIME_LIMITS, MEMORY_LIMITS = {64: 0.72, 256: 0.58}, {64: 0.80, 256: 0.62}  # ours over peft's, by tokens a row
FLOOR_LIMIT, KNOT_LIMIT, LINKS_LIMIT = 1.05, 1.0, 1.05
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS_TIME_LIMIT, EXPERTS_MEMORY_LIMITS = 1.0, {64: 0.6}

Batch = Mapping[str, Tensor]
Values = Mapping[str, list[float]]
Work = Callable[[], object]
Result = tuple[str, str, str, int, float | None, Values]  # unit: mine / other, tokens a row, limit of the ratio, all values
torch.set_num_threads(1)  # here, and so in the processes that measure memory, too


def shape(layers: int, width: int, vocabulary: int) -> OPTConfig:
    """A model's size; without dropout."""
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_attention_heads": width // 64,
    }
    return OPTConfig(vocab_size=vocabulary, num_hidden_layers=layers, dropout=0.0, **sizes)


FULL, SMALL, CHAINED = shape(12, 768, 50272), shape(2, 128, 8000), shape(4, 256, 2000)  # FULL is OPT-125m's


def mixture(layers: int, width: int) -> Qwen3MoeConfig:
    """A size of a mixture of 64 experts, half as wide as the model."""
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "moe_intermediate_size": width // 2,
        "num_attention_heads": width // 64,
        "head_dim": 64,
    }
    sizes |= {"num_key_value_heads": width // 64, "num_experts": 64, "num_experts_per_tok": 8}
    return Qwen3MoeConfig(vocab_size=2000, num_hidden_layers=layers, **sizes)


def make_batch(config: PreTrainedConfig, length: int, size: int = 8) -> Batch:
    """Rows of so many tokens without padding; the last token is the answer, the only one with a loss."""
    ids = torch.randint(3, config.vocab_size, (size, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": F.pad(ids[:, -1:], (length - 1, 0), value=-100)}


def cola_module(config: PreTrainedConfig) -> RandomCausalLM:
    """The package's module around the model of a config."""
    module = RandomCausalLM(lambda: build(config))
    module.configure_model()
    return module


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Work:
    """Forward, backward and AdamW's step on what is trained."""
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        torch.autograd.backward(loss())
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(config: OPTConfig, batch: Batch) -> Work:
    """A step of peft's LoRA."""
    with warnings.catch_warnings(action="ignore"):  # `is_gradient_checkpointing`: peft 0.21 under transformers 5.24
        model = get_peft_model(build(config), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0))
    return training_step(model, lambda: model(**batch).loss)


def cola_step(config: OPTConfig, batch: Batch, module: RandomCausalLM | None = None) -> Work:
    """A step of this package."""
    module = module or cola_module(config)
    return training_step(module, lambda: module.step(batch).loss)


def floor_step(config: OPTConfig, batch: Batch) -> Work:
    """What no LoRA goes without."""
    model, mask = build(config).requires_grad_(False), batch["attention_mask"]
    place = torch.tensor([mask.shape[1] - 2])

    def step() -> None:
        inputs = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False, logits_to_keep=place).logits
        torch.autograd.backward(F.cross_entropy(logits[:, 0], batch["labels"][:, -1]))

    return step


def peft_experts_step(config: Qwen3MoeConfig, batch: Batch) -> Work:
    """A step of peft's LoRA of the experts' parameters."""
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(build(config), LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=EXPERTS))
    return training_step(model, lambda: model(**batch).loss)


def cola_experts_step(config: Qwen3MoeConfig, batch: Batch) -> Work:
    """A step of this package's links on experts."""
    model = build(config)
    inject_lora(model, LoRAConfig(EXPERTS, rank=8, alpha=16))
    return training_step(model, lambda: model(**batch).loss)


STEPS = {"peft": peft_step, "cola": cola_step, "floor": floor_step}
EXPERTS_STEPS = {"peft experts": peft_experts_step, "cola experts": cola_experts_step}


def take_turns(works: Mapping[str, Work], repeats: int, warm_up: int = 2) -> Values:
    """Seconds of each of the works, in rounds of all of them; the first rounds do not count."""
    rounds = [{name: timeit(work, number=1) for name, work in works.items()} for _ in range(warm_up + repeats)]
    return {name: [one[name] for one in rounds[warm_up:]] for name in works}


def ratio(values: Values, mine: str, other: str) -> float:
    """The median over the rounds of one's value over the other's."""
    return statistics.median(a / b for a, b in zip(values[mine], values[other], strict=True))


def step_seconds(config: OPTConfig, length: int, repeats: int) -> Values:
    """Seconds of the three steps, and of a knot of the module that takes ours."""
    batch, module = make_batch(config, length), cola_module(config)
    steps = {"peft": peft_step(config, batch), "cola": cola_step(config, batch, module), "floor": floor_step(config, batch)}
    return take_turns(steps | {"knot": module.tie_knot}, repeats)


def chain_seconds(config: OPTConfig, length: int, repeats: int, steps: int = 100) -> Values:
    """Seconds to make and fit a module, over five links and over as many steps of one."""
    data: DataLoader[Batch] = DataLoader([make_batch(config, length)] * steps, batch_size=None)  # type: ignore[arg-type]

    def fit(*callbacks: ChainOfLoRA) -> None:
        Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **SILENT).fit(cola_module(config), data)

    return take_turns({"5 links": lambda: fit(ChainOfLoRA(every_n_train_steps=steps // 5)), "1 link": fit}, repeats, warm_up=1)


def peak_mib(name: str, config: PreTrainedConfig, length: int) -> float:
    """The peak memory of a new process that takes a few of these steps, above what its libraries hold."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_above, (STEPS | EXPERTS_STEPS)[name], config, make_batch(config, length)).result()


def measure_experts(config: Qwen3MoeConfig, lengths: Sequence[int], repeats: int) -> Iterator[Result]:
    """Memory and time of a step with links on experts."""
    weights = sum(parameter.nbytes for parameter in build(config).parameters()) / 2**20
    for length in lengths:
        peaks = {name: [peak_mib(name, config, length) - weights] for name in EXPERTS_STEPS}
        yield "mib_above_model", "cola experts", "peft experts", length, EXPERTS_MEMORY_LIMITS.get(length), peaks
        steps = {name: make_step(config, make_batch(config, length)) for name, make_step in EXPERTS_STEPS.items()}
        yield "seconds", "cola experts", "peft experts", length, EXPERTS_TIME_LIMIT, take_turns(steps, repeats)


def peak_above(make_step: Callable[..., Work], *of: object) -> float:
    """The peak memory of this process over a few steps, above what it holds now: to be called in a new one."""
    libraries = mib("VmRSS")
    take_turns({"step": make_step(*of)}, repeats=1)
    return mib("VmHWM") - libraries


def measure(config: OPTConfig, chained: OPTConfig, lengths: Sequence[int], repeats: int) -> Iterator[Result]:
    """All results, each as soon as it is there."""
    for length in lengths:
        peaks = {name: [peak_mib(name, config, length)] for name in STEPS}
        yield "peak_mib", "cola", "peft", length, MEMORY_LIMITS.get(length), peaks
        steps = step_seconds(config, length, repeats)
        yield "seconds", "cola", "peft", length, TIME_LIMITS.get(length), steps
        yield "seconds", "cola", "floor", length, FLOOR_LIMIT, steps
        yield "seconds", "knot", "cola", length, KNOT_LIMIT, steps
    yield "seconds", "5 links", "1 link", 32, LINKS_LIMIT, chain_seconds(chained, 32, repeats)


def main() -> None:
    """Measures, writes each result, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256], help="tokens a row (default: 64 256)")
    parser.add_argument("--experts", action="store_true", help="links on experts instead")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the results, written anew")
    parser.add_argument("--small", action="store_true", help="a small model, to see it run: the limits are not made for it")
    options = parser.parse_args()
    how = options.lengths, options.repeats
    if options.experts:
        results = measure_experts(mixture(1, 128) if options.small else mixture(2, 512), *how)
    else:
        results = measure(*((SMALL, SMALL) if options.small else (FULL, CHAINED)), *how)
    warnings.simplefilter("ignore")  # Lightning's advice
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lines, table = Lines(options.output), []
    lines.results = [
        line for line in lines.results if ("experts" in line["what"]) is not options.experts
    ]  # of the other models
    for unit, mine, other, length, limit, values in results:
        what, value = f"{unit}: {mine} / {other}", ratio(values, mine, other)
        lines.add({"what": what, "length": length, unit: values, "ratio": value, "limit": limit})
        each = ", ".join(f"{name} {statistics.median(some):.4g}" for name, some in values.items())
        table.append([what, str(length), f"{value:.3f}", "" if limit is None else f"{limit:.2f}", each])
    show(["what", "tokens", "ratio", "limit", "median of each"], table)


if __name__ == "__main__":
    main()
