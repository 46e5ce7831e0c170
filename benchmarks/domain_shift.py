"""Language under domain shift: where a chain of LoRA pays on a small GPT that reads English and learns Python.

    python -m benchmarks.domain_shift

runs ``cola compare`` on ``benchmarks/domain_shift.yaml``, on one CPU thread, prints the tables and draws ``domain_shift.png``.
A run of 800 steps takes two to three minutes, one of 3,200 eight to twelve; the base's pre-training, once, 13.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from benchmarks.curves import plot_curves
from benchmarks.lines import Rows, grouped, main
from benchmarks.studies import Results, Study, best_of, run, short_cells
from cola_lightning.study.table import BASELINE, summarize

FILE = Path(__file__).with_suffix(".jsonl")
NAMES = {"lora": "LoRA"} | {f"cola-{n}": f"{n} links" for n in (4, 8, 16)}
NAMES |= {"lora-sum-rank-4": "LoRA, four times the rank", "full": "full fine-tuning", "cola": "one knot, after a quarter"}


@dataclass(frozen=True)
class Setting:
    """What all runs of a study share.

    Attributes:
        rank: of a link.
        steps: optimizer steps of a run.
        variant: of the config, which has one decay over the run and links of equal length: ``decay-in-each-link``;
            ``knot-at-a-quarter``, with one knot, after a quarter of the steps; ``one-base``, the same runs anew, from one
            pre-training of the base.
    """

    rank: int
    steps: int
    variant: str = ""

    @property
    def name(self) -> str:
        """Of the study."""
        return f"rank-{self.rank}-steps-{self.steps}{'-' if self.variant else ''}{self.variant}"

    @property
    def place(self) -> str:
        """The first cell of its rows."""
        return f"rank {self.rank}, {self.steps:,} steps"

    def study(self, seeds: int, rates: Mapping[str, list[float]]) -> Study:
        """A call with so many seeds, and the learning rates of each method."""
        options = {"config": "benchmarks/domain_shift.yaml", "methods": [*rates], "learning_rates": rates}
        of_fit: dict[str, Any] = {"model.rank": self.rank, "model.alpha": 2 * self.rank, "trainer.max_steps": self.steps}
        of_fit |= {"trainer.val_check_interval": self.steps // 16}
        if self.variant == "decay-in-each-link":
            of_fit |= {"model.schedule_scope": "link", "model.knot_warmup_steps": 0}
        if self.variant == "knot-at-a-quarter":
            of_fit |= {"chain.every_n_train_steps": None, "chain.at_steps": [self.steps // 4]}
        return Study(self.name, options | {"seeds": seeds, "tuning_seeds": 1}, of_fit)


RANK_1 = {name: [2e-2, 4e-2, 1e-2] for name in ("lora", "cola-4", "cola-16")}
RANK_8 = {name: [1e-2, 2e-2, 5e-3] for name in ("lora", "cola-4", "cola-8", "cola-16")}
FULL, SUM = {"full": [2e-3]}, {"lora-sum-rank-4": [1e-2]}
WHOLE = [Setting(1, 800), Setting(1, 3200), Setting(8, 800), Setting(8, 3200)]
ONE_KNOT = [replace(setting, variant="knot-at-a-quarter") for setting in WHOLE if setting != Setting(1, 3200)]
IN_EACH_LINK = [Setting(1, 800, "decay-in-each-link"), Setting(8, 3200, "decay-in-each-link")]
ONE_BASE = Setting(8, 3200, "one-base")

STUDIES = [
    Setting(1, 800).study(5, RANK_1 | FULL | SUM),
    Setting(1, 3200).study(3, RANK_1 | SUM),
    Setting(1, 3200).study(5, RANK_1),
    Setting(8, 800).study(3, RANK_8 | SUM),
    Setting(8, 800).study(5, RANK_8),
    Setting(8, 3200).study(3, RANK_8 | FULL | SUM),
    Setting(8, 3200).study(5, RANK_8),
    *(setting.study(3, {"cola": [2e-2 if setting.rank == 1 else 1e-2]}) for setting in ONE_KNOT),
    IN_EACH_LINK[0].study(3, {"cola-4": [2e-2], "cola-16": [2e-2]}),
    IN_EACH_LINK[1].study(1, {"cola-4": [1e-2], "cola-8": [1e-2]}),
    ONE_BASE.study(3, {"lora": [1e-2], "cola-16": [1e-2]}),
]


def rows(results: Results) -> Rows:
    """A row for each method of each rank and number of steps."""
    table = []
    for setting in WHOLE:
        for row in sorted(summarize(best_of(results, setting.name)), key=lambda row: [*NAMES].index(row.method)):
            table.append([setting.place, *short_cells(row, NAMES[row.method])])
    return grouped(table)


def rows_of_variants(results: Results) -> Rows:
    """Each variant and what it is compared with, on the same seeds: one knot and LoRA, a decay in each link and one decay."""
    table = []
    for setting in ONE_KNOT + IN_EACH_LINK:
        plain = best_of(results, replace(setting, variant="").name)
        for method, runs in best_of(results, setting.name).items():
            other, seeds = BASELINE if method == "cola" else method, {result.seed for result in runs}
            both = {BASELINE: [result for result in plain[other] if result.seed in seeds], "variant": runs}
            names = {BASELINE: NAMES[other], "variant": NAMES[method] + (", a decay in each" if other == method else "")}
            table += [[setting.place, *short_cells(row, names[row.method])] for row in summarize(both)]
    return grouped(table)


def rows_of_one_base(results: Results) -> Rows:
    """The runs that began from the same weights."""
    return [[ONE_BASE.place, *short_cells(row, NAMES[row.method])] for row in summarize(best_of(results, ONE_BASE.name))]


def draw(results: Results, path: Path) -> None:
    """The validation loss over the steps: ranks beside, lengths below each other; full fine-tuning, without a rank, in both."""
    figure = Figure(figsize=(12.0, 7.6), layout="constrained")
    panels = figure.subplots(2, 2)
    in_legend = dict[str, Artist]()
    for setting in WHOLE:
        axes = panels[[800, 3200].index(setting.steps), [1, 8].index(setting.rank)]
        chosen = best_of(results, setting.name)
        for other in WHOLE:
            if other.steps == setting.steps and "full" in (of_other := best_of(results, other.name)):
                chosen["full"] = of_other["full"]
        plot_curves(axes, chosen, skip=0.12, names=NAMES)
        axes.set_title(setting.place)
        axes.set_xlabel("optimizer steps (dots: knots)")
        axes.set_ylabel("validation loss (nats per byte)")
        axes.spines[["top", "right"]].set_visible(False)
        in_legend |= {str(line.get_label()): line for line in axes.get_legend_handles_labels()[0]}
    labels = [label for label in [*NAMES.values(), "full fine-tuning, at its end"] if label in in_legend]
    lines = [in_legend[label] for label in labels]
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=130)


COLUMNS = ("method", "rate", "seeds", "test loss", "difference to LoRA")
TABLES = [
    (("domain shift", *COLUMNS), rows),
    (("a variant", *COLUMNS), rows_of_variants),
    (("from the same weights", *COLUMNS), rows_of_one_base),
]

if __name__ == "__main__":
    main(__doc__, FILE, lambda lines: run(lines, STUDIES), TABLES, draw)
