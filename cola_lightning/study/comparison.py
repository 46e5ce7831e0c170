"""The options of ``cola compare``."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cola_lightning.errors import UserError
from cola_lightning.study.results import Mode
from cola_lightning.writing import check_writable

# The metrics whose direction is known by their name.
LOWER_IS_BETTER = ("val_loss", "val_perplexity")
HIGHER_IS_BETTER = tuple(
    f"val_{name}" for name in ("accuracy", "auroc", "exact_match", "f1", "matthews_corrcoef", "precision", "recall")
)


@dataclass(frozen=True)
class Comparison:
    """A comparison of methods.

    Args:
        config: config file of ``cola fit``; each run overrides its seed, its learning rate and the method's options.
        output: folder for ``results.jsonl``, ``table.md``, ``table.csv``, the figures, and a folder for each run.
        methods: ``lora`` (one link), ``cola`` (the config's chain), ``lora-sum-rank`` (one link of the chain's summed rank),
            ``full`` (all parameters), and COLA's relatives: ``rac`` (RAC-LoRA), ``relora`` (ReLoRA), ``asymmetric`` (one link
            that trains B only). ``cola-4`` is a chain of four links, as equal as whole epochs (or steps) allow, and so on.
        seeds: number of runs of each method, with the seeds 0, 1, ...
        learning_rates: learning rates to try for every method, or by method (``{lora: [1e-3, 1e-2], full: [1e-4]}``).
            The best on validation is reported. Default: the config's.
        tuning_seeds: number of seeds by which rates are compared; the others run only at the best rate. Default: all.
        metric: the validation metric, by which rates are chosen; the test metric has the same name with ``test_``.
        mode: whether a lower (``min``) or a higher (``max``) metric is better. Default: lower for ``val_loss`` and
            ``val_perplexity``; higher for ``val_accuracy``, ``val_f1``, ``val_exact_match``, ``val_matthews_corrcoef``,
            ``val_precision``, ``val_recall`` and ``val_auroc``; for another metric it is needed.
        also_seeded: further options of ``cola fit`` that are set to each run's seed: ``[data.split_seed]``, say.
        keep_checkpoints: keep the runs' checkpoints, in their folders; ``false``: delete them at each run's end.
        storage: the file or the URL of Optuna's storage. Default: ``study.journal`` in the output.
        study_name: the study's name in the storage. Default: the name of the output.
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
        for name in ("config", "output", "storage"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
        if not Path(self.config).is_file():
            raise UserError(f"config: expected a file, received {self.config!r}")
        check_writable("output", self.output)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UserError(f"methods: expected a list of names, each once, received {self.methods}")
        if self.seeds < 1:
            raise UserError(f"seeds: expected a whole number of at least 1, received {self.seeds}")
        if self.tuning_seeds is not None and not 1 <= self.tuning_seeds <= self.seeds:
            raise UserError(f"tuning_seeds: expected 1 to {self.seeds}, which is seeds, received {self.tuning_seeds}")
        if not self.metric.startswith("val_"):
            raise UserError(f"metric: expected a name that begins with val_, received {self.metric!r}")
        known = (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)
        if self.mode is None and self._quantity not in known:
            raise UserError(
                f"mode: expected min or max beside a metric that is none of {', '.join(known)}, received none for {self.metric}"
            )
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
        return self.mode or ("min" if self._quantity in LOWER_IS_BETTER else "max")

    @property
    def _quantity(self) -> str:
        """The metric without the suffix by which Lightning distinguishes several loaders: ``val_loss/dataloader_idx_0``."""
        return self.metric.partition("/")[0]

    @property
    def tuned_by(self) -> range:
        """The seeds by which rates are compared."""
        return range(self.tuning_seeds or self.seeds)
