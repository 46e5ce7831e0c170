"""Does a chain pay on a real language model? SmolLM2-135M-Instruct on GSM8K, and on Zig, a language that it hardly knows.

    python -m benchmarks.gsm8k.study

runs ``cola compare`` on ``config.yaml``, stage after stage, on one CPU thread, from the repository's root. Each study is a
folder here, with a line for each run in ``results.jsonl`` and its losses by row in ``rows.jsonl``. A second call does what is
missing: a run that has its line is not repeated. All of it takes about 21,000 steps, of 4 to 12 seconds on one core.
GSM8K's rows are linked from ``$COLA_DATA_DIR/real``. Zig's are its standard library (MIT): ``pip install ziglang==0.13.0``.

    python -m benchmarks.gsm8k.study --only rank-8-steps-150

runs that study alone.

    python -m benchmarks.gsm8k.study --tables

trains nothing: it collects the losses by row of finished runs, and from the lines that are there it prints the table of
benchmarks/README.md and draws ``differences.png``.
"""

import argparse
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.studies import compare, grouped, run
from cola_lightning.study.config import as_words
from cola_lightning.study.figures import COLORS
from cola_lightning.study.results import Result, RunKey, at_best_rates, best_rates, read
from cola_lightning.study.table import shown_test, summarize

HERE = Path(os.path.relpath(Path(__file__).parent))
CONFIG = HERE / "config.yaml"
TASKS = {"gsm8k": "GSM8K", "zig": "Zig"}
OF_TASK: dict[str, dict[str, str]] = {"gsm8k": {}, "zig": {"data.source": str(HERE / "zig"), "data.columns": "{text: text}"}}
NAMES = {"lora": "LoRA", "cola-4": "4 links", "cola": "one early knot", "lora-sum-rank-4": "LoRA of rank {of_four}"}
STABLE_NAMES = {"lora": "LoRA", "share-5": "half merged at 4 knots"}  # under the stable schedule
RATES = [3e-3, 1e-2, 1e-3]
SHORT, STEPS, LONG = 150, 300, 1200
ANSWERED = 100  # rows whose answers are generated
PIECE = 800  # characters of Zig in a row: about as many tokens as a row of GSM8K
Rows = Sequence[tuple[float, int]]  # each row's mean loss, and its number of tokens with loss


@dataclass(frozen=True)
class Stage:
    """A call of ``cola compare``. Several go on with one study, so that the most telling runs come first.

    Attributes:
        task: ``gsm8k`` or ``zig``.
        rank: of a link.
        steps: optimizer steps of a run.
        rates: the learning rates of each method.
        seeds: how many.
        variant: of the config: ``no-clipping``, ``no-warm-up``, ``stable`` (the schedule of the learning rate), ``bf16``, which
            is twice as fast on a CPU with AMX, or ``stable-bf16``.
    """

    task: str
    rank: int
    steps: int
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict, hash=False)
    seeds: int = 1
    variant: str = ""

    @property
    def folder(self) -> Path:
        """Of the study."""
        task = "" if self.task == "gsm8k" else self.task
        return HERE / "-".join(filter(None, (task, f"rank-{self.rank}", f"steps-{self.steps}", self.variant)))

    @property
    def words(self) -> list[str]:
        """What follows ``cola``."""
        rates = ", ".join(f"{name}: [{', '.join(f'{rate:g}' for rate in of_method)}]" for name, of_method in self.rates.items())
        options: dict[str, object] = {
            "config": str(CONFIG),
            "output": str(self.folder),
            "methods": f"[{', '.join(self.rates)}]",
        }
        options |= {"seeds": self.seeds, "tuning_seeds": 1, "keep_checkpoints": True, "learning_rates": f"{{{rates}}}"}
        of_fit: dict[str, object] = {"model.rank": self.rank, "model.alpha": 2 * self.rank, "trainer.max_steps": self.steps}
        of_fit |= {"chain.at_steps": f"[{round(self.steps / 4)}]"}
        of_fit |= OF_TASK[self.task]
        if self.variant == "no-clipping":
            of_fit |= {"trainer.gradient_clip_val": "null"}
        if "stable" in self.variant:
            of_fit |= {"model.lr_schedule": "stable"}
        if "bf16" in self.variant:
            of_fit |= {"trainer.precision": "bf16-mixed"}
        if self.variant == "no-warm-up":
            of_fit |= {"model.warmup_steps": 0, "model.knot_warmup_steps": 0}
        return compare(options, of_fit)

    @property
    def results(self) -> list[Result]:
        """The lines that are there."""
        return read(self.folder / "results.jsonl")


# ---------------------------------------------------------------------- the order of the runs


def stages() -> Iterator[Stage]:
    """The calls, in the order of their use; rates come from the lines of the calls before them."""
    for rank in (8, 1):
        yield Stage("gsm8k", rank, SHORT, dict.fromkeys(NAMES, RATES))
    for rank in (8, 1):
        yield Stage("zig", rank, SHORT, _tuned(rank, NAMES))
    for rank in (8, 1):
        for variant in ("no-clipping", "no-warm-up"):
            yield Stage("gsm8k", rank, SHORT, _tuned(rank, ["lora"]), variant=variant)
    for task in ("gsm8k", "zig"):
        for rank in (8, 1):
            yield Stage(task, rank, STEPS, _tuned(rank, NAMES))
    yield Stage("gsm8k", 8, STEPS, {name: [3e-3] for name in STABLE_NAMES}, variant="stable")
    for rank, of_lora, of_stable in (
        (8, [3e-3, 2e-3], {"share-5": [2e-3, 1.4e-3], "lora": [3e-3]}),
        (1, [1e-2, 6e-3, 4e-3], {"share-5": [1e-2, 6e-3], "lora": [6e-3]}),
    ):
        yield Stage("gsm8k", rank, STEPS, {"lora": of_lora}, seeds=2, variant="bf16")
        yield Stage("gsm8k", rank, STEPS, of_stable, seeds=2, variant="stable-bf16")
    yield Stage("zig", 8, SHORT, {name: [3e-3, 6e-3] for name in STABLE_NAMES}, variant="stable-bf16")
    yield Stage("zig", 8, SHORT, {"lora": [3e-3, 6e-3]}, variant="bf16")
    yield Stage("gsm8k", 1, LONG, _tuned(1, ["lora", "cola-4"]))
    for rank in (8, 1):
        yield Stage("gsm8k", rank, STEPS, _tuned(rank, ["lora", "cola-4", "cola"]), seeds=2)


def _tuned(rank: int, methods: Iterable[str]) -> dict[str, list[float]]:
    """Each method at its best rate on GSM8K."""
    best = best_rates(Stage("gsm8k", rank, SHORT).results, "min", [0])
    return {method: [best[method]] for method in methods}


# ---------------------------------------------------------------------- rows of data


def make_rows(task: str) -> None:
    """Links GSM8K's rows, or writes Zig's, if they are missing.

    Raises:
        SystemExit: if they cannot be found.
    """
    if task == "zig":
        if not (HERE / "zig").exists():
            if (package := importlib.util.find_spec("ziglang")) is None or package.origin is None:
                raise SystemExit("needs pip install ziglang==0.13.0")
            write_zig(Path(package.origin).parent / "lib" / "std", HERE / "zig")
        return
    for split in ("train", "test"):
        path = HERE / "rows" / f"{split}.jsonl"
        if not path.exists():
            there = Path(os.environ.get("COLA_DATA_DIR", "")) / "real" / f"gsm8k_{split}.jsonl"
            if not there.is_file():
                raise SystemExit(f"needs $COLA_DATA_DIR/real/gsm8k_{split}.jsonl, or openai/gsm8k (main) as {path}")
            path.parent.mkdir(exist_ok=True)
            path.symlink_to(there.resolve())


def write_zig(library: Path, folder: Path) -> None:
    """Writes a library's files in pieces, as rows with a ``text``: every tenth file is for the test, the others train."""
    folder.mkdir()
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for place, path in enumerate(sorted(library.glob("*.zig"))):
        rows["test" if place % 10 == 9 else "train"] += pieces(path.read_text(encoding="utf-8"), PIECE)
    for split, texts in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def pieces(text: str, size: int) -> list[str]:
    """Cuts a text at the ends of lines into pieces of at least ``size`` characters; what is left at its end is dropped."""
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            found.append(piece)
            piece = ""
    return found


# ---------------------------------------------------------------------- what there is besides the runs' lines


def measure_base(task: str) -> None:
    """Appends the losses by row of the model before training to ``base.jsonl``, once for each task."""
    path, folder = HERE / "base.jsonl", HERE / "runs" / f"base-{task}"
    if task not in {line["task"] for line in _lines(path)}:
        run(["test", *as_words({"config": str(CONFIG), "trainer.default_root_dir": str(folder)} | OF_TASK[task])])
        _append(path, {"task": task, "rows": _losses(folder)})


def _losses(folder: Path) -> Rows:
    return [(round(loss, 5), size) for loss, size in json.loads((folder / "rows.json").read_text(encoding="utf-8"))]


def collect_losses(stage: Stage) -> None:
    """Appends the losses by row of finished runs to the study's ``rows.jsonl``."""
    known = by_run(stage.folder / "rows.jsonl")
    for path in sorted(stage.folder.glob("runs/*/result.json")):
        (result,) = read(path)
        if result.key not in known and result.test is not None:  # it did not diverge
            _append(stage.folder / "rows.jsonl", {"run": result.key, "rows": _losses(path.parent)})


def answer(stage: Stage) -> None:
    """Has finished models answer questions, greedily, and appends how many answers are right to ``answers.jsonl``."""
    known = by_run(stage.folder / "answers.jsonl")
    for path in sorted(stage.folder.glob("runs/*/checkpoints/last.ckpt")):
        folder = path.parent.parent
        result = next(iter(read(folder / "result.json")), None)
        if result is not None and result.key not in known:
            of_run = {"config": str(folder / "config.yaml"), "ckpt_path": str(path)}
            run(["predict", *as_words(of_run | {"data.test_size": ANSWERED, "data.eval_batch_size": 20})])
            right = [is_right(**one) for one in _lines(folder / "predictions.jsonl")]
            _append(stage.folder / "answers.jsonl", {"run": result.key, "right": sum(right), "rows": len(right)})


def is_right(prediction: str, target: str, **other: object) -> bool:
    """Whether a generated solution states the number of the given one after ``####``."""
    generated, given = (re.findall(r"####\s*(-?[\d.,]*\d)", text) for text in (prediction, target))
    return bool(generated) and generated[0].replace(",", "") == given[0].replace(",", "")


def by_run(path: Path) -> dict[RunKey, dict[str, Any]]:
    """The lines of a file, by their run; empty if there is no file."""
    return {RunKey(*line["run"]): line for line in _lines(path)}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _append(path: Path, line: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------- the table


def difference_of(ours: Sequence[Rows], theirs: Sequence[Rows]) -> tuple[float, float, float]:
    """The mean difference of the loss per token, and its interval of 95 %, over the rows and over the seeds.

    Both models score the same rows, so what makes a row hard for both cancels. The variance of the mean over rows and, of
    several seeds, that over seeds are added; the interval is Student's, with the degrees of freedom of Welch and Satterthwaite.
    Of one seed, it does not contain how much a difference varies from seed to seed.

    Args:
        ours: the rows of a model, for each seed.
        theirs: those of the other model, for the same seeds.

    Returns:
        The difference, and the interval's lower and upper end; of a ratio of sums, because rows have different lengths.
    """
    sizes = np.array([size for _, size in ours[0]])
    if any([size for _, size in rows] != sizes.tolist() for rows in [*ours, *theirs]):
        raise ValueError("the models have scored different rows")
    mine, other = (np.array([[loss for loss, _ in rows] for rows in seeds]) for seeds in (ours, theirs))
    gaps, shares = mine - other, sizes / sizes.sum()  # seeds x rows; rows
    n_seeds, n_rows = gaps.shape
    of_seeds = gaps @ shares
    mean = of_seeds.mean()
    of_rows = ((shares * (gaps.mean(0) - mean)) ** 2).sum() * n_rows / (n_rows - 1)
    variances = [(of_rows, n_rows - 1)]
    if n_seeds > 1:
        variances.append((of_seeds.var(ddof=1) / n_seeds, n_seeds - 1))
    total = sum(variance for variance, _ in variances)
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances) if total else math.inf
    margin = math.sqrt(total) * stats.t.ppf(0.975, freedom)
    return float(mean), float(mean - margin), float(mean + margin)


HEAD = ["GSM8K, Zig", "method", "rate", "seeds", "test loss", "to LoRA"]


def table() -> list[list[str]]:
    """The head, the model before training, and, for each study that has lines, a row for each method at its best rate.

    A column that is empty is left out.
    """
    found = []
    for line in _lines(HERE / "base.jsonl"):
        total = sum(size for _, size in line["rows"])
        mean = sum(loss * size for loss, size in line["rows"]) / total
        found.append([TASKS[line["task"]], "before training", "", "", f"{mean:.4f}", ""])
    found = grouped(found + [row for stage in studies() for row in rows_of(stage)])
    kept = [place for place in range(len(HEAD)) if any(row[place] for row in found)]
    return [[row[place] for place in kept] for row in [HEAD, *found]]


def studies() -> list[Stage]:
    """The studies that have lines, short ones first."""
    found = []
    for path in HERE.glob("*rank-*/results.jsonl"):
        name = re.fullmatch(r"(\w*?)-?rank-(\d+)-steps-(\d+)-?(.*)", path.parent.name)
        assert name is not None
        found.append(Stage(name[1] or "gsm8k", int(name[2]), int(name[3]), variant=name[4]))
    return sorted(found, key=lambda stage: (stage.task, stage.steps, -stage.rank, stage.variant))


def rows_of(stage: Stage) -> list[list[str]]:
    """A study's rows of the table."""
    answers = by_run(stage.folder / "answers.jsonl")
    table = []
    for results, difference in compared(stage):
        (summary,) = summarize({"method": results})
        right = [f"; {line['right']}/{line['rows']} right" for result in results if (line := answers.get(result.key))]
        table.append([
            title(stage),
            name_in(stage, results[0].method),
            rates_of(stage, results[0]),
            str(summary.seeds) if summary.seeds > 1 else "",
            shown_test(summary) + "".join(right),
            "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference) if difference else "",
        ])  # fmt: skip
    return table


def rates_of(stage: Stage, chosen: Result) -> str:
    """The learning rates that a method was run at, with that of a result marked."""
    rates = sorted({result.learning_rate for result in stage.results if result.method == chosen.method})
    return ", ".join(f"**{rate:g}**" if rate == chosen.learning_rate and len(rates) > 1 else f"{rate:g}" for rate in rates)


def title(stage: Stage) -> str:
    """What a study's rows are called."""
    return f"{TASKS[stage.task]}, rank {stage.rank}, {stage.steps:,} steps"


def name_in(stage: Stage, method: str) -> str:
    """What a method is called in a study."""
    name = (NAMES | STABLE_NAMES)[method].format(of_four=4 * stage.rank)
    return name + (f", {stage.variant.replace('-', ' ', 1)}" if stage.variant else "")


def compared(stage: Stage) -> Iterator[tuple[list[Result], tuple[float, float, float] | None]]:
    """The results of each method at its best rate, and the difference to LoRA's under its better schedule.

    Only the seeds that both have are compared.
    """
    best = at_best_rates(stage.results, "min", [0])
    under_cosine = replace(stage, variant=stage.variant.replace("stable", "").strip("-"))
    of_lora = [
        (results, one)
        for one in dict.fromkeys([stage, under_cosine])
        if (results := at_best_rates(one.results, "min", [0]).get("lora"))
    ]
    lora, of_stage = min(of_lora, key=lambda found: found[0][0].value("min"), default=([], stage))
    mine, theirs = (by_run(one.folder / "rows.jsonl") for one in (stage, of_stage))
    for results in (best[method] for method in NAMES | STABLE_NAMES if method in best):
        pairs = [(mine[one.key]["rows"], theirs[other.key]["rows"]) for one in results for other in lora if is_pair(one, other)]
        yield results, difference_of(*zip(*pairs, strict=True)) if pairs else None


def is_pair(one: Result, lora: Result) -> bool:
    """Whether a result can be compared with LoRA's row by row."""
    return one != lora and one.seed == lora.seed and None not in (one.test, lora.test)


def draw(path: Path) -> None:
    """Plots each difference to LoRA, with its interval."""
    found = [
        (f"{title(stage)}: {name_in(stage, results[0].method)}", difference)
        for stage in studies()
        for results, difference in compared(stage)
        if difference is not None
    ]
    figure = Figure(figsize=(9, 0.8 + 0.26 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, (mean, low, high)) in enumerate(found):
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=COLORS[0], markersize=4, capsize=3)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("test loss minus LoRA's (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="train nothing: only print the table")
    parser.add_argument("--only", help="the folder name of a study, to run it alone")
    options = parser.parse_args()
    for stage in () if options.tables else stages():
        if options.only in (None, stage.folder.name):
            make_rows(stage.task)
            measure_base(stage.task)
            run(stage.words)
            if stage.task == "gsm8k" and stage.steps >= STEPS:
                answer(stage)
    for stage in studies():
        collect_losses(stage)
    draw(HERE / "differences.png")
    head, *rows = table()
    for row in [head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
