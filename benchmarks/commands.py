"""Two whole commands side by side: ``cola fit`` with its defaults, and peft's LoRA under transformers' Trainer.

    python -m benchmarks.commands

Both read the same file of rows, train SmolLM2-135M for one epoch in batches of 8 rows of similar length with a loss on the
responses, and write what was trained: LoRA of rank 8, AdamW, linear decay, one CPU thread. ``TASKS`` says which rows of
$COLA_DATA_DIR, and which layers. They take turns, each in a new process; imports and loading count. ``seconds`` are of CPU
time, ``by_clock`` needs a machine without other programs, and ``mib`` is the peak of the process. It takes about 20 minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.lines import Lines, Rows, main
from benchmarks.steps import BESIDE, SMOLLM2, beside
from cola_lightning.cli.command_line import as_words
from cola_lightning.data.reading import load_splits
from cola_lightning.data.tasks import TASKS as PAPER_TASKS
from cola_lightning.pretrained import Pretrained

FILE = Path(__file__).with_suffix(".jsonl")
TASKS = {  # how many rows, and the layers: a single word is PEFT's, so that both sides read it alike
    "SST2": (250, "q_proj v_proj"),
    "GSM8K": (32, "all-linear"),
    "conversations": (64, "all-linear"),
}
OPTIONS = {"model": "COLACausalLM", "model.rank": 8, "model.alpha": 16, "data": "TextDataModule"}
OPTIONS |= {"model.optimizer": "AdamW", "model.optimizer.lr": 1e-3, "model.optimizer.weight_decay": 0}
OPTIONS |= {
    "trainer.limit_val_batches": 0,
    "trainer.max_epochs": 1,
    "trainer.gradient_clip_val": 1,
    "trainer.accelerator": "cpu",
}


def write_rows(task: str, n_rows: int, folder: Path) -> Path:
    """The first rows of a task: the file to train on, with a validation split next to it, which is not read.

    The paper's tasks become prompts with their answers, the others conversations.
    """
    there = Path(os.environ["COLA_DATA_DIR"])
    rows: list[dict[str, Any]]
    if task == "GSM8K":
        solved = (json.loads(line) for line in (there / "real" / "gsm8k_train.jsonl").read_text().splitlines()[:n_rows])
        rows = [{"messages": turns(row["question"], row["answer"])} for row in solved]
    elif task == "conversations":
        chats = json.loads((there / "real" / "fastchat_conversations.json").read_text())[:n_rows]
        rows = [{"messages": turns(*(turn["value"] for turn in chat["conversations"]))} for chat in chats]
    else:
        splits = load_splits(str(there / task.lower()))
        examples = [PAPER_TASKS[task].example(row) for row in splits["train"]()]
        rows = [{"prompt": one.prompt, "response": one.options[one.answer]} for one in examples[:n_rows]]  # type: ignore[index]
    for name, some in {"train": rows, "validation": rows[:1]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder / "train.jsonl"


def turns(*texts: str) -> list[dict[str, str]]:
    """A conversation, which the user begins."""
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def write_base(folder: Path) -> None:
    """SmolLM2 in a folder that transformers reads by itself: its Trainer refuses a model from a GGUF file."""
    base = Pretrained(**SMOLLM2)
    base.model_and_new_weights(AutoModelForCausalLM)[0].save_pretrained(folder)
    base.tokenizer().save_pretrained(folder)


def commands(base: Path, task: str, rows: Path, folder: Path) -> dict[str, list[str]]:
    """The two, by name."""
    layers = TASKS[task][1].split()
    options = {**OPTIONS, "model.model_name": str(base), "model.target_modules": layers if len(layers) > 1 else layers[0]}
    options |= {"data.source": str(rows.parent), "trainer.default_root_dir": str(folder)}
    options |= {"data.chat_template": False} if task in PAPER_TASKS else {}
    cola = [sys.executable, "-m", "cola_lightning", "fit", *as_words(options)]
    peft = [sys.executable, "-m", "benchmarks.peft_trainer", *map(str, (base, rows, folder / "peft", *layers))]
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


def run(lines: Lines) -> None:
    """Measures both commands in turns, for each task that has no line."""
    for one in lines.missing({"task": task, "rows": n_rows} for task, (n_rows, _) in TASKS.items()):
        with tempfile.TemporaryDirectory() as name:
            write_base(base := Path(name) / "base")
            (folder := Path(name) / one["task"]).mkdir()
            both = commands(base, one["task"], write_rows(one["task"], one["rows"], folder), folder)
            lines.add(one | {"rounds": [{side: measure(command) for side, command in both.items()} for _ in range(3)]})


def rows(results: list[dict[str, Any]]) -> Rows:
    """The ratios of each task, in seconds by the clock and in memory."""
    table = []
    for line in results:
        units = {
            unit: {side: [one[side][name] for one in line["rounds"]] for side in ("cola", "peft")}
            for unit, name in (("seconds", "by_clock"), ("mib", "mib"))
        }
        table.append(beside(f"a whole command: {line['task']}", units))
    return table


if __name__ == "__main__":
    main(__doc__, FILE, run, [(BESIDE, rows)])
