"""The arms of the study: what happens between two stages, and besides."""

from dataclasses import dataclass
from typing import Literal

from cola_lightning.chain.schedule import Knot


@dataclass(frozen=True)
class Arm:
    """What happens between two stages, and besides.

    Attributes:
        title: its name in the tables.
        knot: what it is. With ``record`` one LoRA goes on.
        replay: the share of each earlier stage's rows that a stage trains on again, in place of its own rows.
        penalty: O-LoRA's penalty: ``released`` as its code has it, ``written`` as equation 8 of its paper. Its weight is tuned.
        is_slao: whether each stage begins and ends as in SLAO.
        of: the arm whose finished chains it changes without training: each stage's update gets a factor.
        factors: ``fitted`` on the rows for validation, or ``average``: one over the number of stages.
        together: whether there is one stage, with the rows of all tasks in each batch.
        alone: whether each stage begins with the base again, so that there is a model for each task.
        n_orders: how many orders of the tasks it runs; None: all.
    """

    title: str
    knot: Knot = "record"
    replay: float = 0.0
    penalty: Literal["released", "written"] | None = None
    is_slao: bool = False
    of: str | None = None
    factors: Literal["fitted", "average"] = "fitted"
    together: bool = False
    alone: bool = False
    n_orders: int | None = None


ARMS = {
    "lora": Arm("one LoRA that goes on"),
    "link": Arm("a new link per stage", "cola"),
    "olora": Arm("O-LoRA as released", "cola", penalty="released"),
    "slao": Arm("SLAO", is_slao=True),
    "lora-replay": Arm("one LoRA, 5 % replay", replay=0.05),
    "link-replay": Arm("a new link, 5 % replay", "cola", replay=0.05),
    "joint": Arm("all tasks together", together=True, n_orders=1),
    "alone": Arm("a model for each task", alone=True, n_orders=1),
    "half": Arm("half merged after each stage", "half"),
    "average": Arm("a new link, the updates' average", of="link", factors="average"),
    "olora-written": Arm("O-LoRA as written", "cola", penalty="written"),
    "lora-replay-1": Arm("one LoRA, 1 % replay", replay=0.01),
    "link-replay-1": Arm("a new link, 1 % replay", "cola", replay=0.01),
    "lora-scaled": Arm("one LoRA, a scale per stage", of="lora"),
    "link-scaled": Arm("a new link, a scale per stage", of="link"),
}
