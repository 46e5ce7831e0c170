"""When a link has learned what it can: its metric has stopped falling."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Plateau:
    """The values of a metric that the live link has had, and whether they have stopped falling.

    Each link is measured against its own lowest value: a plateau says that this link has stopped, and not that it is worse than
    one before it. A value has its place, the batch after which it was measured. A run that goes on from a checkpoint inside an
    accumulation window measures again what was measured in it, and decides as if the first values were not there.

    Attributes:
        patience: a plateau is so many values in a row that are no new lowest one.
        min_delta: by how much a value must be lower, to be one.
        link: index of the link that the values are of.
        values: places and values, in order.

    Example:
        >>> plateau = Plateau(patience=2)
        >>> for batch, value in enumerate([1.0, 0.8, 0.9, 0.8]):
        ...     plateau.watch(value, link=0, batch=batch)
        >>> [plateau.is_reached(link=0, batch=batch) for batch in (3, 4)]
        [False, True]
    """

    patience: int
    min_delta: float = 0.0
    link: int = 0
    values: list[tuple[int, float]] = field(default_factory=list)

    def watch(self, value: float, link: int, batch: int) -> None:
        """Takes a value into account that was measured after this batch of the run."""
        before = [(at, other) for at, other in self.values if at < batch] if link == self.link else []
        self.link, self.values = link, [*before, (batch, value)]

    def is_reached(self, link: int, batch: int) -> bool:
        """Whether the link has stopped, as far as that was known before this batch of the run."""
        lowest, waited = math.inf, 0
        for at, value in self.values if link == self.link else []:
            if at < batch:
                lowest, waited = (value, 0) if value < lowest - self.min_delta else (lowest, waited + 1)
        return waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs to know, in plain types."""
        return {"link": self.link, "values": [list(pair) for pair in self.values]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`; patience and threshold stay what they are."""
        self.link, self.values = int(state["link"]), [(int(batch), float(value)) for batch, value in state["values"]]
