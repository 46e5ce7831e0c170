"""Short reviews in plain English, written by a grammar: prompted sentiment that needs no download."""

from typing_extensions import override

from cola_lightning.data.examples import Example
from cola_lightning.data.grammar import Review, write_reviews
from cola_lightning.data.prompts import OptionDataModule


class ReviewsDataModule(OptionDataModule):
    """600 short reviews, 400 for training and 100 each for validation and test, prompted as SST-2 is.

    A review's sentiment depends on its negations and contrasts: its words alone do not determine it. No two parts share a
    sentence template.

    Args:
        batch_size: rows per training batch.
        eval_batch_size: rows per batch in validation, test and predict; ``null``: as in training.
        max_length: maximum length of prompt and option, in tokens; a longer prompt is truncated on the left.
        split_seed: seed of the grammar that generates the reviews.
        num_workers: worker processes that prepare batches; 0: the main process prepares them.
    """

    def __init__(
        self,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 128,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, max_length, split_seed, num_workers)

    @override
    def setup(self, stage: str) -> None:
        parts = {part: [_example(review) for review in reviews] for part, reviews in write_reviews(self.split_seed).items()}
        if stage in ("test", "predict"):
            self.test = self.encode(parts["test"])
            return
        self.val = self.encode(parts["validation"])
        if stage == "fit":
            self.train = self.encode(parts["train"])


def _example(review: Review) -> Example:
    return Example(f"{review.text} It was", (" terrible", " great"), review.label)
