"""What a training step costs: this package, peft's LoRA, and the least that any LoRA has to do.

    python -m benchmarks.speed

trains models with random weights on one CPU thread, on rows with a loss at one position, as a prompt's answer has. It takes
about twenty minutes.

* ``step``, a model of OPT-125m's shape. ``peft``: peft's LoRA with the loss that the model itself computes, and so with the
  logits of all positions. ``cola``: this package's step: the links, and the logits of the position that carries the loss.
  ``floor``: the frozen model's forward, that position's logits, and the backward to the inputs: no weight's gradient. ``knot``.
* ``experts``: links on experts alone, of a Qwen3-MoE with 64 experts of which a token has 8 (2 layers, 512 wide, experts 256
  wide), with the model's own loss.
* ``links``: fits of a small model with five links, and with one.

They take turns: a ratio is the median over rounds of two times of one round. A peak of memory is that of a new process, above
what the interpreter and the libraries hold before there is a model, and for experts also above the model's weights.
"""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import OPTConfig, PreTrainedConfig, Qwen3MoeConfig

from benchmarks.lines import Lines, Rows, main
from benchmarks.steps import (
    BESIDE,
    SILENT,
    RandomCausalLM,
    Values,
    Work,
    beside,
    build,
    peak_mib,
    ratio,
    take_turns,
    training_step,
)
from cola_lightning import ChainOfLoRA, LoRAConfig, inject_lora

FILE = Path(__file__).with_suffix(".jsonl")
TARGETS, EXPERTS = ["q_proj", "v_proj"], ["experts.gate_up_proj", "experts.down_proj"]
WANTED = [{"what": what, "length": length} for what in ("step", "experts") for length in (64, 256)]
WANTED += [{"what": "links", "length": 32}]

Batch = Mapping[str, Tensor]


def shape(layers: int, width: int, vocabulary: int) -> OPTConfig:
    """A model's size; without dropout."""
    sizes: dict[str, Any] = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    heads = width // 64
    return OPTConfig(vocab_size=vocabulary, num_hidden_layers=layers, num_attention_heads=heads, dropout=0.0, **sizes)


FULL, SMALL, CHAINED = shape(12, 768, 50272), shape(2, 128, 8000), shape(4, 256, 2000)  # FULL is OPT-125m's


def mixture(layers: int, width: int) -> Qwen3MoeConfig:
    """A size of a mixture of 64 experts, half as wide as the model."""
    sizes: dict[str, Any] = {"hidden_size": width, "moe_intermediate_size": width // 2, "head_dim": 64}
    sizes |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    return Qwen3MoeConfig(vocab_size=2000, num_hidden_layers=layers, num_experts=64, num_experts_per_tok=8, **sizes)


def make_batch(config: PreTrainedConfig, length: int, size: int = 8) -> Batch:
    """Rows of so many tokens without padding; the last token is the answer, the only one with a loss."""
    ids = torch.randint(3, config.vocab_size, (size, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": F.pad(ids[:, -1:], (length - 1, 0), value=-100)}


def cola_module(config: PreTrainedConfig) -> RandomCausalLM:
    """The package's module around the model of a config."""
    module = RandomCausalLM(lambda: build(config))
    module.configure_model()
    return module


def peft_step(config: OPTConfig, length: int) -> Work:
    """A step of peft's LoRA."""
    batch = make_batch(config, length)
    with warnings.catch_warnings(action="ignore"):  # `is_gradient_checkpointing`: peft 0.21 under transformers 5.24
        model = get_peft_model(build(config), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0))
    return training_step(model, lambda: model(**batch).loss)


def cola_step(config: OPTConfig, length: int, module: RandomCausalLM | None = None) -> Work:
    """A step of this package."""
    batch, module = make_batch(config, length), module or cola_module(config)
    return training_step(module, lambda: module.step(batch).loss)


def floor_step(config: OPTConfig, length: int) -> Work:
    """What no LoRA goes without."""
    model, batch = build(config).requires_grad_(False), make_batch(config, length)
    place = torch.tensor([length - 2])

    def step() -> None:
        inputs = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        mask = batch["attention_mask"]
        logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False, logits_to_keep=place).logits
        torch.autograd.backward(F.cross_entropy(logits[:, 0], batch["labels"][:, -1]))

    return step


def peft_experts_step(config: Qwen3MoeConfig, length: int) -> Work:
    """A step of peft's LoRA of the experts' parameters."""
    batch = make_batch(config, length)
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(build(config), LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=EXPERTS))
    return training_step(model, lambda: model(**batch).loss)


def cola_experts_step(config: Qwen3MoeConfig, length: int) -> Work:
    """A step of this package's links on experts."""
    model, batch = build(config), make_batch(config, length)
    inject_lora(model, LoRAConfig(EXPERTS, rank=8, alpha=16))
    return training_step(model, lambda: model(**batch).loss)


STEPS = {"peft": peft_step, "cola": cola_step, "floor": floor_step}
EXPERTS_STEPS = {"peft": peft_experts_step, "cola": cola_experts_step}


def measure_step(config: OPTConfig, length: int, repeats: int = 7) -> dict[str, Values]:
    """Memory of the three steps, and seconds of these and of a knot of the module that takes ours."""
    peaks = {name: [peak_mib(make_step, config, length)] for name, make_step in STEPS.items()}
    module = cola_module(config)
    steps = {"peft": peft_step(config, length), "cola": cola_step(config, length, module), "floor": floor_step(config, length)}
    return {"mib": peaks, "seconds": take_turns(steps | {"knot": module.tie_knot}, repeats)}


def measure_experts(config: Qwen3MoeConfig, length: int, repeats: int = 7) -> dict[str, Values]:
    """Memory and seconds of a step with links on experts."""
    weights = sum(parameter.nbytes for parameter in build(config).parameters()) / 2**20
    peaks = {name: [peak_mib(make_step, config, length) - weights] for name, make_step in EXPERTS_STEPS.items()}
    steps = {name: make_step(config, length) for name, make_step in EXPERTS_STEPS.items()}
    return {"mib": peaks, "seconds": take_turns(steps, repeats)}


def measure_links(config: OPTConfig, length: int, repeats: int = 7, steps: int = 100) -> dict[str, Values]:
    """Seconds to make and fit a module, over five links and over as many steps of one."""
    data: DataLoader[Batch] = DataLoader([make_batch(config, length)] * steps, batch_size=None)  # type: ignore[arg-type]

    def fit(*callbacks: ChainOfLoRA) -> None:
        Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **SILENT).fit(cola_module(config), data)

    fits = {"5 links": lambda: fit(ChainOfLoRA(every_n_train_steps=steps // 5)), "1 link": fit}
    return {"seconds": take_turns(fits, repeats, warm_up=1)}


def run(lines: Lines) -> None:
    """Measures what no line has."""
    warnings.simplefilter("ignore")  # Lightning's advice
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for one in lines.missing(WANTED):
        length = one["length"]
        if one["what"] == "step":
            lines.add(one | measure_step(FULL, length))
        elif one["what"] == "experts":
            lines.add(one | measure_experts(mixture(2, 512), length))
        else:
            lines.add(one | measure_links(CHAINED, length))


COLUMNS = ("what", "tokens a row", "unit", "of what", "ratio")
RATIOS = [("cola", "peft"), ("cola", "floor"), ("knot", "cola"), ("5 links", "1 link")]


def rows(results: list[dict[str, Any]]) -> Rows:
    """Each ratio: of a step, in which unit, of what to what."""
    return [
        [line["what"], str(line["length"]), unit, f"{mine} / {other}", f"{ratio(line[unit], mine, other):.2f}"]
        for line in results
        for unit in ("mib", "seconds")
        for mine, other in RATIOS
        if {mine, other} <= line.get(unit, {}).keys()
    ]


def rows_beside(results: list[dict[str, Any]]) -> Rows:
    """The steps next to peft's."""
    names = {"step": "a step", "experts": "a step with experts"}
    return [beside(f"{names[line['what']]}, {line['length']} tokens a row", line) for line in results if line["what"] in names]


if __name__ == "__main__":
    main(__doc__, FILE, run, [(COLUMNS, rows), (BESIDE, rows_beside)])
