"""A network of one's own, pre-trained or not: digits by a chain of three links, and the test accuracy after each."""

import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cola_lightning import ChainOfLoRA, COLAModule


class Classifier(COLAModule):
    """A model and its loss."""

    def build_model(self):
        """The model before any link."""
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))  # or any pretrained model

    def training_step(self, batch, batch_idx):
        """The loss of a batch."""
        x, y = batch
        return F.cross_entropy(self.model(x), y)


digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=32, shuffle=True)
module = Classifier(
    target_modules=["0", "2"],
    rank=2,
    alpha=4,
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),  # called for each link
    seed=0,
)
Trainer(max_epochs=9, callbacks=[ChainOfLoRA(every_n_epochs=3)]).fit(module, loader)
for links in range(4):  # 0: the base
    accuracy = (module.merged_model(links)(x[1400:]).argmax(-1) == y[1400:]).float().mean()
    print(f"{links} links: test accuracy {accuracy:.2f}")
