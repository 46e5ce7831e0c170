"""LoRA as peft and transformers' Trainer do it by their own means: a file of rows in, an adapter out.

    python -m benchmarks.peft_trainer base rows.jsonl folder q_proj v_proj

trains one epoch on ``prompt`` and ``response``, or on ``messages`` by the tokenizer's chat template, with the loss on the
responses, batches grouped by length. It is the other side of ``benchmarks.commands``, with the same sequences, targets,
optimizer and schedule.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed


class Instructions(Dataset[dict[str, list[int]]]):
    """Prompts with their responses, or conversations, as tokens; labels on the responses and their ends."""

    def __init__(self, path: str, tokenizer: Any) -> None:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self.rows = [self._chat(tokenizer, **row) if "messages" in row else self._encoded(tokenizer, **row) for row in rows]

    @staticmethod
    def _encoded(tokenizer: Any, prompt: str, response: str) -> dict[str, list[int]]:
        n_prompt = len(tokenizer(prompt).input_ids)
        ids = [*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * n_prompt + ids[n_prompt:]}

    @staticmethod
    def _chat(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for end in range(2, len(messages) + 1, 2):
            prompt = tokenizer.apply_chat_template(messages[: end - 1], add_generation_prompt=True)["input_ids"]
            ids = tokenizer.apply_chat_template(messages[:end])["input_ids"]
            labels += [-100] * (len(prompt) - len(labels)) + ids[len(prompt) : -1]  # the turn ends before its last line break
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [*labels, -100]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("rows")
    parser.add_argument("folder")
    parser.add_argument("layers", nargs="+")
    options = parser.parse_args()
    set_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(options.base), AutoModelForCausalLM.from_pretrained(options.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    layers = options.layers[0] if options.layers == ["all-linear"] else options.layers
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=layers, task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        options.folder,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=1e-3,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        report_to="none",
        save_strategy="no",
        logging_steps=50,
        use_cpu=True,
    )
    rows = Instructions(options.rows, tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(get_peft_model(model, lora), arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
