"""scikit-learn's handwritten digits, 5 to 9: real data that needs no download."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import TensorDataset
from typing_extensions import override

from cola_lightning.data.base import EpochLoader, EpochSampler, batches_done
from cola_lightning.errors import UserError

PIXEL_MEAN = 0.305  # of all images, scaled to 0 to 1


class DigitsDataModule(LightningDataModule):
    """The 896 images of the digits 5 to 9: 60 % train, 10 % validation, 30 % test.

    Each is 64 values, scaled to 0 to 1 and then centred.

    Args:
        batch_size: rows in a batch.
        split_seed: which rows are in which part, and the order of training.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998,
        as in ``sklearn.datasets.load_digits``.
    """

    def __init__(self, batch_size: int = 64, split_seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size: expected a whole number of at least 1, received {batch_size}")
        if not 0 <= split_seed < 2**32:
            raise UserError(f"data.split_seed: expected a whole number from 0 to 2**32 - 1, received {split_seed}")
        self.batch_size, self.split_seed = batch_size, split_seed

    @override
    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
        images, labels = images[labels >= 5].float() / 16 - PIXEL_MEAN, labels[labels >= 5]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.split_seed))
        n_train, n_val = int(0.6 * len(order)), int(0.1 * len(order))
        parts = order.tensor_split([n_train, n_train + n_val])
        self.train, self.val, self.test = (TensorDataset(images[rows], labels[rows]) for rows in parts)

    @override
    def train_dataloader(self) -> EpochLoader:
        def rows_done() -> int:
            return batches_done(self.trainer) * self.batch_size

        return self._loader(self.train, EpochSampler(self.train, self.split_seed, rows_done))

    @override
    def val_dataloader(self) -> EpochLoader:
        return self._loader(self.val)

    @override
    def test_dataloader(self) -> EpochLoader:
        return self._loader(self.test)

    @override
    def predict_dataloader(self) -> EpochLoader:
        return self._loader(self.test)

    def _loader(self, data: TensorDataset, sampler: EpochSampler | None = None) -> EpochLoader:
        # Keywords: Lightning makes this loader anew for predict. A generator of its own: without one, each pass over the data
        # would draw from the global one.
        return EpochLoader(data, batch_size=self.batch_size, sampler=sampler, generator=torch.Generator())
