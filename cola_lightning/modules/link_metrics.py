"""The metrics of the live link: what was logged since it began, over several runs of a Trainer."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


class LinkMetrics:
    """What was logged last since the live link began, in this run of a Trainer or before."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}  # of this link, in an earlier run
        self._others: dict[str, Tensor] = {}  # logged in this run, of the link before
        self._in_checkpoint: dict[str, Tensor] = {}

    def of(self, trainer: Trainer | None, link_start_step: int) -> dict[str, float]:
        """The metrics by name.

        Args:
            trainer: whose run goes on, if one does.
            link_start_step: the step at which the live link began.
        """
        if trainer is None or (trainer.training and trainer.global_step == link_start_step):
            return dict(self._before)  # not one step of this link yet: what is logged is of the link before
        logged = trainer.callback_metrics.items()
        return self._before | {name: float(value) for name, value in logged if value is not self._others.get(name)}

    def keep(self, trainer: Trainer, link_start_step: int) -> None:
        """Keeps them beyond this run of a Trainer, which forgets them when the next begins."""
        self._before = self.of(trainer, link_start_step)

    def begin_link(self, trainer: Trainer | None) -> None:
        """A link begins: what was logged so far is not its own."""
        self._before, self._others = {}, dict(trainer.callback_metrics) if trainer else {}

    def load(self, of_link: Mapping[str, float], logged: Mapping[str, Any]) -> None:
        """Takes those of a checkpoint: the live link's, and all that its Trainer had logged."""
        self._before, self._others, self._in_checkpoint = dict(of_link), {}, dict(logged)

    def give_to(self, trainer: Trainer) -> None:
        """Gives a Trainer that resumes what the run had logged last, which Lightning forgets and a rule by metrics may read."""
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: value.to(device) for name, value in self._in_checkpoint.items()})
        self._others = dict(trainer.callback_metrics)
