"""What a user does first, with the installed wheel in an empty folder: a chain is fitted, loaded again and exported."""

import platform

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cola_lightning
from cola_lightning import ChainOfLoRA, COLAModule


class Regression(COLAModule):
    """The smallest module of one's own."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)


rows = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
module = Regression(target_modules="all-linear", rank=1, alpha=2, seed=0)
trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=[ChainOfLoRA(every_n_epochs=1)])
trainer.fit(module, DataLoader(rows, batch_size=8))
trainer.save_checkpoint("run.ckpt")
x = torch.ones(3, 4)
again = Regression.load_from_checkpoint("run.ckpt")
assert torch.equal(again.eval()(x), module.eval()(x))
assert len(again.chain) == 1
again.export("merged")
print(f"cola_lightning {cola_lightning.__version__} on Python {platform.python_version()}, torch {torch.__version__}: ok")
