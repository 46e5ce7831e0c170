"""The link that is being trained."""

from collections.abc import Callable, Mapping

from torch import Tensor

from cola_lightning.chain.schedule import START, FitPosition


class CurrentLink:
    """What is known of the link that is being trained, for its record; its factors are in the model's layers.

    Args:
        position: returns the epoch and the optimizer step that training has reached; None: nobody counts them.
        logged: returns the metrics that a fit has logged last, by name; None: nobody logs any.

    Attributes:
        rank: of its factors; 0 in a model without links.
        alpha: its update is scaled by ``alpha / rank``.
        start: the position at which it began.
        name: the name of its stage; None: it has none.
        earlier: its metrics from an earlier fit; a Trainer clears its own when its next run begins.
    """

    def __init__(
        self,
        position: Callable[[], FitPosition] | None = None,
        logged: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._position, self._logged = position, logged or dict
        self.rank, self.alpha = 0, 0.0
        self.start: FitPosition = START
        self.name: str | None = None
        self.earlier: dict[str, float] = {}
        self._of_last_link: dict[str, Tensor] = {}  # what had been logged when it began

    @property
    def size(self) -> tuple[int, float]:
        """Its rank and its alpha."""
        return self.rank, self.alpha

    @property
    def position(self) -> FitPosition:
        """The epoch and the optimizer step that training has reached."""
        return self.start if self._position is None else self._position()

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that were logged since it began, each with its last value."""
        logged = self._logged().items()
        return self.earlier | {name: float(value) for name, value in logged if value is not self._of_last_link.get(name)}

    def begin(self, rank: int, alpha: float) -> None:
        """Begins a link at the present position, or the same one again if no step has been taken since."""
        now = self.position
        if now.global_step != self.start.global_step:
            self.earlier = {}
            self.begin_metrics(self._logged())
        self.rank, self.alpha, self.start = rank, alpha, now

    def begin_metrics(self, logged: Mapping[str, Tensor]) -> None:
        """Records what was logged before, which is not the link's."""
        self._of_last_link = dict(logged)
