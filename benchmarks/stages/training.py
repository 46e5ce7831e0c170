"""One run: the stages of an arm, one after another, and what each of them did to all tasks."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.stages.arms import ARMS, Arm
from benchmarks.stages.sequence import Data, Row, Run, TaskSequence
from cola_lightning import AdaptedModel
from cola_lightning.seeding import derive_seed


def drawn(rows: Sequence[Row], n: int, *seeds: object) -> list[Row]:
    """The first n rows in random order; all of them before one of them comes again."""
    generator = torch.Generator().manual_seed(derive_seed(*seeds))
    order = [row for _ in range(math.ceil(n / len(rows))) for row in torch.randperm(len(rows), generator=generator).tolist()]
    return [rows[k] for k in order[:n]]


def rows_of_stages(sequence: TaskSequence, arm: Arm, data: Data, tasks: Sequence[str], seed: int) -> list[list[Row]]:
    """The rows that each stage trains on, in order. A task's own rows depend on the seed alone, not on the arm or the order."""
    n = sequence.steps * sequence.batch_size
    of_task = {task: drawn(data[task]["train"], n, seed, task) for task in tasks}
    if arm.together:
        return [[row for rows in zip(*of_task.values(), strict=True) for row in rows]]
    stages = []
    for k, task in enumerate(tasks):
        again = [row for earlier in tasks[:k] for row in of_task[earlier][: round(arm.replay * n)]]
        rows = [*of_task[task][: n - len(again)], *again]
        stages.append(drawn(rows, n, seed, task, "replay") if again else rows)
    return stages


@torch.no_grad()
def evaluate(sequence: TaskSequence, model: Any, data: Data, split: str) -> dict[str, list[list[float]]]:
    """Each score of each row, for each task."""
    found = dict[str, list[list[float]]]()
    for task in sequence.tasks:
        rows = data[task][split]
        by_length = sorted(range(len(rows)), key=lambda k: sequence.length(rows[k]))
        batches = list[dict[str, Tensor]]()
        for start in range(0, len(rows), sequence.eval_batch_size):
            places = by_length[start : start + sequence.eval_batch_size]
            batches.append(sequence.row_scores(model, [rows[k] for k in places]))
        back = torch.tensor(by_length).argsort()
        for name in batches[0]:
            values = torch.cat([batch[name] for batch in batches])[back].tolist()
            found.setdefault(name, []).append([round(value, sequence.decimals) for value in values])
    return found


def validation_losses(sequence: TaskSequence, model: Any, data: Data) -> list[float]:
    """The loss per prediction on each task's rows for validation."""
    sums = evaluate(sequence, model, data, "validation")["loss"]
    sizes = [sum(sequence.sizes(data[task]["validation"])) for task in sequence.tasks]
    return [round(sum(of_rows) / size, 5) for of_rows, size in zip(sums, sizes, strict=True)]


def matrices(states: Sequence[dict[str, list[list[float]]]]) -> dict[str, Any]:
    """What a line has of several states of a model: ``matrix``, the losses of all rows, and the means of the other scores."""
    others = [name for name in states[0] if name != "loss"]
    means = {name: [[round(sum(of) / len(of), 4) for of in state[name]] for state in states] for name in others}
    return {"matrix": [state["loss"] for state in states]} | means


def overlap(adapted: AdaptedModel) -> Tensor:
    """O-LoRA's penalty: the sum of the squared products of the current link's rows of A with those of the finished links.

    Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning" (arXiv 2310.14152), equation 8.
    """
    total = torch.zeros(())
    for name, layer in adapted.layers.items():
        for lora_A, _, _ in adapted.chain.link_factors(name):
            total = total + (lora_A @ layer.lora_A.T).square().sum()
    return total


def train_stage(
    sequence: TaskSequence, adapted: AdaptedModel, rows: Sequence[Row], rate: float, orthogonality: float = 0.0
) -> list[float]:
    """Trains the current link on the rows, in this order, with an optimizer of its own, and returns the loss of each step.

    The learning rate decays linearly over the stage.
    """
    size = sequence.batch_size
    optimizer, steps, losses = torch.optim.AdamW(adapted.trained_parameters(), lr=rate), len(rows) // size, list[float]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = rows[step * size : (step + 1) * size]
        loss = sequence.row_scores(adapted.model, batch)["loss"].sum() / sum(sequence.sizes(batch))
        losses.append(loss.item())
        if orthogonality:
            loss = loss + orthogonality * overlap(adapted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train(sequence: TaskSequence, run: Run, data: Data) -> dict[str, Any]:
    """Trains one run, stores its chain, and returns its losses.

    Returns:
        the :func:`matrices` after each stage (or once, where the end alone means something);
        ``validation``: the losses per prediction at the end; and ``seconds``.
    """
    arm, tasks, start = ARMS[run["arm"]], sequence.orders[run["order"]], time.perf_counter()
    adapted, names = sequence.adapted_model(run["seed"]), list(sequence.tasks)
    states, validation = list[dict[str, list[list[float]]]](), list[float]()
    for stage, rows in enumerate(rows_of_stages(sequence, arm, data, tasks, run["seed"])):
        if arm.alone:
            adapted.begin_link(sequence.rank, sequence.alpha)  # in place of the link of the task before
        train_stage(sequence, adapted, rows, run["rate"], arm.orthogonality)
        states.append(evaluate(sequence, adapted.model, data, "test"))
        if arm.alone:
            validation.append(validation_losses(sequence, adapted.model, data)[names.index(tasks[stage])])
        else:
            adapted.current.name = "all" if arm.together else tasks[stage]
            adapted.tie_knot(knot=arm.knot)
        sums = [round(sum(losses)) for losses in states[-1]["loss"]]
        print(run, stage, sums, round(time.perf_counter() - start), flush=True)
    if arm.alone:
        own = [(states[tasks.index(task)], k) for k, task in enumerate(names)]
        states = [{name: [state[name][k] for state, k in own] for name in states[0]}]
        validation = [validation[tasks.index(task)] for task in names]
    else:
        validation = validation_losses(sequence, adapted.model, data)
        adapted.chain.save(sequence.chain_folder(run), overwrite=True)
    return matrices(states) | {"validation": validation, "seconds": round(time.perf_counter() - start)}
