"""Which training rows a link sees: more of those that the model before it gets wrong."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from cola_lightning.errors import NonFiniteError, UserError
from cola_lightning.modes import evaluating
from cola_lightning.seeding import derive_seed, seeded

log = logging.getLogger(__name__)


class Boosting:
    """Weights of the training rows: the model's errors on them at the start of the live link's first epoch.

    A row's error is 1 - exp(-loss): for a cross-entropy, one minus the probability of the right label, which is the length of
    the loss's gradient by that label's logit. The first epoch of a link is the one that begins with it, or else the first that
    begins after it.

    Source: boosting by resampling is Freund and Schapire, "A Decision-Theoretic Generalization of On-Line Learning" (1997).
        Rounds of LoRA are boosted by XGBLoRA (arXiv 2410.19694), and trained on wrong examples alone by BoostLoRA (arXiv
        2604.27308); of these two only the abstracts were followed.
    """

    def __init__(self) -> None:
        self.link: int | None = None
        self.rows: list[int] = []  # what the weights are of: the number of training rows, and the seed of their split
        self.weights: Tensor | None = None
        self._run: tuple[Trainer, Any, Any] | None = None

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Begins a fit; weights remain if it continues one of the same module and data.

        Raises:
            UserError: if the rows cannot be weighted, see :func:`check_boosting`.
        """
        check_boosting(trainer, module)
        run = trainer, module, trainer.datamodule  # type: ignore[attr-defined]
        if self._run is None or any(a is not b for a, b in zip(run, self._run, strict=True)) or trainer.global_step == 0:
            self.link, self.rows, self.weights = None, [], None
        self._run = run

    def weights_of(self, link: int) -> Tensor:
        """The weights of the training rows in an epoch that begins now, measured if the link has none yet.

        Args:
            link: index of the link that the epoch's first batch trains.

        Shape:
            result: training rows, in float64, on the CPU, the same in every process.

        Raises:
            UserError: if ``row_losses`` does not return a loss for each row.
            NonFiniteError: if a row's loss is not finite.
        """
        assert self._run is not None
        trainer, module, data = self._run
        rows = [len(data.train), data.split_seed]
        if self.weights is None or (link, rows) != (self.link, self.rows):
            with seeded(derive_seed(module.seed, "boosting", trainer.global_rank, link)):  # of random numbers in the loss
                losses = row_losses(trainer, module, data)
            if not losses.isfinite().all():
                raise NonFiniteError(f"the loss of training row {int((~losses.isfinite()).nonzero()[0])} is not finite")
            self.link, self.rows, self.weights = link, rows, -torch.expm1(-losses.clamp(min=0))
            if trainer.is_global_zero:
                mean = float(self.weights.mean())
                log.info("link %d: mean error of the model before it on %d training rows: %.4g", link, len(losses), mean)
        return self.weights

    def check_drawn(self) -> None:
        """Refuses, at an epoch's first batch, rows that were drawn without being weighted.

        Raises:
            UserError: if the rows come from another loader than the data module's own.
        """
        if self.weights is None:
            raise UserError(
                "chain.boosting: expected the data module's own loader of training rows, which draws them by their weights, "
                "received another (a train_dataloader of its own, or trainer.overfit_batches)"
            )

    def end_link(self, link: int) -> None:
        """Warns of a link in which no epoch began, so that it never had rows of its own."""
        if self.link is not None and self.link < link:
            log.warning(
                "chain.boosting: link %d ends before an epoch begins in it: its rows were drawn by earlier errors", link
            )

    def state_dict(self) -> dict[str, Any]:
        """The weights, and what they are of: a run that resumes inside a link goes on with them."""
        return {} if self.weights is None else {"link": self.link, "rows": self.rows, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a :meth:`state_dict`."""
        self.link, self.rows, self.weights = state.get("link"), list(state.get("rows", ())), state.get("weights")


@torch.no_grad()
def row_losses(trainer: Trainer, module: Any, data: Any) -> Tensor:
    """The loss of each training row, without dropout; every process scores its share.

    Shape:
        result: training rows, in float64, on the CPU.

    Raises:
        UserError: if the module's ``row_losses`` does not return a loss for each row.
    """
    places, loader = data.rows_to_score()
    parts = []
    with evaluating(module), trainer.precision_plugin.forward_context():
        for batch in loader:  # as Lightning's loops prepare one
            prepared = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            parts.append(module.row_losses(trainer.strategy.batch_to_device(prepared)).float())
    losses = torch.cat([part.reshape(-1) for part in parts])
    if len(losses) != len(places):
        raise UserError(f"row_losses: expected {len(places)} losses, one for each training row, received {len(losses)}")
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
