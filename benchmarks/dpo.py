"""What a step of preference tuning costs: this package next to TRL's DPOTrainer with peft, on the same pairs.

    python -m benchmarks.dpo

takes DPO steps of SmolLM2-135M-Instruct on solutions of GSM8K and the same with wrong numbers, on one CPU thread. Both sides
take turns: a ratio of times is the median over rounds. A peak of memory is that of a process of its own, above what it holds
once the model is loaded. Neither side recomputes activations. It needs ``pip install trl`` and takes about ten minutes. The
wrong solutions of the line that is there had one wrong step (``benchmarks/preference/rows.py`` of commit 70821ab).
"""

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import Lines, Rows, main
from benchmarks.steps import BESIDE, SMOLLM2, Work, beside, peak_mib, take_turns, training_step
from cola_lightning import COLAPreferenceLM
from cola_lightning.chat_template import Conversation, PlainTemplate, PreferencePair, assistant_turn, user_turn
from cola_lightning.data.batch import collate_language
from cola_lightning.data.render import TurnEncoder

FILE = Path(__file__).with_suffix(".jsonl")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, PAIRS, ROUNDS, MAX_LENGTH = 8, 2, 7, 512


def batches() -> list[dict[str, Any]]:
    """Batches of pairs as the package makes them; each step takes one."""
    module = COLAPreferenceLM(**SMOLLM2)  # for its tokenizer
    lines = (Path(os.environ["COLA_DATA_DIR"]) / "real" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: PAIRS * ROUNDS]]
    right, wrong = [row["answer"] for row in rows], [re.sub(r"\d(?=\D)", "7", row["answer"]) for row in rows]
    prompts = [Conversation(user_turn(f"{row['question']}\n")) for row in rows]
    answers = [[[assistant_turn(answer)] for answer in side] for side in (right, wrong)]
    pairs = [PreferencePair(*pair) for pair in zip(prompts, *answers, strict=True)]
    encoded: Any = TurnEncoder(PlainTemplate(module.tokenizer), MAX_LENGTH, set(), shortens_response=True).preferences(pairs)
    chosen, rejected = zip(*encoded, strict=True)
    places = [slice(k, k + PAIRS) for k in range(0, len(chosen), PAIRS)]
    pad = module.tokenizer.pad_token_id
    return [{**collate_language([*chosen[place], *rejected[place]], pad), "n_pairs": PAIRS} for place in places]


def cola_step() -> Work:
    """A step of this package, as its training loop takes it; each call takes the next batch."""
    module = COLAPreferenceLM(**SMOLLM2, target_modules=TARGETS, rank=RANK, alpha=2 * RANK, seed=0)
    module.configure_model()
    inputs = iter(batches() * 2)
    return training_step(module, lambda: module.step(next(inputs)).loss)


def trl_step() -> Work:
    """The loss of TRL's DPOTrainer, whose reference is the model without its adapter."""
    import datasets
    import peft
    import trl

    base = COLAPreferenceLM(**SMOLLM2, seed=0)
    tokenizer: Any = base.tokenizer
    library: Any = trl  # it has no types
    trainer = library.DPOTrainer(
        base.build_model(),
        args=library.DPOConfig(tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    inputs = map(_right_padded, batches() * 2)
    return training_step(trainer.model, lambda: trainer.compute_loss(trainer.model, next(inputs)))


def _right_padded(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A batch as TRL's collator makes it: the same tokens, padded on the right."""
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    order = mask.argsort(dim=1, descending=True, stable=True)
    moved = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long()}
    return {name: value.gather(1, order) for name, value in moved.items()}


SIDES: dict[str, Callable[[], Work]] = {"cola": cola_step, "trl": trl_step}


def run(lines: Lines) -> None:
    """Measures both sides, if there is no line."""
    warnings.simplefilter("ignore")
    if lines.missing([{}]):
        peaks = {side: [peak_mib(make_step, is_above_model=True)] for side, make_step in SIDES.items()}
        steps = {side: make_step() for side, make_step in SIDES.items()}
        lines.add({"seconds": take_turns(steps, ROUNDS, warm_up=0), "mib": peaks})


def rows(results: list[dict[str, Any]]) -> Rows:
    """The ratio of each unit."""
    return [beside("a step of DPO (TRL)", line, "trl") for line in results]


if __name__ == "__main__":
    main(__doc__, FILE, run, [(BESIDE, rows)])
