"""Short reviews in plain English, written by a grammar: prompted sentiment that needs no download."""

from typing_extensions import override

from cola_lightning.data.examples import Example
from cola_lightning.data.grammar import Review, write_reviews
from cola_lightning.data.prompts import OptionDataModule


class ReviewsDataModule(OptionDataModule):
    """600 short reviews, 400 for training and 100 each for validation and test, prompted as SST-2 is.

    What a review says hangs on its negations and contrasts: its words alone tell nothing. No two parts share a sentence
    template.

    Args:
        batch_size: rows in a training batch.
        eval_batch_size: rows in a batch of validation, test and predict; ``null``: as in training.
        max_length: of prompt and option, in tokens; a longer prompt loses its beginning.
        split_seed: which reviews are written.
        num_workers: processes that prepare batches beside the training; 0: none.
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
