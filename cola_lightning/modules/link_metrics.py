"""The metrics of the live link: what was logged since it began, over several runs of a Trainer."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


class LinkMetrics:
    """The values last logged since the live link began, in this run of a Trainer or an earlier one."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}  # of this link, in an earlier run
        self._others: dict[str, Tensor] = {}  # logged in this run, of the previous link
        self._in_checkpoint: dict[str, Tensor] = {}

    def of(self, trainer: Trainer | None, link_start_step: int) -> dict[str, float]:
        """The metrics by name.

        Args:
            trainer: the Trainer of the present run, if there is one.
            link_start_step: the step at which the live link began.
        """
        if trainer is None or (trainer.training and trainer.global_step == link_start_step):
            return dict(self._before)  # no step of this link yet: the logged values are of the previous one
        logged = trainer.callback_metrics.items()
        return self._before | {name: float(value) for name, value in logged if value is not self._others.get(name)}

    def keep(self, trainer: Trainer, link_start_step: int) -> None:
        """Stores the metrics beyond this run of a Trainer, which clears them when the next begins."""
        self._before = self.of(trainer, link_start_step)

    def begin_link(self, trainer: Trainer | None) -> None:
        """Begins a link: the values logged so far are not its own."""
        self._before, self._others = {}, dict(trainer.callback_metrics) if trainer else {}

    def load(self, of_link: Mapping[str, float], logged: Mapping[str, Any]) -> None:
        """Loads the metrics of a checkpoint: the live link's, and all that its Trainer had logged."""
        self._before, self._others, self._in_checkpoint = dict(of_link), {}, dict(logged)

    def give_to(self, trainer: Trainer) -> None:
        """Restores the last logged values in a resumed Trainer: Lightning does not, and a rule by metrics may read them."""
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: value.to(device) for name, value in self._in_checkpoint.items()})
        self._others = dict(trainer.callback_metrics)
