"""A chain on a half-precision base, end to end: does what leaves with its owner predict what the module predicts?

    python -m benchmarks.half

trains SmolLM2-135M-Instruct in bf16 on SST-2 (256 examples, three links of one epoch each) with stacked links, by ``cola fit``,
exports it merged and for PEFT, and compares the predictions on the 400 rows for validation: of the module, of the merged model
under plain transformers and of the adapter under plain peft, each computed in float32 and in bf16. It needs ``COLA_DATA_DIR``
(or the hub), writes ``half.jsonl``, and prints a table (about eight minutes on two cores).
"""

import argparse
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.lines import Lines, show
from benchmarks.sst2 import EACH_EPOCH, OPTIONS
from cola_lightning import COLACausalLM, PromptDataModule
from cola_lightning.hub import quiet

FIT = [*OPTIONS, *EACH_EPOCH, "--model.dtype", "bfloat16", "--model.finished_links", "stack", "--trainer.max_epochs", "3"]
ROWS: dict[str, Any] = {
    "train_size": 256,
    "val_size": 400,
    "test_size": 400,
    "batch_size": 8,
    "eval_batch_size": 40,
}  # the config's


def cola(folder: Path, *words: str) -> None:
    """Runs a command in a folder."""
    subprocess.run(["cola", *words], cwd=folder, check=True)


def predictions(checkpoint: Path, merged: Path, adapter: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The options' scores of each model for all rows (rows x options), and the answers."""
    module: Any = COLACausalLM.load_from_checkpoint(checkpoint).eval()
    data = PromptDataModule(task="SST2", **ROWS)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    batches = list(data.val_dataloader())
    own: nn.Module = module.model

    @torch.no_grad()
    def scores(model: nn.Module) -> Tensor:
        module.model = model.eval()
        return torch.cat([module.option_scores(batch) for batch in batches])

    found = {"module, bfloat16": scores(own)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        found[f"merged, {name}"] = scores(AutoModelForCausalLM.from_pretrained(merged, dtype=dtype))
    base = module.pretrained.model(AutoModelForCausalLM)
    found["adapter, bfloat16"] = scores(_adapted(base, adapter))
    module.model = own
    found["adapter, float32"] = scores(_adapted(module.merged_model(0), adapter))
    module.model = own
    module.adapted.upcast()
    found["module, float32"] = scores(own)
    return found, torch.cat([batch["answer"] for batch in batches])


def _adapted(base: Any, adapter: Path) -> nn.Module:
    """The model that peft makes of a base and an adapter."""
    model: Any = PeftModel.from_pretrained(base, str(adapter)).base_model
    adapted: nn.Module = model.model
    return adapted


def main() -> None:
    """Trains, exports, compares, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the results, written anew")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        cola(folder, "fit", *FIT)
        checkpoint = folder / "runs" / "version_0" / "checkpoints" / "last.ckpt"
        for words in (("merged", "--dtype", "float32"), ("peft",)):
            cola(folder, "export", str(checkpoint), "--output", words[0], "--format", *words)
        found, answers = predictions(checkpoint, folder / "merged", folder / "peft")
    lines, table = Lines(options.output, is_new=True), []
    reference = found["module, float32"]
    for model, scores in found.items():
        differs = scores.argmax(1) != reference.argmax(1)
        result = {
            "model": model,
            "accuracy": float((scores.argmax(1) == answers).float().mean()),
            "same": int((~differs).sum()),
            "rows": len(answers),
            "largest_margin": float((scores[differs, 0] - scores[differs, 1]).abs().max()) if differs.any() else 0.0,
        }
        lines.add(result)
        told = [f"{result['accuracy']:.4f}", f"{result['same']} of {result['rows']}", f"{result['largest_margin']:.3f}"]
        table.append([model, *told])
    show(["predictions", "accuracy", "as the module in float32", "margin of those that differ, at most"], table)


if __name__ == "__main__":
    main()
