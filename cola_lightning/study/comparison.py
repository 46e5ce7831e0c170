"""What ``cola compare`` compares: its options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cola_lightning.errors import UserError
from cola_lightning.study.results import Mode


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        config: of ``cola fit``; each run is it with a seed, a learning rate and what the method changes.
        output: folder for ``results.jsonl``, ``table.md``, ``table.csv``, the figures, and a folder for each run.
        methods: ``lora`` (one link), ``cola`` (the config's chain), ``lora-sum-rank`` (one link of the chain's summed rank),
            ``full`` (all parameters), and COLA's relatives: ``rac`` (RAC-LoRA), ``relora`` (ReLoRA), ``asymmetric`` (one link
            that trains B alone), ``boost`` (each link's A orthogonal to those before, after BoostLoRA). ``cola-4`` is a chain
            of four links of equal length, and so on.
        seeds: how many runs of each method: with the seeds 0, 1, ...
        learning_rates: those to be tried for every method, or for each by its name (``{lora: [1e-3, 1e-2], full: [1e-4]}``).
            The best on validation is reported. Default: the config's.
        tuning_seeds: by how many seeds rates are compared; the others run at the best rate alone. Default: all.
        metric: the one on the rows of validation, by which rates are chosen; that of test has the same name with ``test_``.
        mode: whether a lower (``min``) or a higher (``max``) metric is better. Default: lower for a loss, else higher.
        also_seeded: options of ``cola fit`` that are given each run's seed, too: ``[data.split_seed]``, say.
        keep_checkpoints: keep those of the runs, in their folders; else they are deleted with each run's end.
        storage: the file or the URL of Optuna's storage. Default: ``study.journal`` in the output.
        study_name: in the storage. Default: the name of the output.
    """

    config: str
    output: str
    methods: list[str]
    seeds: int = 3
    learning_rates: list[float] | dict[str, list[float]] | None = None
    tuning_seeds: int | None = None
    metric: str = "val_loss"
    mode: Literal["min", "max"] | None = None
    also_seeded: list[str] | None = None
    keep_checkpoints: bool = False
    storage: str | None = None
    study_name: str | None = None

    def __post_init__(self) -> None:
        if not Path(self.config).is_file():
            raise UserError(f"config: expected a file, received {self.config!r}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UserError(f"methods: expected a list of names, each once, received {self.methods}")
        if self.seeds < 1:
            raise UserError(f"seeds: expected a whole number of at least 1, received {self.seeds}")
        if self.tuning_seeds is not None and not 1 <= self.tuning_seeds <= self.seeds:
            raise UserError(f"tuning_seeds: expected 1 to {self.seeds}, which is seeds, received {self.tuning_seeds}")
        if not self.metric.startswith("val_"):
            raise UserError(f"metric: expected a name that begins with val_, received {self.metric!r}")
        given = self.learning_rates
        if isinstance(given, dict) and given.keys() != set(self.methods):
            received = ", ".join(given) or "none"
            raise UserError(f"learning_rates: expected a list for each of {', '.join(self.methods)}, received {received}")
        for rates in given.values() if isinstance(given, dict) else [given] if given is not None else []:
            if not rates or len(set(rates)) < len(rates) or not all(1e-12 <= rate <= 1e6 for rate in rates):
                raise UserError(f"learning_rates: expected numbers above 0, each once, received {rates}")

    @property
    def better(self) -> Mode:
        """Whether a lower or a higher metric is better."""
        return self.mode or ("min" if "loss" in self.metric or "perplexity" in self.metric else "max")

    @property
    def tuned_by(self) -> range:
        """The seeds by which rates are compared."""
        return range(self.tuning_seeds or self.seeds)
