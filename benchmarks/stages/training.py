"""One run: the stages of an arm, one after another, and what each of them did to all tasks."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

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
def evaluate(
    sequence: TaskSequence, model: Any, data: Data, split: str, tasks: Collection[str] = (), n: int | None = None
) -> dict[str, list[list[float]]]:
    """Each score of each row, for each task.

    Args:
        sequence: the tasks.
        model: what scores the rows.
        data: the rows.
        split: which of them.
        tasks: the tasks that are scored; the others get no values. Empty: all.
        n: how many rows of each task, from the first; None: all.
    """
    found = dict[str, list[list[float]]]()
    for k, task in enumerate(sequence.tasks):
        rows = data[task][split][:n] if not tasks or task in tasks else []
        by_length = sorted(range(len(rows)), key=lambda place: sequence.length(rows[place]))
        batches = list[dict[str, Tensor]]()
        for start in range(0, len(rows), sequence.eval_batch_size):
            places = by_length[start : start + sequence.eval_batch_size]
            batches.append(sequence.row_scores(model, [rows[place] for place in places]))
        back = torch.tensor(by_length).argsort()
        for name in batches[0] if batches else ():
            values = torch.cat([batch[name] for batch in batches])[back].tolist()
            found.setdefault(name, [[] for _ in sequence.tasks])[k] = [round(value, sequence.decimals) for value in values]
    return found


def validation_scores(sequence: TaskSequence, model: Any, data: Data) -> dict[str, list[float]]:
    """On each task's rows for validation: the loss per prediction, and the means of the other scores."""
    scores = evaluate(sequence, model, data, "validation")
    sizes = [sum(sequence.sizes(data[task]["validation"])) for task in sequence.tasks]
    numbers = {name: sizes if name == "loss" else [len(of_rows) for of_rows in values] for name, values in scores.items()}
    return {
        name: [round(sum(of_rows) / n, 5) for of_rows, n in zip(values, numbers[name], strict=True)]
        for name, values in scores.items()
    }


def matrices(sequence: TaskSequence, states: Sequence[dict[str, list[list[float]]]]) -> dict[str, Any]:
    """What a line has of several states of a model: ``matrix``, the score of all rows, and the means of the other scores.

    The score of a task that was not scored is empty, and its mean null.
    """
    others = [name for name in states[0] if name != sequence.score]
    means = {name: [[round(sum(of) / len(of), 4) if of else None for of in state[name]] for state in states] for name in others}
    is_right = sequence.score == "accuracy"
    matrix = [[as_bits(of) if is_right else of for of in state[sequence.score]] for state in states]
    return {"matrix": matrix} | means


def as_bits(values: Sequence[float]) -> str:
    """Zeros and ones as their number and hexadecimal digits.

    Example:
        >>> as_bits([1, 0, 1, 1, 0])
        '5:16'
    """
    return f"{len(values)}:{int('0' + ''.join(str(int(value)) for value in values), 2):x}"


def of_bits(text: str) -> list[float]:
    """The zeros and ones of :func:`as_bits`.

    Example:
        >>> of_bits("5:16")
        [1.0, 0.0, 1.0, 1.0, 0.0]
    """
    n, digits = text.split(":")
    return [float(digit) for digit in f"{int(digits, 16):0{n}b}"] if int(n) else []


def penalty(adapted: AdaptedModel, kind: Literal["released", "written"], weight: float, norms: float) -> Tensor:
    """O-LoRA's penalty: how far the current link's rows of A are from orthogonal to those of the finished links.

    Args:
        adapted: the model.
        kind: ``written`` sums the squared products, as in equation 8 of the paper. ``released`` sums their absolute values, as
            the code does, and adds the norms of the current link's factors.
        weight: of the products.
        norms: the weight of the norms.

    Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning" (arXiv 2310.14152), and
    cmnfriend/O-LoRA at commit 07117e1, src/uie_trainer_lora.py.
    """
    total = torch.zeros(())
    for name, layer in adapted.layers.items():
        for lora_A, _, _ in adapted.chain.link_factors(name):
            products = lora_A @ layer.lora_A.T
            total = total + weight * (products.square() if kind == "written" else products.abs()).sum()
        if norms:
            total = total + norms * (layer.lora_A.norm() + layer.lora_B.norm())
    return total


class SLAO:
    """One LoRA whose model after each stage has the stage's A, and a mean of the stages' B, in which later ones weigh less.

    Stage i trains on from the factors of stage i - 1, as that stage's training left them: A from an orthonormal basis of its
    rows, B as it is. After it, the B of the model goes towards the trained B by 1 / sqrt(i).

    Source: Qiao and Mahdavi, "Merge before Forget" (arXiv 2512.23017).
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.layers, self.n_stages = adapted.layers, 0
        self.trained, self.merged_B = dict[str, tuple[Tensor, Tensor]](), dict[str, Tensor]()

    @torch.no_grad()
    def begin(self) -> None:
        """Sets the factors with which the next stage begins; those of the first are as drawn."""
        for name, (lora_A, lora_B) in self.trained.items():
            basis, upper = torch.linalg.qr(lora_A.T)
            self.layers[name].lora_A.copy_((basis * upper.diagonal().sign()).T)  # the basis that is nearest in its signs
            self.layers[name].lora_B.copy_(lora_B)

    @torch.no_grad()
    def end(self) -> None:
        """Puts the merged B into the model."""
        self.n_stages += 1
        for name, layer in self.layers.items():
            self.trained[name] = layer.lora_A.clone(), layer.lora_B.clone()
            before = self.merged_B.get(name, torch.zeros_like(layer.lora_B))
            self.merged_B[name] = torch.lerp(before, layer.lora_B, 1 / math.sqrt(self.n_stages)).clone()
            layer.lora_B.copy_(self.merged_B[name])


def train_stage(
    sequence: TaskSequence,
    adapted: AdaptedModel,
    rows: Sequence[Row],
    rate: float,
    extra: Callable[[AdaptedModel], Tensor] | None = None,
) -> list[float]:
    """Trains the current link on the rows, in this order, with an optimizer of its own, and returns the loss of each step.

    The learning rate decays linearly over the stage. ``extra`` is added to the loss.
    """
    size = sequence.batch_size
    optimizer, steps, losses = torch.optim.AdamW(adapted.trained_parameters(), lr=rate), len(rows) // size, list[float]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = rows[step * size : (step + 1) * size]
        loss = sequence.row_scores(adapted.model, batch)["loss"].sum() / sum(sequence.sizes(batch))
        losses.append(loss.item())
        if extra is not None:
            loss = loss + extra(adapted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train(sequence: TaskSequence, run: Run, data: Data) -> dict[str, Any]:
    """Trains one run, stores its chain, and returns its scores.

    Returns:
        the :func:`matrices` after each stage (or once, where the end alone means something), each of the tasks so far;
        ``validation``: the score that counts at the end, and ``validation_loss``, if that is another one; and ``seconds``.
    """
    arm, tasks, start = ARMS[run["arm"]], sequence.orders[run["order"]], time.perf_counter()
    adapted, names = sequence.adapted_model(run["seed"]), list(sequence.tasks)
    states, validations = list[dict[str, list[list[float]]]](), list[dict[str, list[float]]]()
    slao = SLAO(adapted) if arm.is_slao else None
    extra = None
    if arm.penalty is not None:
        extra = partial(penalty, kind=arm.penalty, weight=run["weight"], norms=run["norms"])
    stages = rows_of_stages(sequence, arm, data, tasks, run["seed"])
    for stage, rows in enumerate(stages):
        if arm.alone:
            adapted.begin_link(sequence.rank, sequence.alpha)  # in place of the link of the task before
        if slao is not None:
            slao.begin()
        train_stage(sequence, adapted, rows, run["rate"], extra)
        if slao is not None:
            slao.end()
        is_last = stage == len(stages) - 1
        if arm.alone:
            states.append(evaluate(sequence, adapted.model, data, "test", [tasks[stage]]))
            validations.append(validation_scores(sequence, adapted.model, data))
        else:
            seen = () if is_last else tasks[: stage + 1]
            states.append(evaluate(sequence, adapted.model, data, "test", seen, None if is_last else sequence.n_between))
            adapted.current.name = "all" if arm.together else tasks[stage]
            adapted.tie_knot(knot=arm.knot)
    if arm.alone:
        own = [tasks.index(task) for task in names]
        states = [{name: [states[stage][name][k] for k, stage in enumerate(own)] for name in states[0]}]
        scores = {name: [validations[stage][name][k] for k, stage in enumerate(own)] for name in validations[0]}
    else:
        scores = validation_scores(sequence, adapted.model, data)
        adapted.chain.save(sequence.chain_folder(run), overwrite=True)
    return matrices(sequence, states) | of_validation(sequence, scores) | {"seconds": round(time.perf_counter() - start)}


def of_validation(sequence: TaskSequence, scores: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """What a line has of the :func:`validation_scores`."""
    return {"validation": scores[sequence.score]} | ({} if sequence.score == "loss" else {"validation_loss": scores["loss"]})
