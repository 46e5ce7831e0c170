"""The digits: how they are split, and that a chain gets further than LoRA."""

import pytest
import torch

from examples.digits import COLADigits, DigitsDataModule
from tests.helpers.toy import trainer

pytestmark = pytest.mark.docs


def test_the_split_is_60_10_30_of_the_digits_5_to_9_by_its_seed():
    (data := DigitsDataModule()).setup("fit")
    (other := DigitsDataModule(split_seed=1)).setup("fit")
    parts = [part.tensors for part in (data.train, data.val, data.test)]
    assert [len(labels) / 896 for _, labels in parts] == pytest.approx([0.6, 0.1, 0.3], abs=0.01)
    rows = torch.cat([images for images, _ in parts])
    assert torch.unique(rows, dim=0).shape == rows.shape == (896, 64)  # no image in two parts
    assert set(data.train.tensors[1].tolist()) == {5, 6, 7, 8, 9}
    assert not torch.equal(other.train.tensors[0], data.train.tensors[0])


def test_a_chain_gets_further_than_lora(tmp_path):
    def accuracy(every_n_epochs):
        adam = torch.optim.AdamW
        module = COLADigits(rank=1, alpha=1, seed=0, lr_schedule="constant", optimizer=lambda p: adam(p, lr=2e-2))
        data = DigitsDataModule()
        run = trainer(tmp_path, chain={"every_n_epochs": every_n_epochs}, max_epochs=30, limit_val_batches=0)
        run.fit(module, datamodule=data)
        (metrics,) = run.test(module, datamodule=data, verbose=False)
        return metrics["test_accuracy"]

    lora, chain = accuracy(None), accuracy(5)
    assert chain > 0.95
    assert chain > lora + 0.05
