"""A real LightningModule of another package as a chain: what test_foreign.py runs, also in processes of their own.

``foreign_tasks.py FOLDER`` is started as torchrun does; the processes train it, and leave their weights there.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from cola_lightning import COLAModule, EpochDataModule, LastCheckpoint
from tests.helpers.resuming import Stopped
from tests.helpers.toy import Watch, trainer, weights

ROOT = Path(__file__).parents[2]


def segmentation():
    """A task of torchgeo as docs/python.md says, without a download."""
    task = pytest.importorskip("torchgeo.trainers", reason="needs pip install torchgeo").SemanticSegmentationTask

    class Segmentation(task, COLAModule):
        __init__ = COLAModule.__init__

        def build_model(self):
            return self.adopt(task("unet", "resnet18", num_classes=3)).model

    Segmentation.__qualname__ = "Segmentation"
    globals()["Segmentation"] = Segmentation  # so that a checkpoint's class is found
    trained = {"target_modules": r"encoder\.layer.*conv\d", "modules_to_save": ["decoder", "segmentation_head"]}
    return Segmentation(**trained, rank=4, alpha=8, seed=0)


class Pictures(EpochDataModule):
    """Eight pictures of noise for training, four for validation, with a mask."""

    def setup(self, stage):
        images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(3))
        rows = [{"image": image, "mask": mask} for image, mask in zip(images, (images.mean(1) * 3).long(), strict=True)]
        self.train, self.val = rows[:8], rows[8:]


def fit(folder, module, data, ckpt_path=None, stop=None, **options):
    """A fit of two epochs with a knot between them, or its first steps; gives its trainer."""
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True} | options

    def stop_there(run, _):
        if run.global_step == stop:
            raise Stopped

    run = trainer(folder, Watch(stop_there), LastCheckpoint(every_n_train_steps=1), chain={"every_n_epochs": 1}, **options)
    with pytest.raises(Stopped) if stop else nullcontext():
        run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return run


if __name__ == "__main__":
    trained = segmentation()
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    run = fit(Path(sys.argv[1]), trained, Pictures(batch_size=1), **options)
    torch.save(weights(trained), Path(sys.argv[1]) / f"rank{run.global_rank}.pt")
