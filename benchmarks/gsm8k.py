"""Does a chain pay on a real language model? SmolLM2-135M-Instruct on GSM8K, and on Zig, a language that it hardly knows.

    python -m benchmarks.gsm8k

runs ``cola compare`` on ``gsm8k.yaml`` on one CPU thread, and prints the tables. A line also has the loss of each test row, so
that two models can be compared row by row. All of it takes about 31 hours on one core. GSM8K's rows are
linked from ``$COLA_DATA_DIR/real``. Zig's are its standard library (MIT): ``pip install ziglang==0.13.0``.
"""

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from benchmarks import studies
from benchmarks.lines import Lines, Rows, grouped, main
from benchmarks.stages.measures import difference_of
from benchmarks.studies import Results, Study, best_of, results_of
from cola_lightning import COLACausalLM
from cola_lightning.cli import main as cola
from cola_lightning.cli.command_line import as_words
from cola_lightning.study.results import Result
from cola_lightning.study.table import shown_test, summarize

FILE = Path(__file__).with_suffix(".jsonl")
CONFIG = "benchmarks/gsm8k.yaml"
ROWS = studies.FOLDER / "rows"  # of each task, in a folder
TASKS = {"gsm8k": "GSM8K", "zig": "Zig"}
NAMES = {"lora": "LoRA", "cola-4": "4 links", "cola": "one early knot", "lora-sum-rank-4": "LoRA of rank {of_four}"}
NAMES |= {"share-5": "half merged at 4 knots"}
PIECE = 800  # characters of Zig in a row: about as many tokens as a row of GSM8K
Losses = Sequence[tuple[float, int]]  # each row's mean loss, and its number of tokens with loss


# ---------------------------------------------------------------------- the studies


@dataclass(frozen=True)
class Setting:
    """What all runs of a study share.

    Attributes:
        task: ``gsm8k`` or ``zig``.
        rank: of a link.
        steps: optimizer steps of a run.
        variant: of the config: ``no-clipping``, ``no-warm-up``, ``stable`` (the schedule of the learning rate), ``bf16``, which
            is twice as fast on a CPU with AMX, or ``stable-bf16``.
    """

    task: str
    rank: int
    steps: int
    variant: str = ""

    @property
    def name(self) -> str:
        """Of the study."""
        task = "" if self.task == "gsm8k" else self.task
        return "-".join(filter(None, (task, f"rank-{self.rank}", f"steps-{self.steps}", self.variant)))

    @property
    def of_fit(self) -> dict[str, Any]:
        """The options of each run."""
        options: dict[str, Any] = {"model.rank": self.rank, "model.alpha": 2 * self.rank, "trainer.max_steps": self.steps}
        options |= {"chain.at_steps": [round(self.steps / 4)], **of_task(self.task)}
        if self.variant == "no-clipping":
            options |= {"trainer.gradient_clip_val": None}
        if "stable" in self.variant:
            options |= {"model.lr_schedule": "stable"}
        if "bf16" in self.variant:
            options |= {"trainer.precision": "bf16-mixed"}
        if self.variant == "no-warm-up":
            options |= {"model.warmup_steps": 0, "model.knot_warmup_steps": 0}
        return options

    def study(self, rates: Mapping[str, list[float]], seeds: int) -> Study:
        """A call with the learning rates of each method, and so many seeds."""
        options = {"config": CONFIG, "methods": [*rates], "learning_rates": rates, "seeds": seeds, "tuning_seeds": 1}
        return Study(self.name, options, self.of_fit)


def of_task(task: str) -> dict[str, Any]:
    """The options of a task's rows."""
    return {"data.source": str(ROWS / task)} | ({"data.columns": {"text": "text"}} if task == "zig" else {})


# In the order of the table: the setting, the rates of each method, and the number of seeds.
LORA_3, FOUR_3, FOUR_10 = {"lora": [3e-3]}, {"cola-4": [3e-3]}, {"cola-4": [1e-2]}
CALLS: list[tuple[Setting, dict[str, list[float]], int]] = [
    (Setting("gsm8k", 8, 150), {"lora": [3e-3, 1e-3, 3e-4], "cola-4": [3e-3, 1e-2, 1e-3]}, 1),
    (Setting("gsm8k", 8, 150), {"cola": [3e-3], "lora-sum-rank-4": [3e-3, 1e-3]}, 1),
    (Setting("gsm8k", 8, 150, "no-clipping"), LORA_3, 1),
    (Setting("gsm8k", 8, 150, "no-warm-up"), LORA_3, 1),
    (Setting("gsm8k", 1, 150), {"lora": [3e-3, 1e-2, 1e-3], "cola-4": [3e-3, 1e-2, 1e-3]}, 1),
    (Setting("gsm8k", 1, 150), {"cola": [1e-2], "lora-sum-rank-4": [3e-3]}, 1),
    (Setting("gsm8k", 8, 300), LORA_3 | FOUR_3, 1),
    (Setting("gsm8k", 8, 300, "bf16"), LORA_3, 2),
    (Setting("gsm8k", 8, 300, "stable"), {"lora": [3e-3], "share-5": [3e-3]}, 1),
    (Setting("gsm8k", 8, 300, "stable-bf16"), {"share-5": [2e-3, 1.4e-3]}, 2),
    (Setting("gsm8k", 1, 300, "bf16"), {"lora": [1e-2, 6e-3, 4e-3]}, 1),
    (Setting("gsm8k", 1, 300, "bf16"), {"lora": [6e-3]}, 2),
    (Setting("gsm8k", 1, 300, "stable-bf16"), {"lora": [6e-3]}, 1),
    (Setting("gsm8k", 1, 300, "stable-bf16"), {"share-5": [1e-2, 6e-3]}, 2),
    (Setting("gsm8k", 1, 1200), {"lora": [1e-2]} | FOUR_10, 1),
    (Setting("zig", 8, 150), LORA_3 | FOUR_3 | {"lora-sum-rank-4": [3e-3]}, 1),
    (Setting("zig", 8, 150, "stable-bf16"), {"share-5": [3e-3], "lora": [3e-3]}, 1),
    (Setting("zig", 1, 150), {"lora": [1e-2]} | FOUR_10 | {"lora-sum-rank-4": [3e-3]}, 1),
]


# ---------------------------------------------------------------------- rows of data, and losses by row


def make_rows(task: str) -> None:
    """Links GSM8K's rows, or writes Zig's, if they are missing.

    Raises:
        SystemExit: if they cannot be found.
    """
    if task == "zig":
        if not (ROWS / task).exists():
            if (package := importlib.util.find_spec("ziglang")) is None or package.origin is None:
                raise SystemExit("needs pip install ziglang==0.13.0")
            write_zig(Path(package.origin).parent / "lib" / "std", ROWS / task)
        return
    for split in ("train", "test"):
        path = ROWS / task / f"{split}.jsonl"
        if not path.exists():
            there = Path(os.environ.get("COLA_DATA_DIR", "")) / "real" / f"gsm8k_{split}.jsonl"
            if not there.is_file():
                raise SystemExit(f"needs $COLA_DATA_DIR/real/gsm8k_{split}.jsonl, or openai/gsm8k (main) as {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(there.resolve())


def write_zig(library: Path, folder: Path) -> None:
    """Writes a library's files in pieces, as rows with a ``text``: every tenth file is for the test, the others train."""
    folder.mkdir(parents=True)
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


class COLACausalLMByRow(COLACausalLM):
    """Writes ``rows.json`` to the run's folder after a test: each row's mean loss and its number of tokens with loss.

    Rows come in the order of the test, which is the same for all runs of a study. It needs ``data.eval_batch_size: 1``,
    because a batch's loss is a mean over its tokens.
    """

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.rows: list[tuple[float, int]] = []

    @override
    def batch_metrics(self, batch: Any, output: Any) -> Any:
        if self.trainer.testing:
            if len(batch["labels"]) != 1:
                raise ValueError(f"data.eval_batch_size must be 1, got a batch of {len(batch['labels'])} rows")
            self.rows.append((float(output.loss), output.size))
        return super().batch_metrics(batch, output)

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        (Path(self.trainer.default_root_dir) / "rows.json").write_text(json.dumps(self.rows), encoding="utf-8")


def losses_by_row(folder: Path) -> dict[str, Losses]:
    """What a line says of the test rows."""
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return {"rows": [(round(loss, 5), size) for loss, size in rows]}


def run(lines: Lines) -> None:
    """Adds the lines of the model before training, and of the studies' runs."""
    for one in lines.missing({"study": "base", "task": task} for task in TASKS):
        make_rows(one["task"])
        folder = studies.FOLDER / FILE.stem / f"base-{one['task']}"
        if cola(["test", *as_words({"config": CONFIG, "trainer.default_root_dir": str(folder), **of_task(one["task"])})]) != 0:
            raise SystemExit(1)
        lines.add({**one, **losses_by_row(folder)})
    for task in TASKS:
        make_rows(task)
    studies.run(lines, (setting.study(rates, seeds) for setting, rates, seeds in CALLS), losses_by_row)


# ---------------------------------------------------------------------- the tables


def difference(ours: Sequence[Losses], theirs: Sequence[Losses]) -> tuple[float, float, float]:
    """The mean difference of the loss per token, and its interval of 95 % over the rows and the seeds.

    Args:
        ours: the rows of a model, for each seed.
        theirs: those of the other model, for the same seeds.
    """
    tokens = np.array([[size for _, size in ours[0]]], dtype=float)
    if any([size for _, size in rows] != tokens[0].tolist() for rows in [*ours, *theirs]):
        raise ValueError("the models have scored different rows")
    mine, other = (
        [np.array([[loss for loss, _ in rows]]) * tokens / tokens.sum() for rows in seeds] for seeds in (ours, theirs)
    )
    return difference_of(mine, other, list(tokens))


COLUMNS = ("GSM8K, Zig", "method", "rate", "seeds", "test loss", "to LoRA")


def rows(results: Results) -> Rows:
    """The model before training, and for each study a row for each method at its best rate."""
    table = []
    for line in results:
        if line["study"] == "base":
            total = sum(size for _, size in line["rows"])
            mean = sum(loss * size for loss, size in line["rows"]) / total
            table.append([TASKS[line["task"]], "before training", "", "", f"{mean:.4f}", ""])
    for setting in dict.fromkeys(setting for setting, *_ in CALLS):
        for chosen, gap in compared(results, setting):
            (summary,) = summarize({"method": chosen})
            rates = sorted({one.learning_rate for one in results_of(results, setting.name) if one.method == chosen[0].method})
            best = chosen[0].learning_rate
            table.append(
                [
                    f"{TASKS[setting.task]}, rank {setting.rank}, {setting.steps:,} steps",
                    name_in(setting, chosen[0].method),
                    ", ".join(f"**{rate:g}**" if rate == best and len(rates) > 1 else f"{rate:g}" for rate in rates),
                    str(len(summary.runs)) if len(summary.runs) > 1 else "",
                    shown_test(summary),
                    "{:+.4f} [{:+.4f}, {:+.4f}]".format(*gap) if gap else "",
                ]
            )
    return grouped(table)


def name_in(setting: Setting, method: str) -> str:
    """What a method is called in a study."""
    name = NAMES[method].format(of_four=4 * setting.rank)
    return name + (f", {setting.variant.replace('-', ' ', 1)}" if setting.variant else "")


def compared(results: Results, setting: Setting) -> Iterator[tuple[list[Result], tuple[float, float, float] | None]]:
    """The results of each method at its best rate, and the difference to LoRA's under its better schedule.

    Only the seeds that both have are compared.
    """
    best = best_of(results, setting.name)
    under_cosine = replace(setting, variant=setting.variant.replace("stable", "").strip("-"))
    of_lora = [
        (of_method, one.name)
        for one in dict.fromkeys([setting, under_cosine])
        if (of_method := best_of(results, one.name).get("lora"))
    ]
    lora, of_study = min(of_lora, key=lambda found: found[0][0].value("min"), default=([], setting.name))
    losses = {
        (line["study"], line["method"], line["learning_rate"], line["seed"]): line["rows"]
        for line in results
        if line["study"] in (setting.name, of_study)
    }
    for of_method in (best[method] for method in NAMES if method in best):
        pairs = [
            (losses[setting.name, *one.key], losses[of_study, *other.key])
            for one in of_method
            for other in lora
            if one != other and one.seed == other.seed and None not in (one.test, other.test)
        ]
        yield of_method, difference(*zip(*pairs, strict=True)) if pairs else None


RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def rows_of_rates(results: Results) -> Rows:
    """The test loss of LoRA on GSM8K in 150 steps: a row for each rank, a column for each learning rate."""
    lines = [line for line in results if line["study"] in ("rank-1-steps-150", "rank-8-steps-150")]
    loras = [line for line in lines if line["method"].startswith("lora")]
    found = {(line["rank"], line["learning_rate"]): f"{line['test']:.4f}" for line in loras}
    return [[str(rank), *(found.get((rank, rate), "") for rate in RATES)] for rank in (1, 4, 8, 32)]


if __name__ == "__main__":
    main(__doc__, FILE, run, [(COLUMNS, rows), (("rank", "3e-4", "1e-3", "3e-3", "1e-2"), rows_of_rates)])
