"""A T5 is trained with a chain of two links, and saved as a plain T5."""

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from cola_lightning import ChainOfLoRA, COLAModule


class Seq2Seq(COLAModule):
    """A T5, which computes its loss from ``labels`` itself."""

    def build_model(self):
        """The pretrained model."""
        return AutoModelForSeq2SeqLM.from_pretrained("google-t5/t5-small").train()  # else it trains without dropout

    def training_step(self, batch, batch_idx):
        """The mean loss over the tokens of an optimizer step."""
        n_tokens = (batch["labels"] != -100).sum()
        return self.step_loss.weigh(self.model(**batch).loss, n_tokens)


tokenizer = AutoTokenizer.from_pretrained("google-t5/t5-small")
rows = [tokenizer(f"translate English to German: {n}", text_target=f"Nummer {n}") for n in range(64)]
loader = DataLoader(rows, batch_size=8, collate_fn=DataCollatorForSeq2Seq(tokenizer))
module = Seq2Seq(target_modules=["q", "v"], rank=8, alpha=16, seed=0)
Trainer(max_epochs=2, callbacks=[ChainOfLoRA(every_n_epochs=1)]).fit(module, loader)
module.merged_model().save_pretrained("my_t5")  # a plain T5: AutoModelForSeq2SeqLM loads it, and it generates
tokenizer.save_pretrained("my_t5")
