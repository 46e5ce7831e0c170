"""A chain on two processes; run by test_distributed.py. Writes what each process holds into the folder that it is given."""

import hashlib
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule

from cola_lightning import PredictionWriter
from tests.toy import Toy, batches, trainer, weights


class Predicting(Toy):
    def predict_step(self, batch, batch_idx):
        x, y = batch
        return {"prediction": self.model(x).sum(-1), "target": y.sum(-1)}


class Data(LightningDataModule):
    def train_dataloader(self):
        return batches()

    def predict_dataloader(self):
        return batches(5, batch_size=3)


def main(folder):
    torch.set_num_threads(1)
    module = Predicting(target_modules="all-linear", rank=3, alpha=4, dropout=0.2)  # no seed: rank 0 draws it
    fit = trainer(
        folder,
        PredictionWriter(),
        chain={"every_n_train_steps": 4, "ranks": [3, 1, 2, 3]},
        devices=2,
        strategy="ddp",
        max_epochs=3,
    )
    fit.fit(module, datamodule=Data())
    fit.save_checkpoint(folder / "ddp.ckpt")
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights(module).values())).hexdigest()
    (folder / f"rank{fit.global_rank}").write_text(f"{digest} {module.link} {module.seed}")
    fit.predict(module, datamodule=Data())
    torch.distributed.destroy_process_group()  # else gloo's threads may abort the process as it exits


if __name__ == "__main__":
    main(Path(sys.argv[1]))
