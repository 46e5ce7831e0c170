"""A chain of three links in a plain training loop, without Lightning; needs scikit-learn.

To stop inside a link, call ``adapted.full_chain().save(folder)``, and save ``optimizer.state_dict()`` by ``torch.save``. A new
process makes the model as here, calls ``adapted.start_from(Chain.load(folder), "record")`` and loads the optimizer's state. The
loop continues with the same bits: the link goes on as another one.
"""

import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn
from torch.nn import functional as F

from cola_lightning import AdaptedModel, LoRAConfig


def build_model():
    """The base; here without pretraining."""
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))


digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
adapted = AdaptedModel(build_model, LoRAConfig(target_modules=["0", "2"], rank=1, alpha=2), seed=0)
for link in range(3):
    optimizer = torch.optim.AdamW(adapted.trained_parameters(), lr=1e-2)  # a new one for each link
    for _ in range(100):
        loss = F.cross_entropy(adapted.model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.tie_knot()
    print(f"after link {link}: loss {loss.item():.2f}, rank {adapted.chain.total_rank('0')}")
print(adapted.merged_model())
