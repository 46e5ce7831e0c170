"""What a step, a knot and a checkpoint cost on one GPU: this package, peft's LoRA under transformers' Trainer, and the floor.

    python -m benchmarks.gpu

measures models of the shapes of Llama-3.2-1B and Llama-3-8B with random weights (no download), in bf16 and in nf4, on batches
of 4,096 tokens in rows of 512, 2,048 or 4,096, with a loss on the second half of each row; rank 8 on the queries and values,
AdamW, finished links stacked. Each configuration runs in a process of its own, and its line is in ``gpu.jsonl`` before the next
one begins: one that runs out of memory, fails or takes too long is a line that says so. A call measures only what the file
lacks for this GPU, the most telling first, and starts nothing that would not fit into ``--minutes``.

* ``cola``: this package under Lightning's Trainer, with a knot after the steps that count, and a checkpoint;
* ``peft``: peft's LoRA under transformers' Trainer, on the same batches, with its checkpoint;
* ``floor``: the frozen model's forward pass and the backward pass to its inputs, without LoRA.

``seconds`` are medians of 7 steps after 3 that do not count, from the end of a step to the end of the next, with the device
synchronized; ``gib``: the peak of what is allocated on the GPU after these 3 (on a CPU: of the process). The first twelve
configurations, about half a minute each, are the ones to have if there is time for no more. ``--small`` runs tiny models on a
CPU, by the same code.
"""

import argparse
import copy
import importlib.metadata
import itertools
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that this process never initializes CUDA: its children are forked

# Not transformers' Trainer, nor peft: they import bitsandbytes, which initializes CUDA. The children import them.
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, PretrainedConfig

from benchmarks import random_model
from benchmarks.lines import Lines, show
from benchmarks.memory import mib
from benchmarks.random_model import SILENT, RandomCausalLM
from benchmarks.scale import ALPHA, MODELS, RANK, TARGETS
from cola_lightning import ChainOfLoRA

Config = dict[str, Any]
Batch = dict[str, Tensor]
SIDES, BASES = ("cola", "peft", "floor"), ("bf16", "nf4")
TOKENS, LENGTHS = 4096, (2048, 512, 4096)  # a batch's; a row's, in the order in which they are measured
WARM_UP, STEPS = 3, 7
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPES: dict[str, PretrainedConfig] = {name: MODELS[name] for name in ("Llama-3.2-1B", "Llama-3-8B")}
SHAPES["small"] = LlamaConfig(vocab_size=500, num_key_value_heads=1, **SIZES)
COLUMNS = ["GPU", "model", "base", "tokens a row", "options", "seconds: cola / peft / floor", "cola / peft", "cola / floor"]
COLUMNS += ["tokens a second", "GiB: cola / peft / floor", "a knot's seconds", "a checkpoint's seconds", "its MB"]
COLUMNS_OF_MEMORY = ["GiB on a GPU", "model", "base", "options", *(f"{length:,} tokens a row" for length in sorted(LENGTHS))]
NOT_RUN = "**not run**"


def plan(is_small: bool) -> list[Config]:
    """All configurations, the most telling first; the floor without options."""
    names = ["small"] if is_small else [name for name in SHAPES if name != "small"]
    lengths = (16,) if is_small else LENGTHS
    options = [("bf16", False), ("nf4", True), ("bf16", True), ("nf4", False)]
    eager = itertools.product([False], lengths, options, names, SIDES)
    compiled = itertools.product([True], lengths, options, names, SIDES[:2])
    found = [
        {"model": name, "base": base, "length": length, "checkpointing": checkpointing, "compile": compile, "side": side}
        for compile, length, (base, checkpointing), name, side in (*eager, *compiled)
    ]
    return [one for one in found if one["side"] != "floor" or not one["checkpointing"]]


# ---------------------------------------------------------------------- what is measured


def build(name: str, base: str, device: str) -> Any:
    """A model with random weights, made on the device: one block is drawn, and quantized; the others are copies of it."""
    config = copy.deepcopy(SHAPES[name])
    n_blocks, config.num_hidden_layers = config.num_hidden_layers, 1
    with torch.device(device):
        model: Any = random_model.build(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    (block,) = model.model.layers
    if base == "nf4":
        from cola_lightning.lora.quantization import quantize

        quantize(block.cpu(), torch.bfloat16)
        block.to(device)
    for place in range(1, n_blocks):
        model.model.layers.append(copy.deepcopy(block))
        model.model.layers[place].self_attn.layer_idx = place
    config.num_hidden_layers = model.config.num_hidden_layers = n_blocks
    return model.train()


def make_batch(name: str, length: int) -> Batch:
    """Rows of so many tokens without padding; the first half is a prompt, without a loss."""
    rows = (TOKENS if name != "small" else 2 * length) // length
    ids = torch.randint(3, SHAPES[name].vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(length) < length // 2, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class MeasuredCausalLM(RandomCausalLM):
    """The package's module around such a model; it measures its knots."""

    def __init__(self, made: Config, device_name: str) -> None:
        super().__init__(
            lambda: build(made["model"], made["base"], device_name),
            dtype="bfloat16",
            target_modules=TARGETS,
            rank=RANK,
            alpha=ALPHA,
            finished_links="stack",
            activation_checkpointing=made["checkpointing"],
            compile=made["compile"],
        )
        self.device_name = device_name
        self.knot_seconds: list[float] = []

    def tie_knot(self, **how: Any) -> Any:
        """Ties a knot, as ChainOfLoRA has it do."""
        seconds, link = timed(lambda: super(MeasuredCausalLM, self).tie_knot(**how), self.device_name)
        self.knot_seconds.append(seconds)
        return link

    def cpu(self) -> Self:
        """Stays on the device: after a fit, Lightning would copy gigabytes that nothing reads."""
        return self


def synchronize(device: str) -> None:
    """Waits for what was started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """The seconds that something takes on the device, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


class Ends(Callback):
    """Notes when steps end, and the first one's loss; saves a checkpoint after the last, while all is on the device."""

    def __init__(self, device: str, checkpoint: Path | None = None) -> None:
        self.device, self.checkpoint = device, checkpoint
        self.times: list[float] = []
        self.loss, self.checkpoint_seconds = float("nan"), float("nan")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Waits for the step."""
        synchronize(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) == WARM_UP:
            forget_peak(self.device)
        self.loss = float(outputs["loss"]) if batch_idx == 0 else self.loss
        if self.checkpoint is not None and batch_idx + 1 == trainer.num_training_batches:
            self.checkpoint_seconds, _ = timed(lambda: trainer.save_checkpoint(self.checkpoint), self.device)


def seconds_of(times: Sequence[float]) -> dict[str, Any]:
    """The median of a step, and all that count: not the first ones, nor what comes after them, such as a knot."""
    steps = [end - start for start, end in itertools.pairwise(times)][WARM_UP - 1 :][:STEPS]
    return {"seconds": statistics.median(steps), "all_seconds": [round(one, 6) for one in steps]}


def cola(made: Config, device: str, folder: Path) -> Config:
    """This package's steps, a knot, and a checkpoint in the middle of the second link."""
    module = MeasuredCausalLM(made, device)
    path = folder / "run.ckpt"
    ends, chain = Ends(device, path), ChainOfLoRA(at_steps=[WARM_UP + STEPS])
    rows: Any = [make_batch(made["model"], made["length"])] * (WARM_UP + STEPS + 1)
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer = Trainer(
        accelerator=accelerator, devices=1, max_epochs=1, callbacks=[chain, ends], default_root_dir=folder, **SILENT
    )
    trainer.fit(module, DataLoader(rows, batch_size=None))
    found = {"knot_seconds": module.knot_seconds[0], "checkpoint_seconds": ends.checkpoint_seconds}
    return seconds_of(ends.times) | {"loss": ends.loss} | found | {"checkpoint_bytes": path.stat().st_size}


def peft(made: Config, device: str, folder: Path) -> Config:
    """The steps of peft's LoRA under transformers' Trainer, with the same optimizer, and its last checkpoint."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer as TransformersTrainer
    from transformers import TrainerCallback, TrainingArguments

    ends, saved, n_steps = Ends(device), [0.0], WARM_UP + STEPS

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.on_train_batch_end(None, None, None, None, -1)

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            synchronize(device)
            saved.append(time.perf_counter() - ends.times[-1])

    model = build(made["model"], made["base"], device)
    model.is_loaded_in_4bit = made["base"] == "nf4"  # as peft asks; not transformers' Trainer, which wants its own quantizer
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    model.is_loaded_in_4bit = False
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,  # an item is a batch
        max_steps=n_steps,
        learning_rate=1e-3,
        weight_decay=1e-2,  # torch's default, as ours
        max_grad_norm=0.0,
        bf16=True,
        optim="adamw_torch_fused",  # as ours
        gradient_checkpointing=made["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        torch_compile=made["compile"],
        save_strategy="steps",
        save_steps=n_steps,
        logging_first_step=True,
        logging_steps=10 * n_steps,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    items = [make_batch(made["model"], made["length"])] * n_steps
    trainer = TransformersTrainer(
        adapted, arguments, train_dataset=items, data_collator=lambda some: some[0], callbacks=[Clock()]
    )
    trainer.train()
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {"checkpoint_seconds": saved[-1], "checkpoint_bytes": sum(path.stat().st_size for path in files)}
    return seconds_of(ends.times) | {"loss": trainer.state.log_history[0]["loss"]} | found


def floor(made: Config, device: str, folder: Path) -> Config:
    """The frozen model alone, with the logits of the positions that carry a loss."""
    model = build(made["model"], made["base"], device).requires_grad_(False)
    ids, mask, labels = (value.to(device) for value in make_batch(made["model"], made["length"]).values())
    (places,) = (labels[:, 1:] != -100).any(0).nonzero(as_tuple=True)
    targets, times, first = labels[:, places + 1].flatten(), [0.0], float("nan")
    for step in range(WARM_UP + STEPS):
        inputs = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False, logits_to_keep=places).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets)
        torch.autograd.backward(loss)
        first = float(loss.detach()) if step == 0 else first
        synchronize(device)
        times.append(time.perf_counter())
        if step + 1 == WARM_UP:
            forget_peak(device)
    return seconds_of(times[1:]) | {"loss": first}


def forget_peak(device: str) -> None:
    """Begins a peak: what building the model and the first steps, which choose kernels, have needed does not count."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """The peak of what was allocated on the GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return mib("VmHWM") / 2**10


def measure(made: Config, device: str) -> Config:
    """What is found of a configuration, or why nothing is: to be called in a new process."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found: Config = globals()[made["side"]](made, device, Path(folder))
        except torch.OutOfMemoryError:
            return {"error": "out of memory"}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    tokens = make_batch(made["model"], made["length"])["input_ids"].numel()
    more = {"tokens_a_second": tokens / found["seconds"], "gib": peak_gib(device), "whole_seconds": time.perf_counter() - start}
    return found | {name: float(f"{value:.5g}") for name, value in more.items()}


def facts(device: str) -> Config:
    """The device's name and the versions of what runs: to be called in a new process."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "lightning")}
    return {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"} | versions


# ---------------------------------------------------------------------- processes, lines and tables


def in_process(how: str, work: Callable[..., Config], *of: Any, seconds: float) -> Config:
    """What a function gives in a new process (``fork``, which need not import anything, or ``spawn``), or why nothing."""
    context: Any = multiprocessing.get_context(how)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, of))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"error": f"no end in {seconds:.0f} seconds"}
    except EOFError:
        process.join()
        return {"error": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, work: Callable[..., Config], of: Sequence[Any]) -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "cola_lightning"):  # advice
        logging.getLogger(name).setLevel(logging.ERROR)
    sender.send(work(*of))


def run(lines: Lines, is_small: bool, device: str, minutes: float, limit: float) -> None:
    """Measures what the lines lack for this device, until the time is up."""
    start = time.monotonic()
    for how in ("fork", "spawn"):  # the second, should a library have initialized CUDA here
        if "error" not in (known := in_process(how, facts, device, seconds=120)):
            break
    else:
        raise SystemExit(f"no process can use {device}: {known['error']}")
    took: dict[Any, float] = {}
    here = {"device": known["device"]}
    for made in lines.missing(one | here for one in plan(is_small)):
        left, kind = 60 * minutes - (time.monotonic() - start), (made["model"], made["compile"])
        if left <= took.get(kind, 0):  # another may take less
            continue
        began = time.monotonic()
        found = in_process(how, measure, made, device, seconds=min(left, limit))
        took[kind] = max(took.get(kind, 0), time.monotonic() - began)
        if "error" in found and time.monotonic() - began >= left:  # it was cut short: for the next call
            continue
        lines.add(made | known | found)
        print(*(str(value) for value in (made | found).values() if not isinstance(value, list)), flush=True)


def by_side(results: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], dict[str, Mapping[str, Any]]]:
    """Results by their configuration, in the order of the tables, and then by side."""
    fields, found = ("device", "model", "base", "compile", "checkpointing", "length"), dict[Any, Any]()
    for result in sorted(results, key=lambda one: [list(SHAPES).index(one[f]) if f == "model" else one[f] for f in fields]):
        found.setdefault(tuple(result[field] for field in fields), {})[result["side"]] = result
    return found


def cell(sides: Mapping[str, Mapping[str, Any]], name: str, form: str, factor: float = 1, which: Iterable[str] = SIDES) -> str:
    """A value of each side, in the table's form: where there is none, why."""
    some = [sides[side] for side in which if side in sides and (name in sides[side] or "error" in sides[side])]
    return " / ".join(format(one[name] * factor, form) if name in one else why(one) for one in some)


def why(result: Mapping[str, Any]) -> str:
    """Why there is no value."""
    return "out of memory" if result["error"] == "out of memory" else "failed"


def options(compile: bool, checkpointing: bool) -> str:
    """A configuration's options, in words."""
    return ", ".join(name for name, given in {"compile": compile, "checkpointing": checkpointing}.items() if given)


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table of times, memory and checkpoints."""
    table = []
    for (device, model, base, compile, checkpointing, length), sides in by_side(results).items():
        seconds = {side: one["seconds"] for side, one in sides.items() if "seconds" in one}
        ratios = [f"{seconds['cola'] / seconds[to]:.2f}" if {"cola", to} <= seconds.keys() else "" for to in ("peft", "floor")]
        both, own = ("cola", "peft"), ("cola",)
        cells = [device, model, base, f"{length:,}", options(compile, checkpointing), cell(sides, "seconds", ".3f"), *ratios]
        cells += [cell(sides, "tokens_a_second", ",.0f", 1, both), cell(sides, "gib", ".1f")]
        cells += [cell(sides, "knot_seconds", ".3f", 1, own), cell(sides, "checkpoint_seconds", ".2f", 1, both)]
        table.append([*cells, cell(sides, "checkpoint_bytes", ".1f", 1e-6, both)])
    return table or [[NOT_RUN, *[""] * (len(COLUMNS) - 1)]]


def rows_of_memory(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table of memory: the peaks of cola and peft."""
    table: dict[tuple[Any, ...], dict[int, str]] = {}
    for (device, model, base, compile, checkpointing, length), sides in by_side(results).items():
        key = device, model, base, options(compile, checkpointing)
        table.setdefault(key, {})[length] = cell(sides, "gib", ".1f", 1, ("cola", "peft"))
    found = [[*key, *(cells.get(length, "") for length in sorted(LENGTHS))] for key, cells in table.items()]
    return found or [[NOT_RUN, *[""] * (len(COLUMNS_OF_MEMORY) - 1)]]


def main() -> None:
    """Measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="when to stop (default: 10)")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one configuration (default: 300)")
    parser.add_argument("--small", action="store_true", help="tiny models, on a CPU, to see it run; --output is then needed")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda, with --small: cpu")
    parser.add_argument("--output", type=Path, help="the results, to which lines are added (default: gpu.jsonl)")
    given = parser.parse_args()
    if given.small and given.output is None:
        parser.error("--small: expected --output with it, for its lines are no results")
    device = given.device or ("cpu" if given.small else "cuda")
    lines = Lines(given.output or Path(__file__).with_suffix(".jsonl"))
    if device == "cuda":  # one GPU: transformers' Trainer would take all
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    run(lines, given.small, device, given.minutes, given.limit)
    show(COLUMNS, rows(lines.results), width=200)
    show(COLUMNS_OF_MEMORY, rows_of_memory(lines.results), width=200)


if __name__ == "__main__":
    main()
