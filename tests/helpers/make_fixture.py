"""Writes a chain folder and a checkpoint of the present format into ``tests/fixtures``, and the expected logits.

To be run once for each version of the format; what is committed stays, so that later releases keep loading it.
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from cola_lightning import COLAModule, lora_layers
from cola_lightning.chain.chain import VERSION
from tests.helpers.toy import trainer

FIXTURES = Path(__file__).parents[1] / "fixtures"


ARGUMENTS = {"target_modules": ["0", "2"], "modules_to_save": ["4"], "rank": 3, "alpha": 6, "seed": 0}


class Fixed(COLAModule):
    """A network whose weights follow from arithmetic, not from a generator that may change."""

    base_name = "fixture"

    def build_model(self):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
        for name, parameter in model.named_parameters():
            fill(parameter, len(name))
        return model


class Trained(Fixed):
    """The same, trained for a checkpoint."""

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()


def fill(tensor, offset):
    with torch.no_grad():  # in numbers that float32 has: the same bits on every machine
        tensor.copy_(((torch.arange(tensor.numel()) * 37 + 11 * offset) % 64 - 32).reshape(tensor.shape) / 64)


def inputs():
    x = torch.empty(4, 6)
    fill(x, 1)
    return x


def main():
    """Three links of ranks 3, 1 and 2 each, with a head that is trained whole."""
    module = Fixed(**ARGUMENTS)
    module.configure_model()
    for link, (rank, alpha) in enumerate([(1, 4.0), (2, 8.0), (3, 6.0)]):
        for place, layer in enumerate(lora_layers(module.model).values()):
            fill(layer.lora_A[: layer.rank], 10 * link + place)
            fill(layer.lora_B[:, : layer.rank], 20 * link + place)
        fill(module.model[4].weight, link)
        if link < 2:
            module.tie_knot(rank=rank, alpha=alpha)
    module.full_chain().save(FIXTURES / f"chain-{VERSION}", overwrite=True)
    trained = Trained(**ARGUMENTS)
    run = trainer(Path(), chain={"every_n_epochs": 1, "ranks": [3, 1, 2]}, max_epochs=3)
    run.fit(trained, DataLoader(inputs(), batch_size=2))
    run.save_checkpoint(FIXTURES / f"checkpoint-{VERSION}.ckpt")
    for made, kind in ((module, "chain"), (trained, "checkpoint")):
        logits = [made.merged_model(links)(inputs()).tolist() for links in range(4)]
        (FIXTURES / f"{kind}-{VERSION}.logits.json").write_text(json.dumps(logits) + "\n")


if __name__ == "__main__":
    main()
