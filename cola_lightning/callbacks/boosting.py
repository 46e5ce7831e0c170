"""Which training rows a link sees: more of those that the model before it gets wrong."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from cola_lightning.errors import NonFiniteError, UserError

log = logging.getLogger(__name__)


class Boosting:
    """Weights of the training rows: the model's errors on them at the beginning of the live link, for as long as it lasts.

    A row's error is 1 - exp(-loss): for a cross-entropy, one minus the probability of the right label, which is the length of
    the loss's gradient by that label's logit. A link that begins inside an epoch has its own weights from the next epoch on.

    Source: boosting by resampling is Freund and Schapire, "A Decision-Theoretic Generalization of On-Line Learning" (1997).
        Rounds of LoRA are boosted by XGBLoRA (arXiv 2410.19694), and trained on wrong examples alone by BoostLoRA (arXiv
        2604.27308); of these two only the abstracts were followed.
    """

    def __init__(self) -> None:
        self.link: int | None = None
        self.weights: Tensor | None = None

    def forget(self) -> None:
        """Begins a new run."""
        self.link = self.weights = None

    def weights_of(self, link: int, trainer: Trainer, module: LightningModule, data: Any) -> Tensor:
        """The weights of the training rows in an epoch that begins now, measured if the link has none yet.

        Args:
            link: index of the link that the epoch's first batch trains.
            trainer: of the run.
            module: has ``row_losses``.
            data: has ``rows_to_score``.

        Shape:
            result: training rows, in float64, on the CPU, the same in every process.

        Raises:
            NonFiniteError: if a row's loss is not finite.
        """
        if self.weights is None or link != self.link:
            losses = row_losses(trainer, module, data)
            if not losses.isfinite().all():
                raise NonFiniteError(f"the loss of training row {int((~losses.isfinite()).nonzero()[0])} is not finite")
            self.link, self.weights = link, -torch.expm1(-losses.clamp(min=0))
            if trainer.is_global_zero:
                mean = float(self.weights.mean())
                log.info("link %d: mean error of the model before it on %d training rows: %.4g", link, len(losses), mean)
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """The weights and their link: a run that resumes inside a link goes on with them."""
        return {} if self.weights is None else {"link": self.link, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a :meth:`state_dict`."""
        self.link, self.weights = state.get("link"), state.get("weights")


@torch.no_grad()
def row_losses(trainer: Trainer, module: Any, data: Any) -> Tensor:
    """The loss of each training row, without dropout; every process scores its share.

    Shape:
        result: training rows, in float64, on the CPU.
    """
    places, loader = data.rows_to_score()
    modes = {part: part.training for part in module.modules()}
    module.eval()
    with trainer.precision_plugin.forward_context():
        batches = (trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)) for batch in loader)
        losses = torch.cat([module.row_losses(batch).float() for batch in batches])
    for part, mode in modes.items():
        part.training = mode
    every_place = trainer.strategy.all_gather(torch.tensor(places, device=losses.device))
    every_loss = trainer.strategy.all_gather(losses)
    result = torch.zeros(len(data.train), dtype=torch.float64)
    result[every_place.flatten().cpu()] = every_loss.flatten().cpu().double()
    return result


def check_boosting(trainer: Trainer, module: LightningModule) -> None:
    """Refuses, before training, a run whose rows cannot be weighted.

    Raises:
        UserError: for a sharded model, a module without ``row_losses``, and data that are not an ``EpochDataModule``.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError(
            "chain.boosting: expected one process, or trainer.strategy ddp, received a strategy that shards the model"
        )
    if not hasattr(module, "row_losses"):
        raise UserError(
            "chain.boosting: expected a module with row_losses(batch), the loss of each row of a batch, received "
            f"{type(module).__name__} without it"
        )
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "rows_to_score"):
        received = "loaders alone" if data is None else type(data).__name__
        raise UserError(f"chain.boosting: expected a data module that is an EpochDataModule, received {received}")
