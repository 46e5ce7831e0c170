import os
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from benchmarks.digits_model import COLADigits, DigitsDataModule
from cola_lightning import UserError
from cola_lightning.data.base import EpochSampler
from tests.toy import assert_bit_equal, trainer, weights

ROOT = Path(__file__).parent.parent


def test_the_split_is_60_10_30_of_the_digits_5_to_9_by_its_seed():
    data = DigitsDataModule()
    data.setup("fit")
    sizes = [len(part) for part in (data.train, data.val, data.test)]
    assert sum(sizes) == 896
    assert [size / 896 for size in sizes] == pytest.approx([0.6, 0.1, 0.3], abs=0.01)
    rows = torch.cat([part.tensors[0] for part in (data.train, data.val, data.test)])
    assert torch.unique(rows, dim=0).shape == rows.shape  # no image in two parts
    assert set(data.train.tensors[1].tolist()) == {5, 6, 7, 8, 9}
    other = DigitsDataModule(split_seed=1)
    other.setup("fit")
    assert not torch.equal(other.train.tensors[0], data.train.tensors[0])
    with pytest.raises(UserError, match=r"data\.batch_size: .* received 0"):
        DigitsDataModule(batch_size=0)


def test_the_base_knows_0_to_4_and_nothing_of_5_to_9():
    from sklearn.datasets import load_digits

    module = COLADigits(target_modules="all-linear", rank=1, alpha=1, seed=0)
    module.configure_model()
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    is_right = module.model(images.float() / 16 - 0.305).argmax(-1) == labels
    assert is_right[labels < 5].float().mean() > 0.98
    assert not is_right[labels >= 5].any()
    assert [m.out_features for m in module.model if isinstance(m, nn.Linear)] == [64, 64, 10]


def test_a_chain_gets_further_than_lora(tmp_path):
    def accuracy(every_n_epochs):
        adam = torch.optim.AdamW
        module = COLADigits(rank=1, alpha=1, seed=0, lr_schedule="constant", optimizer=lambda p: adam(p, lr=2e-2))
        data = DigitsDataModule()
        run = trainer(tmp_path, chain={"every_n_epochs": every_n_epochs}, max_epochs=50)
        run.fit(module, datamodule=data)
        (metrics,) = run.test(module, datamodule=data, verbose=False)
        return metrics["test_accuracy"]

    lora, chain = accuracy(None), accuracy(5)
    assert chain > 0.95
    assert chain > lora + 0.05


def test_the_training_order_follows_from_the_seed_and_the_epoch():
    def orders(seed):
        sampler = EpochSampler(range(50), seed)
        result = []
        for epoch in (0, 1, 0):
            sampler.set_epoch(epoch)
            result.append(list(sampler))
        return result

    first, second, again = orders(0)
    assert first == again != second
    assert sorted(first) == list(range(50)) == sorted(second)
    assert orders(1)[0] != first
    assert len(EpochSampler(range(50), 0)) == 50


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_resumed_inside_an_epoch_is_the_run_itself(tmp_path, accumulate):
    def fit(*callbacks, ckpt_path=None):
        module = COLADigits(rank=2, alpha=1, seed=0, dropout=0.2)
        chain = {"every_n_train_steps": 7 if accumulate == 1 else 4}
        run = trainer(tmp_path, *callbacks, chain=chain, max_epochs=3, accumulate_grad_batches=accumulate)
        run.fit(module, datamodule=DigitsDataModule(), ckpt_path=ckpt_path)
        return module

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            path = tmp_path / f"{trainer.global_step}.ckpt"
            if not path.exists():  # the batch that took the step
                trainer.save_checkpoint(path, weights_only=False)

    whole = fit(Save())
    steps = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt") if path.stem != "0")
    assert steps == list(range(1, 28 if accumulate == 1 else 10))
    for step in steps[:: 2 if accumulate == 1 else 1]:
        resumed = fit(ckpt_path=tmp_path / f"{step}.ckpt")
        assert_bit_equal(weights(resumed), weights(whole))
        assert resumed.link == whole.link


def test_the_splits_run_anew_in_another_folder(tmp_path):
    cola = tmp_path / "cola"  # in the place of the command: a study with a line of full fine-tuning
    study = 'while [ "$1" != --output ]; do shift; done; mkdir -p "$2"; echo "{\\"method\\": \\"full\\"}" >>"$2/results.jsonl"'
    cola.write_text(f"#!/bin/sh\n{study}\n")
    cola.chmod(0o755)
    folder, environment = tmp_path / "anew", {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", ROOT / "benchmarks" / "digits_splits" / "run.sh", folder], env=environment, cwd=ROOT, check=True)
    studies = ["plateau-rank-1", "rank-1", "rank-2", "rank-4"]
    assert sorted(path.parent.name for path in folder.glob("*/results.jsonl")) == studies
