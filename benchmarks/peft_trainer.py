"""LoRA as peft and transformers' Trainer do it by their own means: a file of instructions in, an adapter out.

    python -m benchmarks.peft_trainer base rows.jsonl folder

trains one epoch on ``prompt`` and ``response`` with the loss on the response, batches grouped by length. It is the other side
of ``benchmarks.commands``, with the same sequences, targets, optimizer and schedule.
"""

import argparse
import json
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed


class Instructions(Dataset[dict[str, list[int]]]):
    """Prompts with their responses as tokens; labels on the response and the end of text."""

    def __init__(self, path: str, tokenizer: object) -> None:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self.rows = [self._encoded(row["prompt"], row["response"], tokenizer) for row in rows]

    @staticmethod
    def _encoded(prompt: str, response: str, tokenizer: object) -> dict[str, list[int]]:
        n_prompt = len(tokenizer(prompt).input_ids)  # type: ignore[operator]
        ids = [*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id]  # type: ignore[attr-defined, operator]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * n_prompt + ids[n_prompt:]}

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
    options = parser.parse_args()
    set_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(options.base), AutoModelForCausalLM.from_pretrained(options.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
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
