"""What a person with a GPU runs and sends back: the tests on the GPU, and a step's time and memory next to peft's.

    python -m benchmarks.gpu

runs ``pytest -m gpu``, and then training steps of models of the shapes of Llama-3.2-1B and Llama-3.2-3B with random weights (no
download), in bf16 and in nf4, with this package and with peft: LoRA of rank 8 on the queries and values, AdamW, two rows of
2,048 tokens with a loss on the second half of each. The file to send back is ``gpu.jsonl``: the machine, how the tests ended,
and a line for each model and base. ``--small`` measures a tiny model on a CPU, to see it run.
"""

import argparse
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, PreTrainedConfig

from benchmarks.lines import Lines, show
from benchmarks.scale import MODELS, TARGETS
from benchmarks.steps import RandomCausalLM, Work, build, take_turns, training_step
from cola_lightning.lora.quantization import quantize

SIDES = ("cola", "peft")
TINY = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)


def step_of(side: str, config: PreTrainedConfig, base: str, length: int, device: str) -> Work:
    """A training step; it returns when the device has finished it."""
    model: Any = build(config, dtype=torch.bfloat16)
    if base == "nf4":
        quantize(model.model, torch.bfloat16)
    ids = torch.randint(3, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.masked_fill(torch.arange(length, device=device) < length // 2, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trained: Any
    if side == "cola":
        trained = RandomCausalLM(lambda: model, target_modules=TARGETS, dtype="bfloat16", finished_links="stack")
        trained.configure_model()
        step = training_step(trained.to(device), lambda: trained.step(batch).loss)
    else:
        model.is_loaded_in_4bit = base == "nf4"  # as peft asks
        trained = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).to(device)
        step = training_step(trained, torch.autocast(device, torch.bfloat16)(lambda: trained(**batch).loss))

    def finished() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return finished


def measure(config: PreTrainedConfig, base: str, length: int, device: str) -> dict[str, Any]:
    """Seconds of the steps of both sides, and the peak of memory on the GPU in GiB."""
    seconds, peaks = dict[str, list[float]](), dict[str, float]()
    for side in SIDES:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds |= take_turns({side: step_of(side, config, base, length, device)}, warm_up=3)
        peaks[side] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {"seconds": seconds, "gib": peaks}


def row(line: dict[str, Any]) -> list[str]:
    """A row of the table."""
    medians = [statistics.median(line["seconds"][side]) for side in SIDES]
    cells = [f"{seconds:.4f}" for seconds in medians] + [f"{medians[0] / medians[1]:.2f}"]
    return [line["model"], line["base"], *cells, *(f"{line['gib'][side]:.1f}" for side in SIDES)]


def main() -> None:
    """Runs the tests, measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model on a CPU, and no tests")
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"), help="the file to send back, written anew")
    options = parser.parse_args()
    lines, device = Lines(options.output, is_new=True), "cpu" if options.small else "cuda"
    models = {"tiny": TINY} if options.small else {name: MODELS[name] for name in ("Llama-3.2-1B", "Llama-3.2-3B")}
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "lightning", "bitsandbytes")}
    lines.add({"machine": "CPU" if options.small else torch.cuda.get_device_name(), **versions})
    if not options.small:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q"], capture_output=True, text=True)
        lines.add({"tests": tests.stdout.splitlines()[-30:], "status": tests.returncode})
    for base in ("bf16", "nf4"):
        for name, config in models.items():
            lines.add({"model": name, "base": base, **measure(config, base, 32 if options.small else 2048, device)})
    columns = ["model", "base", "cola: seconds", "peft: seconds", "cola / peft", "cola: GiB", "peft: GiB"]
    show(columns, [row(line) for line in lines.results if "model" in line])


if __name__ == "__main__":
    main()
