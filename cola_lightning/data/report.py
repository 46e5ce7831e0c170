"""What becomes of the rows of a data set before training: which are used, skipped or shortened, and why."""

from dataclasses import dataclass, field

from cola_lightning.errors import UserError

REASONS_SHOWN = 4


@dataclass
class RowReport:
    """Counts of the rows that were prepared.

    Attributes:
        n_rows: all rows.
        n_shortened: the rows that are longer than ``max_length`` and lost tokens.
        n_lost: the tokens that they lost.
        n_tokens: the tokens that are used; 0 if rows have none.
        n_trained: how many of these tokens have a loss; 0 if they have none, as in classification.
        skipped: for each reason why rows were skipped, their number and the place of the first one.
        unusable: the reason for each skipped row, by the row's index.
        notes: what else the log should say about these rows, each line once.

    Example:
        >>> report = RowReport(n_rows=52_002, n_shortened=37, n_lost=1_203, n_tokens=11_200_000, n_trained=4_100_000)
        >>> report.skip("no response", "alpaca, row 12083 (counted from 0)", 12083)
        >>> print(report)  # doctest: +NORMALIZE_WHITESPACE
        52,002 rows: 1 skipped (no response: alpaca, row 12083 (counted from 0)), 37 shortened by 1,203 tokens;
        11,200,000 tokens, 4,100,000 of them trained
    """

    n_rows: int = 0
    n_shortened: int = 0
    n_lost: int = 0
    n_tokens: int = 0
    n_trained: int = 0
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    unusable: dict[int, str] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)

    def skip(self, reason: str, place: str, index: int) -> None:
        """Counts a row that was skipped.

        Args:
            reason: why.
            place: where the row is, for messages.
            index: the row's index.
        """
        n_before, first = self.skipped.get(reason, (0, place))
        self.skipped[reason] = n_before + 1, first
        self.unusable[index] = reason

    def __iadd__(self, other: "RowReport") -> "RowReport":
        """Adds the counts of other rows, which follow these."""
        self.unusable |= {self.n_rows + index: reason for index, reason in other.unusable.items()}
        for name in ("n_rows", "n_shortened", "n_lost", "n_tokens", "n_trained"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, (n_rows, place) in other.skipped.items():
            n_before, first = self.skipped.get(reason, (0, place))
            self.skipped[reason] = n_before + n_rows, first
        return self

    @property
    def n_skipped(self) -> int:
        """The number of rows that were skipped."""
        return sum(n_rows for n_rows, _ in self.skipped.values())

    def reasons(self) -> str:
        """Why rows were skipped, the most frequent reason first, each with the place of its first row."""
        ordered = sorted(self.skipped.items(), key=lambda item: -item[1][0])
        counts = [f"{n_rows:,} " * (len(ordered) > 1) + f"{reason}: {place}" for reason, (n_rows, place) in ordered]
        others = [f"{len(ordered) - REASONS_SHOWN} other reasons"] * (len(ordered) > REASONS_SHOWN)
        return "; ".join(counts[:REASONS_SHOWN] + others)

    def check(self, max_skipped: float) -> None:
        """Refuses rows of which too many were skipped: most likely their columns mean something else.

        Args:
            max_skipped: the largest share of the rows that may be skipped; one row may be skipped anyway, unless this is 0.

        Raises:
            UserError: if more were skipped; it lists the reasons.
        """
        if self.n_skipped > max(max_skipped * self.n_rows, max_skipped > 0):
            limit = f", more than data.max_skipped {max_skipped:g} allows" if max_skipped else ""
            raise UserError(f"{self.n_skipped:,} of {self.n_rows:,} rows cannot be used{limit} ({self.reasons()})")

    def __str__(self) -> str:
        """One line."""
        lost = [f"{self.n_skipped:,} skipped ({self.reasons()})"] * bool(self.skipped)
        lost += [f"{self.n_shortened:,} shortened by {self.n_lost:,} tokens"] * bool(self.n_shortened)
        rows = f"{self.n_rows:,} rows" + ": " * bool(lost) + ", ".join(lost)
        trained = f", {self.n_trained:,} of them trained" if self.n_trained else ""
        return f"{rows}; {self.n_tokens:,} tokens{trained}" if self.n_tokens else rows
