"""The arms of the study: what happens between two stages, and besides."""

from dataclasses import dataclass

from cola_lightning.chain.schedule import Knot


@dataclass(frozen=True)
class Arm:
    """What happens between two stages, and besides.

    Attributes:
        title: its name in the table.
        knot: what it is. With ``record`` one LoRA goes on.
        replay: the share of each earlier stage's rows that a stage trains on again, in place of its own rows.
        orthogonality: the weight of O-LoRA's penalty.
        scaled: the arm whose chains get a factor for each stage, fitted on the rows for validation.
        together: whether there is one stage, with the rows of all tasks in each batch.
        alone: whether each stage begins with the base again, so that there is a model for each task.
    """

    title: str
    knot: Knot = "record"
    replay: float = 0.0
    orthogonality: float = 0.0
    scaled: str | None = None
    together: bool = False
    alone: bool = False


ARMS = {
    "lora": Arm("one LoRA that goes on"),
    "link": Arm("a new link per stage", "cola"),
    "lora-scaled": Arm("one LoRA, a scale per stage", scaled="lora"),
    "link-scaled": Arm("a new link, a scale per stage", scaled="link"),
    "half": Arm("half merged after each stage", "half"),
    "lora-replay": Arm("one LoRA, 5 % replay", replay=0.05),
    "link-replay": Arm("a new link, 5 % replay", "cola", replay=0.05),
    "link-orthogonal": Arm("a new link, O-LoRA's penalty", "cola", orthogonality=0.5),
    "joint": Arm("all tasks together", together=True),
    "alone": Arm("a model for each task", alone=True),
}
