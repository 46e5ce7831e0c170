"""The options of a sequence of stages."""

import os
from dataclasses import dataclass

from cola_lightning.chain.schedule import Knot
from cola_lightning.errors import UserError


@dataclass
class StagesOptions:
    """A sequence of stages.

    Args:
        config: Read the stages from this config file of ``cola fit``. Its group ``stages`` names them in order, each with what
            differs from the config: ``stages: {sft: {}, dpo: {data: ..., model: ...}}``.
        output: Write each stage's run to the folder of its name in this folder.
        knot: What happens between two stages. ``cola`` merges the last link, and a new one begins. ``half`` merges half of it;
            A and the rest of B go on. ``record`` only records it: one LoRA goes on over the stages. The optimizer and its
            schedule are new in each stage.
        replay: Train this share of each earlier stage's training rows again in every later stage: 0.05, for example. It needs
            the same classes of model and data, ``data.chat_template`` and ``data.packing``: the rows of instructions cannot be
            replayed among preferences.
        fit_scales: Choose a factor for what each stage changed, of 0.5, 0.75, 1 and 1.25, by the validation rows of all tasks.
            Nothing is trained. It shows the test data before and after, writes ``scales.yaml``, and says how to export the
            model. It needs ``--knot cola``.
        max_forgetting: Exit with status 3 if any stage's test data is worse by more than this at the end than at its best, in
            one of its metrics: by 0.02 in the loss or in the accuracy, for example.
    """

    config: str
    output: str
    knot: Knot = "cola"
    replay: float | None = None
    fit_scales: bool = False
    max_forgetting: float = float("inf")

    def __post_init__(self) -> None:
        self.config, self.output = os.path.expanduser(self.config), os.path.expanduser(self.output)
        if self.replay is not None and not 0 < self.replay <= 1:
            raise UserError(f"replay: must be a share of the rows, above 0 and at most 1, got {self.replay}")
        if self.max_forgetting < 0:
            raise UserError(f"max_forgetting: must be at least 0, got {self.max_forgetting}")
        if self.fit_scales and self.knot != "cola":
            raise UserError(f"fit_scales: needs --knot cola, by which a stage's links are its own, got {self.knot}")
