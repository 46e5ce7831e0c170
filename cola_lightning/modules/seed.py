"""The seed of a module: given, a checkpoint's, or drawn."""

import logging
import os
from typing import NamedTuple

from cola_lightning.errors import UserError
from cola_lightning.sharded import processes

log = logging.getLogger(__name__)


class Seed(NamedTuple):
    """A seed, and where it comes from.

    Attributes:
        value: the seed of every random draw.
        given: what the user gave, by ``model.seed`` or ``seed_everything``; None: nothing.
        is_of_one_process: whether it was drawn before processes were joined, so that each has its own.
    """

    value: int | None
    given: int | None
    is_of_one_process: bool = False

    def check_shared(self) -> None:
        """Refuses different seeds, which processes have drawn for themselves.

        Raises:
            UserError: if they differ.
        """
        if self.is_of_one_process and len(seeds := set(processes.gather_objects(self.value))) > 1:
            raise UserError(
                "model.seed: expected a number, or seed_everything, for a model that is accessed before processes are joined, "
                f"each of which drew its own; received null and {len(seeds)} processes"
            )


def choose_seed(of_checkpoint: int | None) -> Seed:
    """The seed of a module that was given none: of the checkpoint to be loaded, of ``seed_everything``, or drawn."""
    text = os.environ.get("PL_GLOBAL_SEED")  # what seed_everything was given
    given = None if text is None else int(text)
    if of_checkpoint is not None or given is not None:
        return Seed(given if of_checkpoint is None else of_checkpoint, given)
    drawn = processes.draw_seed()
    log.info("model.seed: %d was drawn, for none was given", drawn)
    return Seed(drawn, None, is_of_one_process=not processes.has_processes())
