"""A language model with a loss of its own, on examples of its own."""

from lightning.pytorch import Trainer
from torch.nn import functional as F

from cola_lightning import ChainOfLoRA, COLACausalLM, Example, OptionDataModule, StepOutput


class Smoothed(COLACausalLM):
    """Its loss is cross-entropy over the options, with smoothed labels."""

    def step(self, batch):
        """The loss of a batch, and what its metrics compare."""
        scores, answer = self.option_scores(batch), batch["answer"]  # mean log-probability of each option
        loss = F.cross_entropy(scores, answer, label_smoothing=0.1)
        return StepOutput(loss, len(answer), scores.argmax(-1), answer)


class Parity(OptionDataModule):
    """Is a number even or odd?"""

    def setup(self, stage):
        """Makes the examples: a prompt, its options, and the index of the right one."""
        examples = [Example(f"The number {n} is", (" even", " odd"), n % 2) for n in range(100)]
        self.train, self.val = self.encode(examples[:80]), self.encode(examples[80:])


module = Smoothed("facebook/opt-125m", target_modules=["q_proj", "v_proj"], rank=4, alpha=8, seed=0)
trainer = Trainer(max_epochs=2, callbacks=[ChainOfLoRA(every_n_epochs=1)])
trainer.fit(module, datamodule=Parity(batch_size=16))
print(trainer.callback_metrics["val_accuracy"])
