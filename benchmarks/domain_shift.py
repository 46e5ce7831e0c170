"""Language under domain shift: where a chain of LoRA pays on a small GPT that reads English and learns Python.

    python -m benchmarks.domain_shift

runs ``cola compare`` on ``benchmarks/domain_shift.yaml`` (the commands below, which it prints), on one CPU thread; each of its
studies is a folder of ``benchmarks/domain_shift``, with a line a run in ``results.jsonl``. A second call does what is missing.
A run of 800 steps takes two to three minutes, one of 3,200 eight to twelve; the base's pre-training, once, 13.

    python -m benchmarks.domain_shift --table

draws ``domain_shift.png`` from the lines that are there, and prints the tables of docs/results.md and README.md in this folder.

    python -m benchmarks.domain_shift --output FOLDER

runs all of it anew, in an empty folder; the figure is ``FOLDER.png``.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from benchmarks.studies import compare, grouped, main
from cola_lightning.study.figures import plot_curves
from cola_lightning.study.results import Result, at_best_rates, read
from cola_lightning.study.table import short_cells, summarize

HERE = Path(os.path.relpath(Path(__file__).parent))
FOLDER = HERE / "domain_shift"
CONFIG = HERE / "domain_shift.yaml"


@dataclass(frozen=True)
class Stage:
    """A call of ``cola compare``. Several go on with one study, so that the most telling runs come first.

    Attributes:
        rank: of a link.
        steps: optimizer steps of a run.
        seeds: how many.
        rates: those of each method.
        tuning_seeds: by how many seeds rates are compared.
        variant: of the config, which has one decay over the run and links of equal length: ``decay-in-each-link``;
            ``knot-at-a-quarter``, with one knot, after a quarter of the steps; ``one-base``, the same runs anew, from one
            pre-training of the base.
    """

    rank: int
    steps: int
    seeds: int
    rates: dict[str, list[float]] = field(hash=False)
    tuning_seeds: int = 1
    variant: str = ""

    @property
    def name(self) -> str:
        """Of the study, and of its folder."""
        return f"rank-{self.rank}-steps-{self.steps}{'-' if self.variant else ''}{self.variant}"

    @property
    def place(self) -> str:
        """The first cell of its rows."""
        return f"rank {self.rank}, {self.steps:,} steps"

    def words(self, folder: Path) -> list[str]:
        """What follows ``cola``."""
        options: dict[str, object] = {
            "config": str(CONFIG),
            "output": str(folder / self.name),
            "methods": [*self.rates],
            "seeds": self.seeds,
        }
        options |= {"tuning_seeds": min(self.tuning_seeds, self.seeds), "learning_rates": self.rates}
        of_fit: dict[str, object] = {"model.rank": self.rank, "model.alpha": 2 * self.rank, "trainer.max_steps": self.steps}
        of_fit |= {"trainer.val_check_interval": self.steps // 16}
        if self.variant == "decay-in-each-link":
            of_fit |= {"model.schedule_scope": "link", "model.knot_warmup_steps": 0}
        if self.variant == "knot-at-a-quarter":
            of_fit |= {"chain.every_n_train_steps": "null", "chain.at_steps": f"[{self.steps // 4}]"}
        return compare(options, of_fit)

    def results(self, folder: Path) -> list[Result]:
        """What the lines that are there say."""
        return read(folder / self.name / "results.jsonl")

    def best(self, folder: Path) -> dict[str, list[Result]]:
        """Each method's results at its best rate."""
        return at_best_rates(self.results(folder), "min", range(self.tuning_seeds))


NAMES = {"lora": "LoRA"} | {f"cola-{n}": f"{n} links" for n in (4, 8, 16)}
NAMES |= {"lora-sum-rank-4": "LoRA, four times the rank", "full": "full fine-tuning", "cola": "one knot, after a quarter"}

RANK_1 = {name: [2e-2, 4e-2, 1e-2] for name in ("lora", "cola-4", "cola-16")}
RANK_8 = {name: [1e-2, 2e-2, 5e-3] for name in ("lora", "cola-4", "cola-8", "cola-16")}
LINK_1 = {name: [2e-2] for name in ("cola-4", "cola-16")}
LINK_8 = {name: [1e-2] for name in ("cola-4", "cola-8")}
FULL, SUM = {"full": [2e-3]}, {"lora-sum-rank-4": [1e-2]}

STAGES = [
    Stage(1, 800, 1, RANK_1),
    Stage(1, 800, 3, RANK_1),
    Stage(1, 800, 1, LINK_1, variant="decay-in-each-link"),
    Stage(8, 3200, 1, RANK_8),
    Stage(8, 3200, 1, LINK_8, variant="decay-in-each-link"),
    Stage(8, 3200, 2, RANK_8),
    Stage(1, 800, 3, LINK_1, variant="decay-in-each-link"),
    Stage(8, 3200, 3, RANK_8),
    Stage(1, 800, 3, RANK_1 | FULL | SUM),
    Stage(8, 3200, 3, RANK_8 | FULL),
    Stage(1, 800, 5, RANK_1 | FULL | SUM),
    Stage(8, 800, 3, RANK_8 | SUM),
    Stage(8, 800, 3, {"cola": [1e-2]}, variant="knot-at-a-quarter"),
    Stage(1, 800, 3, {"cola": [2e-2]}, variant="knot-at-a-quarter"),
    Stage(8, 3200, 3, {"cola": [1e-2]}, variant="knot-at-a-quarter"),
    Stage(1, 3200, 3, RANK_1),
    Stage(8, 3200, 3, RANK_8 | SUM),
    Stage(8, 3200, 5, RANK_8),
    Stage(1, 3200, 3, RANK_1 | SUM),
    Stage(8, 800, 5, RANK_8),
    Stage(1, 3200, 5, RANK_1),
    Stage(8, 3200, 3, {"lora": [1e-2], "cola-16": [1e-2]}, variant="one-base"),
]


def calls(folder: Path) -> Iterator[list[str]]:
    """The studies, each as what follows ``cola``."""
    return (stage.words(folder) for stage in STAGES)


def studies(folder: Path, variant: str = "") -> list[Stage]:
    """The last stage of each study that has lines, by rank and steps."""
    stages = (stage for stage in STAGES if stage.variant == variant)
    found = {stage.name: stage for stage in stages if (folder / stage.name / "results.jsonl").exists()}
    return sorted(found.values(), key=lambda stage: (stage.rank, stage.steps))


def rows(folder: Path = FOLDER) -> list[list[str]]:
    """The first table of docs/results.md: a row for each method of each study, from the lines that are there."""
    table = []
    for stage in studies(folder):
        for row in sorted(summarize(stage.best(folder)), key=lambda row: [*NAMES].index(row.method)):
            table.append([stage.place, *short_cells(row, NAMES[row.method])])
    return grouped(table)


def rows_of_scopes(folder: Path = FOLDER) -> list[list[str]]:
    """What README.md here says of the two schedules: the same runs with one decay over the run, and one in each link."""
    table = []
    for stage in studies(folder, "decay-in-each-link"):
        over_run = replace(stage, variant="").results(folder)
        for name, of_method in stage.best(folder).items():
            runs = {(one.seed, one.learning_rate): one.test for one in over_run if one.method == name}
            tests = [(runs.get((one.seed, one.learning_rate)), one.test) for one in of_method]
            pairs = [(run, link) for run, link in tests if run is not None and link is not None]
            run, link = (fmean(values) for values in zip(*pairs, strict=True))
            cells = [NAMES[name], str(len(pairs)), f"{run:.3f}", f"{link:.3f}", f"{link - run:+.3f}"]
            table.append([stage.place, *cells])
    return grouped(table)


def rows_of_one_base(folder: Path = FOLDER) -> list[list[str]]:
    """What benchmarks/README.md says of the runs that began from the same weights."""
    stages = studies(folder, "one-base")
    return [[stage.place, *short_cells(row, NAMES[row.method])] for stage in stages for row in summarize(stage.best(folder))]


def rows_of_one_knot(folder: Path = FOLDER) -> list[list[str]]:
    """What benchmarks/README.md says of one early knot: that chain and LoRA, on the same seeds."""
    table = []
    for stage in studies(folder, "knot-at-a-quarter"):
        one_knot = stage.best(folder)
        seeds = {result.seed for result in one_knot["cola"]}
        both = {"lora": replace(stage, variant="").best(folder)["lora"]} | one_knot
        same = {name: [result for result in results if result.seed in seeds] for name, results in both.items()}
        for row in summarize(same):
            table.append([stage.place, *short_cells(row, NAMES[row.method])])
    return grouped(table)


def draw(folder: Path) -> None:
    """The validation loss over the steps, a panel for each study that has lines: ranks beside, lengths below each other.

    Full fine-tuning has no rank: it is in each panel of its length.
    """
    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {(stage.rank, stage.steps): stage.best(folder) for stage in studies(folder)}
    full = {steps: {"full": results["full"]} for (_, steps), results in shown.items() if "full" in results}
    ranks, lengths = (sorted(set(values)) for values in zip(*shown, strict=True))
    figure = Figure(figsize=(6.0 * len(ranks), 3.5 * len(lengths) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    in_legend: dict[str, Artist] = {}
    for (rank, steps), results in shown.items():
        axes = figure.add_subplot(len(lengths), len(ranks), lengths.index(steps) * len(ranks) + ranks.index(rank) + 1)
        plot_curves(axes, results | full.get(steps, {}), skip=0.12, names=NAMES)
        axes.set_title(f"rank {rank}, {steps:,} steps")
        axes.set_xlabel("optimizer steps (dots: knots)")
        axes.set_ylabel("validation loss (nats per byte)")
        axes.spines[["top", "right"]].set_visible(False)
        in_legend |= {str(line.get_label()): line for line in axes.get_legend_handles_labels()[0]}
    labels = [label for label in [*NAMES.values(), "full fine-tuning, at its end"] if label in in_legend]
    lines = [in_legend[label] for label in labels]
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    figure.savefig(folder.with_name(f"{folder.name}.png"), dpi=130)


if __name__ == "__main__":
    main(__doc__, FOLDER, calls, [rows, rows_of_scopes, rows_of_one_knot, rows_of_one_base], draw)
