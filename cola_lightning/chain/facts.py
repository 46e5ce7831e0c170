"""What a checkpoint stores of a module's run besides its chain and its trained values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from cola_lightning.chain.schedule import FitPosition

Records = Sequence[Mapping[str, Any] | None]  # which rows each run held out, see data.split.HeldOut; None: it is unknown


@dataclass
class ModuleArguments:
    """How a module is made again.

    Attributes:
        class_path: the import path of its class.
        init_args: the arguments that were given to its constructor, as plain values.
        not_plain: names of arguments without a plain value, which are not stored.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    not_plain: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StoredFacts:
    """What a checkpoint stores of a run, for JSON except for its tensors.

    Attributes:
        module: how the module is made again.
        seed: of all random draws.
        live: the current link without its tensors; None: the module trains without links.
        extras: names of what else the current link records.
        is_trained: whether the current link has been trained.
        start: where the current link began.
        position: where the fit was, or had ended.
        dtype: to which a precision has cast adapted layers, by torch's name; None: without links.
        init_chain: the chain that the run began from.
        first_link: index of the run's first link.
        n_earlier_fits: how many fits had trained the module before.
        has_knots: whether the fit's schedule has knots.
        knot: their kind.
        share: the share of a link that they merge.
        sizes: the rank and alpha that the schedule has for each link up to the next.
        init: how A is drawn.
        modules_to_save: the names of the fully trained modules.
        prompt_format: how the data module prompts the model; empty: it does not.
        data: which data the model was trained on.
        held_out: the rows that the runs of the module held out.
        initial: the values outside of the model before the first link.
    """

    module: ModuleArguments
    seed: int
    live: Mapping[str, Any] | None
    extras: Sequence[str]
    is_trained: bool
    start: FitPosition
    position: FitPosition
    dtype: str | None
    init_chain: Sequence[Any]
    first_link: int
    n_earlier_fits: int
    has_knots: bool
    knot: str
    share: float
    sizes: Sequence[Sequence[float]]
    init: str
    modules_to_save: Sequence[str]
    prompt_format: Mapping[str, Any]
    data: Mapping[str, Any]
    held_out: Records = (None,)
    initial: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """The facts as :meth:`to_store` gave them; JSON has made lists of the positions."""
        positions = {name: FitPosition(*stored[name]) for name in ("start", "position")}
        return cls(**{**stored, **positions, "module": ModuleArguments(**stored["module"])})

    def to_store(self) -> dict[str, Any]:
        """Its fields for :func:`~cola_lightning.chain.chain.pack`, without those that are empty by default."""
        fields = {name: value for name, value in vars(self).items() if name != "initial" or value}
        return fields | {"module": vars(self.module)}
