"""What a user does first, with the installed wheel in an empty folder: a module of one's own, and each subcommand once."""

import platform
import subprocess
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
import yaml
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cola_lightning
from cola_lightning import ChainOfLoRA, COLAModule
from cola_lightning.cli import main


class Regression(COLAModule):
    """The smallest module of one's own."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)


def module_of_ones_own() -> None:
    """A chain is fitted, loaded again and exported."""
    rows = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    module = Regression(target_modules="all-linear", rank=1, alpha=2, seed=0)
    trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=[ChainOfLoRA(every_n_epochs=1)])
    trainer.fit(module, DataLoader(rows, batch_size=8))
    trainer.save_checkpoint("run.ckpt")
    x = torch.ones(3, 4)
    again = Regression.load_from_checkpoint("run.ckpt")
    assert torch.equal(again.eval()(x), module.eval()(x))
    assert len(again.chain) == 1
    again.export("own")


def write_model(folder: str) -> None:
    """A tiny Llama with random weights, and a tokenizer of words."""
    words = ["[UNK]", "<s>", "</s>", *(f"{kind}{k}" for kind in ("word", "label") for k in range(10))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)


def each_subcommand() -> None:
    """All of them on a CPU, without the hub."""
    write_model("model")
    Path("rows.csv").write_text("\n".join(["prompt,response", *(f"word{k % 10} word{k % 7},label{k % 10}" for k in range(60))]))
    config = {"model": {"init_args": {"model_name": "model"}}, "trainer": {"max_steps": 4, "accelerator": "cpu"}}
    config["data"] = {"init_args": {"source": "rows.csv", "test_size": 0.2}}
    Path("fit.yaml").write_text(yaml.safe_dump(config))
    Path("stages.yaml").write_text(yaml.safe_dump(config | {"stages": {"one": {}, "two": {}}}))
    of_run = ["--config", "runs/version_0/config.yaml", "--ckpt_path", "runs/version_0"]
    for words in (
        ["configs"],
        ["configs", "quickstart"],
        ["fit", "--config", "fit.yaml", "--chain.name", "sft"],
        ["validate", *of_run],
        ["test", *of_run],
        ["predict", *of_run],
        ["generate", "runs/version_0", "--prompt", "word1 word2", "--max_new_tokens", "4"],
        ["inspect", "runs/version_0"],
        ["export", "runs/version_0", "--format", "merged", "--output", "merged"],
        ["export", "runs/version_0", "--format", "chain", "--output", "chain"],
        ["verify", "merged", "--base", "model", "--adapter", "runs/version_0"],
        ["stages", "--config", "stages.yaml", "--output", "stages"],
        ["compare", "--config", "fit.yaml", "--output", "compare", "--methods", "[lora]", "--seeds", "1"],
    ):
        assert main(words) == 0, words


assert subprocess.run([Path(sys.executable).with_name("cola"), "--version"]).returncode == 0
module_of_ones_own()
each_subcommand()
print(f"cola_lightning {cola_lightning.__version__} on Python {platform.python_version()}, torch {torch.__version__}: ok")
