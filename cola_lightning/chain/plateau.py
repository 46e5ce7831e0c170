"""When a link has stopped improving: a rule on the values of a metric, for knots that are decided in training."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from cola_lightning.errors import UserError

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Plateau:
    """Finishes a link once a metric has not improved for ``patience`` validations in a row, as EarlyStopping ends a run.

    A pure function of the link's values, so a resumed run with the same values decides the same.

    Args:
        patience: validations without improvement after which the link is finished.
        monitor: name of the metric.
        min_delta: a value is an improvement if it is better than the link's best by more than this.
        mode: whether a lower (``min``) or a higher (``max``) value is better.

    Raises:
        UserError: for invalid values.

    Example:
        >>> rule = Plateau(patience=2, min_delta=0.1)
        >>> [rule.is_reached([1.0, 0.8, 0.75, 0.72][:n]) for n in range(1, 5)]
        [False, False, False, True]
    """

    patience: int
    monitor: str = "val_loss"
    min_delta: float = 0.0
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"chain.patience: expected a whole number of validations of at least 1, received {self.patience}")
        if not 0 <= self.min_delta < math.inf:
            raise UserError(f"chain.min_delta: expected a number of at least 0, received {self.min_delta}")
        if self.mode not in get_args(Mode):
            raise UserError(f"chain.mode: expected {' or '.join(get_args(Mode))}, received {self.mode!r}")

    def is_reached(self, values: Iterable[float]) -> bool:
        """Whether a link with these metric values is finished; its first value is an improvement if it is finite."""
        best, waited = math.inf, 0
        for value in values:
            loss = value if self.mode == "min" else -value
            best, waited = (loss, 0) if loss < best - self.min_delta else (best, waited + 1)  # NaN is no improvement
        return waited >= self.patience
