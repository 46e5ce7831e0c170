"""scikit-learn's handwritten digits, 5 to 9: real data that needs no download."""

import torch
from torch.utils.data import TensorDataset
from typing_extensions import override

from cola_lightning.conventions import PIXEL_MEAN
from cola_lightning.data.base import EpochDataModule


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
