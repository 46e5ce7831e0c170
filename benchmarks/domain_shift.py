"""Language under domain shift: where a chain of LoRA pays on a small GPT that reads English and learns Python.

    python benchmarks/domain_shift.py

runs ``cola compare`` on ``configs/domain_shift.yaml`` (the commands below, which it prints), on one CPU thread; each of its
studies is a folder of ``benchmarks/domain_shift``, with a line a run in ``results.jsonl``. A second call does what is missing.
A run of 800 steps takes two to three minutes, one of 3,200 eight to twelve; the base's pre-training, once, 13.

    python benchmarks/domain_shift.py --figure

draws ``domain_shift.png`` from the lines that are there, and prints the tables of docs/results.md.

    python benchmarks/domain_shift.py --output FOLDER

runs all of it anew, in an empty folder; the figure is ``FOLDER.png``.
"""

import argparse
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from studies import compare, run

from cola_lightning.study.figures import plot_curves
from cola_lightning.study.results import Result, at_best_rates, read
from cola_lightning.study.table import short_cells, summarize

HERE = Path(os.path.relpath(Path(__file__).parent))
FOLDER = HERE / "domain_shift"
CONFIG = HERE.parent / "configs" / "domain_shift.yaml"


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
    def folder(self) -> Path:
        """Of the study."""
        return FOLDER / f"rank-{self.rank}-steps-{self.steps}{'-' if self.variant else ''}{self.variant}"

    @property
    def words(self) -> list[str]:
        """What follows ``cola``."""
        rates = ", ".join(f"{name}: [{', '.join(f'{rate:g}' for rate in of_method)}]" for name, of_method in self.rates.items())
        options = {
            "config": str(CONFIG),
            "output": str(self.folder),
            "methods": f"[{', '.join(self.rates)}]",
            "seeds": self.seeds,
        }
        options |= {"tuning_seeds": min(self.tuning_seeds, self.seeds), "learning_rates": f"{{{rates}}}"}
        of_fit = {"model.rank": self.rank, "model.alpha": 2 * self.rank, "trainer.max_steps": self.steps}
        of_fit |= {"trainer.val_check_interval": self.steps // 16}
        if self.variant == "decay-in-each-link":
            of_fit |= {"model.schedule_scope": "link", "model.knot_warmup_steps": 0}
        if self.variant == "knot-at-a-quarter":
            of_fit |= {"chain.every_n_train_steps": "null", "chain.at_steps": f"[{self.steps // 4}]"}
        return compare(options, of_fit)

    def best(self) -> dict[str, list[Result]]:
        """Each method's results at its best rate, from the lines that are there."""
        return at_best_rates(read(self.folder / "results.jsonl"), "min", range(self.tuning_seeds))


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


def studies(variant: str = "") -> list[Stage]:
    """The last stage of each study that has lines, by rank and steps."""
    found = {stage.folder: stage for stage in STAGES if stage.variant == variant and (stage.folder / "results.jsonl").exists()}
    return sorted(found.values(), key=lambda stage: (stage.rank, stage.steps))


def rows() -> list[list[str]]:
    """The first table of docs/results.md: a row for each method of each study, from the lines that are there."""
    table = []
    for stage in studies():
        place = f"rank {stage.rank}, {stage.steps:,} steps"
        for row in sorted(summarize(stage.best()), key=lambda row: [*NAMES].index(row.method)):
            table.append([place, *short_cells(row, NAMES[row.method])])
    return table


def rows_of_scopes() -> list[list[str]]:
    """What docs/results.md says of the two schedules: the same runs with one decay over the run and with one in each link."""
    table = []
    for stage in studies("decay-in-each-link"):
        over_run = read(replace(stage, variant="").folder / "results.jsonl")
        for name, of_method in stage.best().items():
            runs = {(one.seed, one.learning_rate): one.test for one in over_run if one.method == name}
            tests = [(runs.get((one.seed, one.learning_rate)), one.test) for one in of_method]
            pairs = [(run, link) for run, link in tests if run is not None and link is not None]
            run, link = (fmean(values) for values in zip(*pairs, strict=True))
            cells = [NAMES[name], str(len(pairs)), f"{run:.3f}", f"{link:.3f}", f"{link - run:+.3f}"]
            table.append([f"rank {stage.rank}, {stage.steps:,} steps", *cells])
    return table


def rows_of_one_base() -> list[list[str]]:
    """What docs/results.md says of the runs that began from the same weights."""
    return [
        [f"rank {stage.rank}, {stage.steps:,} steps", *short_cells(row, NAMES[row.method])]
        for stage in studies("one-base")
        for row in summarize(stage.best())
    ]


def rows_of_one_knot() -> list[list[str]]:
    """What docs/results.md says of one early knot: that chain and LoRA, on the same seeds."""
    table = []
    for stage in studies("knot-at-a-quarter"):
        one_knot = stage.best()
        seeds = {result.seed for result in one_knot["cola"]}
        both = {"lora": replace(stage, variant="").best()["lora"]} | one_knot
        same = {name: [result for result in results if result.seed in seeds] for name, results in both.items()}
        for row in summarize(same):
            table.append([f"rank {stage.rank}, {stage.steps:,} steps", *short_cells(row, NAMES[row.method])])
    return table


def draw(path: Path) -> None:
    """The validation loss over the steps, a panel for each study that has lines: ranks beside, lengths below each other.

    Full fine-tuning has no rank: it is in each panel of its length.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {(stage.rank, stage.steps): stage.best() for stage in studies()}
    full = {steps: {"full": results["full"]} for (_, steps), results in shown.items() if "full" in results}
    ranks, lengths = (sorted(set(values)) for values in zip(*shown, strict=True))
    figure = Figure(figsize=(6.0 * len(ranks), 3.5 * len(lengths) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    in_legend = {}
    for (rank, steps), results in shown.items():
        axes = figure.add_subplot(len(lengths), len(ranks), lengths.index(steps) * len(ranks) + ranks.index(rank) + 1)
        plot_curves(axes, results | full.get(steps, {}), skip=0.12, names=NAMES)
        axes.set_title(f"rank {rank}, {steps:,} steps")
        axes.set_xlabel("optimizer steps (dots: knots)")
        axes.set_ylabel("validation loss (nats per byte)")
        axes.spines[["top", "right"]].set_visible(False)
        in_legend |= {line.get_label(): line for line in axes.get_legend_handles_labels()[0]}
    labels = [label for label in [*NAMES.values(), "full fine-tuning, at its end"] if label in in_legend]
    lines = [in_legend[label] for label in labels]
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs what is missing, then draws the figure."""
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="only draw the figure")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the studies (default: %(default)s)")
    options = parser.parse_args()
    FOLDER = options.output
    if not options.figure:
        for stage in STAGES:
            run(stage.words)
    for row in [*rows(), *rows_of_scopes(), *rows_of_one_knot(), *rows_of_one_base()]:
        print(f"| {' | '.join(row)} |")
    draw(FOLDER.with_name(f"{FOLDER.name}.png"))


if __name__ == "__main__":
    main()
