"""The link that is being trained."""

from dataclasses import dataclass, field

from cola_lightning.chain.schedule import START, FitPosition


@dataclass
class CurrentLink:
    """What is known of the link that is being trained, for its record; its factors are in the model's layers.

    Attributes:
        rank: of its factors; 0 in a model without links.
        alpha: its update is scaled by ``alpha / rank``.
        start: the position at which it began.
        end: the position that training has reached.
        name: the name of its stage; None: it has none.
        metrics: the metrics that were logged since it began, each with its last value.
        is_trained: whether an optimizer step has been taken since it began.
    """

    rank: int = 0
    alpha: float = 0.0
    start: FitPosition = START
    end: FitPosition = START
    name: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    is_trained: bool = False

    @property
    def size(self) -> tuple[int, float]:
        """Its rank and its alpha."""
        return self.rank, self.alpha

    def begin(self, rank: int, alpha: float) -> None:
        """Begins the next link where training is now, or the same one again if it was not trained."""
        if self.is_trained:
            self.metrics = {}
        self.rank, self.alpha, self.start, self.is_trained = rank, alpha, self.end, False
