"""scikit-learn's handwritten digits: a network that knows 0 to 4 learns 5 to 9; real data that needs no download."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy
from typing_extensions import override

from cola_lightning.data.base import EpochDataModule
from cola_lightning.module.module import COLAModule

PIXEL_MEAN = 0.305  # of all images, scaled to 0 to 1

Batch = tuple[Tensor, Tensor]

# Weights that this process has pre-trained, by generator state and number of threads: each replay rebuilds the base.
_pretrained: dict[tuple[bytes, int], dict[str, Tensor]] = {}


class COLADigits(COLAModule):
    """A 64-64-64-10 network for 8 x 8 digits, pre-trained on the digits 0 to 4.

    Source: the MNIST experiment of RAC-LoRA (arXiv 2410.08305), on scikit-learn's digits, which need no download.
    """

    @override
    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        started_at = torch.get_rng_state().numpy().tobytes(), torch.get_num_threads()  # the initial weights follow, too
        if started_at not in _pretrained:
            pretrain(model)
            _pretrained[started_at] = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(_pretrained[started_at])
        return model

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "train")

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        images, targets = batch
        return {"prediction": self.model(images).argmax(-1), "target": targets}

    def _evaluate(self, batch: Batch, stage: str) -> Tensor:
        images, targets = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, targets)
        is_evaluation = stage != "train"
        self.log(f"{stage}_loss", loss, batch_size=len(targets), prog_bar=True, sync_dist=is_evaluation)
        if is_evaluation:
            accuracy = multiclass_accuracy(logits, targets, num_classes=10, average="micro")
            self.log(f"{stage}_accuracy", accuracy, batch_size=len(targets), prog_bar=True, sync_dist=True)
        return loss


def pretrain(model: nn.Module, epochs: int = 40, learning_rate: float = 1e-3, batch_size: int = 64) -> None:
    """Trains the model on all images of the digits 0 to 4, in a second; draws its batches from torch's global generator."""
    from sklearn.datasets import load_digits

    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images, labels = images[labels < 5].float() / 16 - PIXEL_MEAN, labels[labels < 5]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


class DigitsDataModule(EpochDataModule):
    """The 896 images of the digits 5 to 9: 60 % train, 10 % validation, 30 % test.

    Each is 64 values, scaled to 0 to 1 and then centred.

    Args:
        batch_size: rows in a batch.
        split_seed: seed of the split and of the training order.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998,
        as in ``sklearn.datasets.load_digits``.
    """

    def __init__(self, batch_size: int = 64, split_seed: int = 0, num_workers: int = 0) -> None:
        super().__init__(batch_size, split_seed=split_seed, num_workers=num_workers)

    @property
    @override
    def order_seed(self) -> int:
        return self.split_seed

    @override
    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
        images, labels = images[labels >= 5].float() / 16 - PIXEL_MEAN, labels[labels >= 5]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.split_seed))
        n_train, n_val = int(0.6 * len(order)), int(0.1 * len(order))
        parts = order.tensor_split([n_train, n_train + n_val])
        self.train, self.val, self.test = (TensorDataset(images[rows], labels[rows]) for rows in parts)
