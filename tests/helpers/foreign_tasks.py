"""Real LightningModules of other packages as chains: what test_foreign.py runs, also in processes of their own.

``foreign_tasks.py FOLDER NAME`` is started as torchrun does; the processes train one of them, and leave their weights there.
"""

import re
import sys
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from cola_lightning import COLAModule, EpochDataModule, LastCheckpoint
from tests.helpers.toy import trainer, weights

ROOT = Path(__file__).parents[2]
ENCODER, DECODER = r"encoder\.layer.*conv\d", ["decoder", "segmentation_head"]


def example(page, word):
    """The example of a page, with a word in it, that needs a package or a model that tests do not have."""
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    (found,) = (block for block in blocks if word in block)
    return found


def segmentation():
    """The example of docs/python.md, without a download."""
    pytest.importorskip("torchgeo", reason="needs pip install torchgeo")
    names = {"__name__": __name__}
    exec(example("python.md", "torchgeo").replace("weights=True", "weights=None"), names)
    globals()["Segmentation"] = names["Segmentation"]  # so that a checkpoint's class is found
    return names["module"]


def classification():
    trainers = pytest.importorskip("torchgeo.trainers", reason="needs pip install torchgeo")

    class Classification(trainers.ClassificationTask, COLAModule):
        __init__ = COLAModule.__init__

        def build_model(self):
            return self.adopt(trainers.ClassificationTask("vit_tiny_patch16_224", num_classes=4, lr=1e-3)).model

    return Classification(modules_to_save=["head"], rank=4, alpha=8, seed=0)


def unet():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs pip install segmentation_models_pytorch")

    class Unet(LightningModule):
        """As in that package's own examples."""

        def __init__(self, encoder):
            super().__init__()
            self.save_hyperparameters()
            self.model = smp.Unet(encoder, encoder_weights=None, classes=3)
            self.loss = smp.losses.DiceLoss("multiclass")
            self.register_buffer("mean", torch.tensor([0.4, 0.4, 0.4]).view(3, 1, 1))
            self.outputs = []

        def training_step(self, batch, batch_idx):
            return self.loss(self.model(batch["image"] - self.mean), batch["mask"])

        def validation_step(self, batch, batch_idx):
            logits = self.model(batch["image"] - self.mean)
            self.outputs.append(smp.metrics.get_stats(logits.argmax(1), batch["mask"], mode="multiclass", num_classes=3))
            self.log("val_loss", self.loss(logits, batch["mask"]))

        def on_validation_epoch_end(self):
            counts = [torch.cat(part) for part in zip(*self.outputs, strict=True)]
            self.log("val_iou", smp.metrics.iou_score(*counts, reduction="micro"))
            self.outputs.clear()

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)]

    class ChainedUnet(Unet, COLAModule):
        __init__ = COLAModule.__init__

        def build_model(self):
            return self.adopt(Unet("resnet18")).model

    return ChainedUnet(target_modules=ENCODER, modules_to_save=DECODER, rank=4, alpha=8, seed=0)


def finetuning():
    sys.modules["pytorch_lightning"] = lightning.pytorch  # as docs/python.md says: that package imports the old name
    benchmarking = pytest.importorskip("lightly.utils.benchmarking", reason="needs pip install lightly")
    import torchvision

    class Finetuning(benchmarking.FinetuneClassifier, COLAModule):
        __init__ = COLAModule.__init__

        def build_model(self):
            backbone = torchvision.models.resnet18()
            backbone.fc = nn.Identity()
            task = benchmarking.FinetuneClassifier(backbone, 4, feature_dim=512, num_classes=4, topk=(1,))
            return self.adopt(task).model

    return Finetuning(target_modules=r"layer.*conv\d", rank=4, alpha=8, seed=0)


TASKS = {task.__name__: task for task in (segmentation, classification, unet, finetuning)}
SIZE = {"classification": 224}


class Pictures(EpochDataModule):
    """Eight pictures of noise for training, four for validation, with a class or a mask."""

    def __init__(self, name, batch_size):
        super().__init__(batch_size)
        self.name = name

    def setup(self, stage):
        generator = torch.Generator().manual_seed(3)
        size = SIZE.get(self.name, 64)
        images = torch.rand(12, 3, size, size, generator=generator)
        labels = torch.randint(3, (12,), generator=generator)
        masks = (images.mean(1) * 3).long()
        rows = [{"image": i, "label": y, "mask": m} for i, y, m in zip(images, labels, masks, strict=True)]
        if self.name == "finetuning":
            rows = [(row["image"], row["label"]) for row in rows]
        self.train, self.val = rows[:8], rows[8:]


class Stopped(Exception):
    pass


class Stop(Callback):
    """Interrupts a fit after its first optimizer steps."""

    def __init__(self, n_steps):
        self.n_steps = n_steps

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.n_steps:
            raise Stopped


def fit(folder, module, data, ckpt_path=None, stop=None, **options):
    """A fit of two epochs with a knot between them, or its first steps; gives its trainer."""
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True} | options
    callbacks = [Stop(stop), LastCheckpoint(every_n_train_steps=1)]
    run = trainer(folder, *callbacks, chain={"every_n_epochs": 1}, **options)
    with pytest.raises(Stopped) if stop else nullcontext():
        run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return run


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    trained = TASKS[name]()
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    run = fit(folder, trained, Pictures(name, 1), **options)
    torch.save(weights(trained), folder / f"rank{run.global_rank}.pt")
