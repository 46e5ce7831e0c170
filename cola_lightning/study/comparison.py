"""The options of a comparison."""

import os
from dataclasses import dataclass, field

from cola_lightning.errors import UserError, nearest
from cola_lightning.study.results import Mode

# The metrics whose direction is known by their name.
BETTER: dict[str, Mode] = {"val_loss": "min", "val_perplexity": "min"}
BETTER |= {
    f"val_{name}": "max" for name in ("accuracy", "auroc", "exact_match", "f1", "matthews_corrcoef", "precision", "recall")
}


@dataclass
class Comparison:
    """A comparison of methods.

    Args:
        config: Train every run with this config file of ``cola fit``. Each run sets its own seed, learning rate and method.
        output: Write the table, the figures and the runs to this folder.
        methods: Compare these methods, for example ``[lora, cola-4]``. ``lora`` is one link, ``cola`` the config's chain, and
            ``lora-sum-rank`` one link whose rank is the sum over the chain. ``full`` trains all parameters.
            ``relora`` is ReLoRA. ``same-A`` keeps A and the optimizer over its knots, and ``share`` also leaves half of B A.
            ``cola-4`` is a chain of four links of equal length.
        seeds: Run each method this many times, with the seeds 0, 1, 2 and so on.
        learning_rates: Try these learning rates for every method (``[1e-3, 1e-2]``), or others for each method
            (``{lora: [1e-3, 1e-2], full: [1e-4]}``). The rate that is best on validation is reported. Without this option,
            every method uses the config's rate.
        tuning_seeds: Try all rates with this many seeds. The other seeds run at the best rate only. Without this option, all
            seeds try all rates.
        metric: Choose the best rate by this validation metric. The table shows the test metric of the same
            name: ``test_loss`` for ``val_loss``.
        mode: Type ``min`` if a lower metric is better, or ``max`` if a higher one is. You can leave it out for ``val_loss``,
            ``val_perplexity``, ``val_accuracy``, ``val_f1``, ``val_exact_match``, ``val_matthews_corrcoef``, ``val_precision``,
            ``val_recall`` and ``val_auroc``.
        also_seeded: Set these options of ``cola fit`` to each run's seed too, for example ``[data.split_seed]``.
    """

    config: str
    output: str
    methods: list[str]
    seeds: int = 3
    learning_rates: list[float] | dict[str, list[float]] | None = None
    tuning_seeds: int | None = None
    metric: str = "val_loss"
    mode: Mode | None = None
    also_seeded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config, self.output = os.path.expanduser(self.config), os.path.expanduser(self.output)
        rates = self.learning_rates
        if isinstance(rates, dict) and rates.keys() != set(self.methods):
            found = ", ".join(rates) or "none"
            raise UserError(f"learning_rates: each of {', '.join(self.methods)} needs a list, but there are lists for {found}")
        quantity = self.metric.partition("/")[0]  # Lightning distinguishes several loaders by val_loss/dataloader_idx_0
        if self.mode is None and quantity not in BETTER:
            raise UserError(
                f"metric: is a lower or a higher {self.metric} better? Add --mode min or --mode max, or choose a metric "
                f"of which this is known{nearest(quantity, BETTER)}"
            )
        self.better = self.mode or BETTER[quantity]
        self.rate_seeds = range(min(self.tuning_seeds or self.seeds, self.seeds))  # the seeds by which rates are compared
