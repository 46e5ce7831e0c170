"""The metrics of the current link, which its record in the chain contains."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


class LinkMetrics:
    """The values that were last logged since the current link began, in this run of a Trainer or in an earlier one.

    A Trainer has the values last logged of the whole run, and clears them when its next run begins.

    Attributes:
        earlier: the current link's, from an earlier run of a Trainer.
    """

    def __init__(self) -> None:
        self.earlier: dict[str, float] = {}
        self._of_last_link: dict[str, Tensor] = {}  # as logged in this run of a Trainer
        self._of_checkpoint: dict[str, Tensor] = {}  # all that the Trainer of the loaded checkpoint had logged

    def values(self, trainer: Trainer | None, link_start: int) -> dict[str, float]:
        """The current link's metrics.

        Args:
            trainer: the Trainer of the present run, if there is one.
            link_start: the global step at which the link began.
        """
        if trainer is None or (trainer.training and trainer.global_step == link_start):
            return dict(self.earlier)  # no step of this link yet: the logged values are of the last one
        logged = trainer.callback_metrics.items()
        return self.earlier | {name: float(value) for name, value in logged if value is not self._of_last_link.get(name)}

    def reset(self, trainer: Trainer | None) -> None:
        """Begins a link's metrics: the values logged so far are not its own."""
        self.earlier, self._of_last_link = {}, dict(trainer.callback_metrics) if trainer else {}

    def to_store(self, trainer: Trainer | None) -> dict[str, Tensor]:
        """What a checkpoint stores besides the link's own values: all that were last logged, as CPU copies."""
        logged = trainer.callback_metrics if trainer else {}
        return {name: value.detach().cpu().clone() for name, value in logged.items()}

    def restore(self, earlier: Mapping[str, float], stored: dict[str, Tensor]) -> None:
        """Restores the metrics of a checkpoint's current link, and what :meth:`to_store` returned."""
        self.earlier, self._of_last_link, self._of_checkpoint = dict(earlier), {}, stored

    def resume(self, trainer: Any) -> None:
        """Gives a resumed Trainer the values last logged: Lightning does not, and a rule that reads metrics may need them."""
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: value.to(device) for name, value in self._of_checkpoint.items()})
        self._of_last_link = dict(trainer.callback_metrics)
