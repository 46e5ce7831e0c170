"""Merging two adapters into a model of 1.1 billion parameters: ``cola export`` and ``cola verify``, and peft's merge.

    python -m benchmarks.merges

makes a random Llama of TinyLlama's shape in bfloat16 (2.2 GB, four shards) and two adapters of rank 16 on all linear layers,
in a temporary folder of 10 GB. The commands take turns, each in a new process with one CPU thread. ``peft`` loads the model,
merges one adapter after the other (``merge_and_unload``), and saves. Seconds are of CPU time, and contain the imports. The
memory is the peak above that of a process which only imports what the commands import. It takes about twenty minutes.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.commands import measure
from benchmarks.lines import Lines, Rows, main

FILE = Path(__file__).with_suffix(".jsonl")
N_ROUNDS = 7
TIMES = ("seconds", "by_clock")
SHAPE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
SHAPE |= {"num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False}
NAMES = ("sft", "dpo")
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, output, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
for adapter in adapters:
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(output, max_shard_size="600MB")
"""


def write(folder: Path) -> None:
    """A base and two adapters."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / "base", max_shard_size="600MB")
    for name in NAMES:
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(str(folder / name))
        model = adapted.unload()


def commands(folder: Path) -> dict[str, list[str]]:
    """Each command, by name, in their order."""
    base, merged, theirs = (str(folder / name) for name in ("base", "merged", "theirs"))
    adapters = [str(folder / name) for name in NAMES]
    cola, python = [sys.executable, "-m", "cola_lightning"], [sys.executable, "-c"]
    export = [*cola, "export", *adapters, "--base", base, "--format", "merged", "--output", merged, "--overwrite"]
    imports = "import torch, safetensors, transformers, peft, cola_lightning.cli.export"
    return {
        "imports": [*python, imports],
        "peft": [*python, PEFT, base, theirs, *adapters],
        "export, not proven": [*export, "--no_verify"],
        "export": export,
        "verify": [*cola, "verify", merged, "--base", base, "--adapter", *adapters],
        "verify what peft wrote": [*cola, "verify", theirs, "--base", base, "--adapter", *adapters],
    }


def run(lines: Lines) -> None:
    """Measures what has no line."""
    if not lines.missing([{"what": "1.1 billion parameters"}]):
        return
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, "-m", "benchmarks.merges", "--write", name], check=True)
        rounds = [{what: measure(command) for what, command in commands(Path(name)).items()} for _ in range(N_ROUNDS)]
        lines.add({"what": "1.1 billion parameters", "rounds": rounds})


def rows(results: list[dict[str, Any]]) -> Rows:
    """Each command's CPU time, both times beside peft's in the same round, and its memory above the imports."""
    table = Rows()
    for line in results:
        for what in line["rounds"][0]:
            seconds = statistics.median(one[what]["seconds"] for one in line["rounds"])
            ratios = [statistics.median(one[what][time] / one["peft"][time] for one in line["rounds"]) for time in TIMES]
            gib = max(one[what]["mib"] - one["imports"]["mib"] for one in line["rounds"]) / 1024
            table.append([what, f"{seconds:.0f}", *(f"{ratio:.2f}" for ratio in ratios), f"{gib:.2f}"])
    return table


COLUMNS = ["1.1 billion parameters", "seconds", "time / peft's", "by the clock", "GiB above the imports"]

if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    else:
        main(__doc__, FILE, run, [(COLUMNS, rows)])
