"""Does a run that was killed and resumed end with the bits of one that nobody stopped? Four ways to train a LoRA, as they come.

    python -m benchmarks.resumes

trains a tiny Llama on 64 rows, for two epochs, with transformers' Trainer, TRL's SFTTrainer, Lightning with a PEFT model in a
module written by hand, and this package. Each is trained three times: to the end; until SIGKILL; and from the newest
checkpoint of the killed run to the end. A line has the largest difference between the trained weights of the first and the
third run, or the last line of the error. It needs ``pip install trl`` and takes about ten minutes.

In *a checkpoint half written*, the process is killed while it writes its second checkpoint: the kernel does it at the first
file that becomes larger than a limit.
"""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import Lines, Rows, main

FILE = Path(__file__).with_suffix(".jsonl")
TOOLS = {
    "trainer": "peft, Trainer",
    "trl": "TRL's SFTTrainer",
    "lightning": "Lightning and peft by hand",
    "cola": "cola_lightning",
}
CASES = {
    "plain": "rows in random order",
    "grouped": "batches of rows of similar length",
    "augmented": "random augmentation",
    "workers": "two workers load the rows",
    "accumulated": "killed within an accumulation window",
    "writing": "a checkpoint half written",
    "processes": "two processes (DDP)",
}
STEPS = {"accumulated": 1}  # between two checkpoints
EVERY = 3  # steps between two checkpoints
KILLED_AT = 41  # the batch at which a run is killed: the ninth of the second epoch
ACCUMULATED = 4  # batches in a window
LIMIT = 60_000  # bytes: more than the weights of the adapter, less than the state of its optimizer
N_ROWS, BATCH, VOCABULARY = 64, 2, 50
Batch = dict[str, torch.Tensor]


def rows() -> list[dict[str, list[int]]]:
    """Rows of 4 to 24 random tokens."""
    draw = random.Random(0)
    return [{"input_ids": [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(4, 24))]} for _ in range(N_ROWS)]


def collator(case: str) -> Callable[[list[dict[str, Any]]], Batch]:
    """Makes a batch of rows; with augmentation, a tenth of the tokens is replaced at random."""

    def collate(of_batch: list[dict[str, Any]]) -> Batch:
        ids = [torch.tensor(row["input_ids"]) for row in of_batch]
        if case == "augmented":
            ids = [torch.where(torch.rand(len(row)) < 0.1, torch.randint(3, VOCABULARY, (len(row),)), row) for row in ids]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = (padded != 0).long()
        return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}

    return collate


def base() -> Any:
    """A Llama of two blocks, with the same random weights in each run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes))


def adapted() -> Any:
    """The same with an adapter of peft, with dropout."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(base(), LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"))


class Killing:
    """Counts the batches of a run, and kills it at one of them, or while it writes a checkpoint."""

    def __init__(self, case: str, is_killed: bool) -> None:
        self.case, self.is_killed, self.n = case, is_killed, 0

    def batch(self) -> None:
        """Called when a batch begins."""
        self.n += 1
        if not self.is_killed:
            return
        if self.case == "writing" and self.n == KILLED_AT - EVERY:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        later = {"accumulated": 2, "writing": 2, "processes": -KILLED_AT // 2}  # two processes share the batches of an epoch
        if self.n == KILLED_AT + later.get(self.case, 0):
            os.kill(os.getpid(), signal.SIGKILL)


def by_trainer(case: str, folder: Path, killing: Killing, *, resumes: bool, trl: bool = False) -> dict[str, torch.Tensor]:
    """The Trainer of transformers, or TRL's."""
    import datasets
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Kill(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            killing.batch()

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            killing.batch()

    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_steps": STEPS.get(case, EVERY),
        "gradient_accumulation_steps": ACCUMULATED if case == "accumulated" else 1,
        "dataloader_num_workers": 2 if case == "workers" else 0,
        "train_sampling_strategy": "group_by_length" if case == "grouped" else "random",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **({"ddp_backend": "gloo"} if case == "processes" else {}),
    }
    data, callbacks = datasets.Dataset.from_list(rows()), list[TrainerCallback]([Kill()])
    if trl:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        fast: Any = Tokenizer(models.WordLevel({f"w{k}": k for k in range(VOCABULARY)}, unk_token="w1"))
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="w0", eos_token="w2")  # type: ignore[no-untyped-call]
        arguments = SFTConfig(
            **options, bf16=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}
        )
        sft: Any = SFTTrainer
        trainer = sft(
            adapted(),
            arguments,
            train_dataset=data,
            data_collator=collator(case),
            callbacks=callbacks,
            processing_class=tokenizer,
        )
    else:
        trainer = Trainer(
            adapted(), TrainingArguments(**options), train_dataset=data, data_collator=collator(case), callbacks=callbacks
        )
    trainer.train(resume_from_checkpoint=resumes or None)
    return {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}


def by_lightning(case: str, folder: Path, killing: Killing, *, resumes: bool) -> dict[str, torch.Tensor]:
    """A LightningModule around a PEFT model, as one writes it in an hour."""
    from lightning.pytorch import LightningModule, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class Tuned(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted()

        def training_step(self, batch: Batch, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    seed_everything(0)
    data, is_grouped = rows(), case == "grouped"
    lengths = [len(row["input_ids"]) for row in data]
    sampler: Any = LengthGroupedSampler(BATCH, lengths=lengths) if is_grouped else None
    loading: dict[str, Any] = {"num_workers": 2} if case == "workers" else {}
    loader: Any = DataLoader(data, BATCH, shuffle=not is_grouped, sampler=sampler, collate_fn=collator(case), **loading)  # type: ignore[arg-type]
    saving = ModelCheckpoint(folder, every_n_train_steps=STEPS.get(case, EVERY), save_last=True)
    module = Tuned()
    _lightning(case, folder, killing, [saving]).fit(module, loader, ckpt_path=str(folder / "last.ckpt") if resumes else None)
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def _lightning(case: str, folder: Path, killing: Killing, callbacks: list[Any]) -> Any:
    """The Trainer of a case."""
    from lightning.pytorch import Callback, Trainer

    class Kill(Callback):
        def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
            killing.batch()

    processes: dict[str, Any] = {"devices": 2, "strategy": "ddp"} if case == "processes" else {"devices": 1}
    return Trainer(
        max_epochs=2,
        accelerator="cpu",
        accumulate_grad_batches=ACCUMULATED if case == "accumulated" else 1,
        default_root_dir=folder,
        callbacks=[*callbacks, Kill()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **processes,
    )


def by_cola(case: str, folder: Path, killing: Killing, *, resumes: bool) -> dict[str, torch.Tensor]:
    """This package: a COLAModule around the same model, and an EpochDataModule."""
    from cola_lightning import ChainOfLoRA, COLAModule, EpochDataModule, LastCheckpoint

    class Tuned(COLAModule):
        def build_model(self) -> Any:
            return base()

        def training_step(self, batch: Batch, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            return loss

    class Data(EpochDataModule):
        length_grouped = case == "grouped"

        def setup(self, stage: str) -> None:
            self.train, self.val = rows(), []

        def lengths(self, data: Any) -> list[int]:
            return [len(row["input_ids"]) for row in data]

        def collate(self, of_batch: list[Any]) -> Batch:
            return collator(case)(of_batch)

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    module = Tuned(target_modules="all-linear", rank=8, alpha=16, dropout=0.1, optimizer=adamw, lr_schedule="constant", seed=0)
    saving = LastCheckpoint(every_n_train_steps=STEPS.get(case, EVERY))
    saving.dirpath = str(folder)
    data = Data(BATCH, num_workers=2 if case == "workers" else 0)
    trainer = _lightning(case, folder, killing, [ChainOfLoRA(), saving])
    trainer.fit(module, data, ckpt_path=str(folder / "last.ckpt") if resumes else None)
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def train(tool: str, case: str, folder: Path, kind: str) -> None:
    """Trains in this process, and saves the trained weights if the run comes to its end."""
    killing, resumes = Killing(case, kind == "killed"), kind == "resumed"
    if tool == "lightning":
        weights = by_lightning(case, folder, killing, resumes=resumes)
    elif tool == "cola":
        weights = by_cola(case, folder, killing, resumes=resumes)
    else:
        weights = by_trainer(case, folder, killing, resumes=resumes, trl=tool == "trl")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save(weights, folder / f"{kind}.pt")


def start(tool: str, case: str, folder: Path, kind: str) -> tuple[int, str]:
    """A run in processes of its own: its status, and what it wrote to its standard error.

    One process is forked, because the libraries take seconds to import.
    """
    log = folder / f"{kind}.log"
    if case == "processes":
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        words += ["-m", "benchmarks.resumes", "run", tool, case, str(folder), kind]
        with log.open("w") as file:
            return subprocess.run(
                words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file
            ).returncode, log.read_text()

    def work() -> None:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
        train(tool, case, folder, kind)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode or 0, log.read_text()


def measure(tool: str, case: str) -> dict[str, Any]:
    """A line: the largest difference between the weights of a run that was resumed and of one that nobody stopped."""
    with tempfile.TemporaryDirectory() as path:
        whole, stopped = Path(path, "whole"), Path(path, "stopped")
        for folder, kind in ((whole, "whole"), (stopped, "killed"), (stopped, "resumed")):
            folder.mkdir(exist_ok=True)
            status, log = start(tool, case, folder, kind)
            if (status == 0) is (kind == "killed"):
                if kind == "resumed":
                    return {"tool": tool, "case": case, "error": error_of(log)}
                raise RuntimeError(f"{tool}, {case}, {kind}: status {status}\n{log[-3000:]}")
        expected, found = torch.load(whole / "whole.pt"), torch.load(stopped / "resumed.pt")
        largest = max((expected[name] - found[name]).abs().max().item() for name in expected)
        return {
            "tool": tool,
            "case": case,
            "difference": largest,
            "scale": max(v.abs().max().item() for v in expected.values()),
        }


def error_of(text: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line for line in text.splitlines() if line and line[0].isalpha() and "Error" in line.split(":")[0]]
    return lines[-1][:200] if lines else text.strip().splitlines()[-1][:200]


def run(lines: Lines) -> None:
    """Adds the lines that are missing."""
    import datasets  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    torch.set_num_threads(1)
    for wanted in lines.missing({"tool": tool, "case": case} for case in CASES for tool in TOOLS):
        lines.add(measure(wanted["tool"], wanted["case"]))


def table(results: list[dict[str, Any]]) -> Rows:
    """A row for each case."""
    found = {(line["tool"], line["case"]): line for line in results}

    def cell(line: dict[str, Any]) -> str:
        if "error" in line:
            return f"the resume fails: {line['error'].split(':')[0]}"
        return "the same bits" if line["difference"] == 0 else f"differs by {line['difference']:.2g}"

    rows = [[words, *(cell(found[tool, case]) for tool in TOOLS if (tool, case) in found)] for case, words in CASES.items()]
    return [row for row in rows if len(row) > 1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        _, _, of_tool, of_case, path, of_kind = sys.argv
        train(of_tool, of_case, Path(path), of_kind)
    else:
        main(__doc__, FILE, run, [(["a LoRA run that is killed and resumed", *TOOLS.values()], table)])
