"""A language model with a loss of its own, on rows of its own."""

import json
from pathlib import Path

from lightning.pytorch import Trainer
from torch.nn import functional as F

from cola_lightning import ChainOfLoRA, COLACausalLM, StepOutput, TemplateDataModule


class Smoothed(COLACausalLM):
    """Its loss is cross-entropy over the options, with smoothed labels."""

    def step(self, batch):
        """The loss of a batch, and what its metrics compare."""
        scores, answer = self.option_scores(batch), batch["answer"]  # mean log-probability of each option
        loss = F.cross_entropy(scores, answer, label_smoothing=0.1)
        return StepOutput(loss, len(answer), scores.argmax(-1), answer)


rows = [json.dumps({"n": n, "label": n % 2}) for n in range(100)]  # is a number even or odd?
Path("numbers.jsonl").write_text("\n".join(rows), encoding="utf-8")
data = TemplateDataModule("numbers.jsonl", prompt="The number {n} is", options=["even", "odd"], batch_size=16, val_size=20)

module = Smoothed("facebook/opt-125m", target_modules=["q_proj", "v_proj"], rank=4, alpha=8, seed=0)
trainer = Trainer(max_epochs=2, callbacks=[ChainOfLoRA(every_n_epochs=1)])
trainer.fit(module, datamodule=data)
print(trainer.callback_metrics["val_accuracy"])
