"""Draws ``killed.svg``: a terminal in which a run is killed with SIGKILL, goes on, is tested stage by stage, and is exported.

    python docs/figures/killed.py --folder FOLDER [--draw]

runs README's four commands in a new folder, next to a copy of ``configs/``, and kills the first one some seconds after its
first record. It also makes the same run without a kill, in a folder of its own, and compares the tensors of both checkpoints
(about ten minutes on two cores). What the commands printed is kept in ``FOLDER/terminal.json``; ``--draw`` draws that again
without running anything. The picture leaves out lines, such as progress bars. It changes none, but a path is relative to
the folder, and of the shell's line on the kill only its word is left.
"""

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import rich._export_format
import torch
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FIT = "cola fit --config configs/quickstart.yaml --chain.knot record --chain.name reviews"
TEST = "cola test --config runs/version_1/config.yaml --ckpt_path runs/version_1 --links all"
EXPORT = "cola export runs/version_1 --format merged --output merged"
RECORD = "link 0 finished"  # what the run has printed before it is killed
WIDTH = 126
# What a reader of the picture needs; of other lines, only that there are some.
SHOWN = re.compile(r"^link \d (?!, )|Killed|ckpt_path: |^links |─{5}|^ +\d  |loaded again|written: merged|tensors in each")
# Rich's picture loads a font from elsewhere; a reader's own does.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\n?", "", rich._export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code", "ui-monospace, Menlo, Consolas"
)


def child_of(pid: int) -> int:
    """The process that a shell waits for."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def run(command: str, folder: Path, kill_after: float | None = None) -> list[str]:
    """Runs a command in a shell, and returns what it prints, standard error included.

    Args:
        command: what is typed.
        folder: where.
        kill_after: send SIGKILL so many seconds after the first record.
    """
    shell = subprocess.Popen(
        ["bash", "-c", f"{command}; echo exit status $?"],
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in shell.stdout or ():
        lines.append(line.rstrip())
        if kill_after is not None and RECORD in line:
            time.sleep(kill_after)
            os.kill(child_of(shell.pid), signal.SIGKILL)
    shell.wait()
    return lines


def run_all(folder: Path, kill_after: float) -> list[tuple[str, list[str]]]:
    """What is typed and what it prints, in the picture's order."""
    for name in ("killed", "whole"):
        shutil.copytree(ROOT / "configs", folder / name / "configs")
    killed, whole = folder / "killed", folder / "whole"
    return [
        (FIT, run(FIT, killed, kill_after)),
        (f"{FIT} --ckpt_path last", run(f"{FIT} --ckpt_path last", killed)),
        (TEST, run(TEST, killed)),
        (EXPORT, run(EXPORT, killed)),
        ("# the same run in another folder, and not killed", [*run(FIT, whole), compared(folder)]),
    ]


def compared(folder: Path) -> str:
    """How many tensors the last checkpoints of both runs have, and whether they are equal to the bit."""
    paths = [folder / run / "checkpoints" / "last.ckpt" for run in ("killed/runs/version_1", "whole/runs/version_0")]
    killed, whole = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    is_equal = killed.keys() == whole.keys() and all(torch.equal(killed[name], whole[name]) for name in whole)
    return f"{len(whole)} tensors in each checkpoint: {'equal to the bit' if is_equal else 'they differ'}"


def draw(terminal: list[tuple[str, list[str]]], path: Path) -> None:
    """Draws the lines that a reader needs."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    for command, lines in terminal:
        console.print(Text(f"$ {command}", style="bold green"))
        for line in filter(SHOWN.search, lines):
            line = re.sub(r"bash: .*Killed.*", "Killed", line)
            console.print(Text(re.sub(r"/\S+/(runs/)", r"\1", line)))
        console.print()
    console.save_svg(str(path), title="cola", code_format=FORMAT)


def main() -> None:
    """Runs, or reads what ran, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder for the runs, which stay there")
    parser.add_argument("--kill_after", type=float, default=15, help="kill the run so many seconds after its first record")
    parser.add_argument("--draw", action="store_true", help="only draw again what ran in that folder")
    parser.add_argument("--output", type=Path, default=HERE / "killed.svg", help="the picture")
    options = parser.parse_args()
    kept = options.folder / "terminal.json"
    if not options.draw:
        kept.write_text(json.dumps(run_all(options.folder, options.kill_after), indent=1))
    draw(json.loads(kept.read_text()), options.output)


if __name__ == "__main__":
    main()
