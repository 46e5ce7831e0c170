"""A factor for each stage of a finished run: fitted afterwards on the rows for validation, or the same for all."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.stages.arms import ARMS
from benchmarks.stages.sequence import Data, Run, TaskSequence
from benchmarks.stages.training import evaluate, matrices, of_validation, train, validation_scores
from cola_lightning.chain.chain import Chain, Link

SCALES = (0.5, 0.75, 1.25)  # what is tried for each stage, besides 1


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


def rescale(sequence: TaskSequence, run: Run, data: Data) -> dict[str, Any]:
    """Gives each stage of the run of another arm its factor, fitted one after another on the mean loss of all tasks, or equal.

    Returns:
        as :func:`train`, and the ``scales`` in the order of the stages.
    """
    start = time.perf_counter()
    arm = ARMS[run["arm"]]
    of = run | {"arm": arm.of}
    if not sequence.chain_folder(of).exists():
        train(sequence, of, data)
    adapted, updates = sequence.adapted_model(run["seed"]), stage_updates(Chain.load(sequence.chain_folder(of)))

    def validation(scales: Sequence[float]) -> dict[str, list[float]]:
        adapted.go_to(updates.scaled(dict(enumerate(scales))))
        return validation_scores(sequence, adapted.model, data)

    scales = [1.0 if arm.factors == "fitted" else 1 / len(updates)] * len(updates)
    best = validation(scales)
    for stage in range(len(scales)) if arm.factors == "fitted" else ():
        for scale in SCALES:
            tried = [*scales[:stage], scale, *scales[stage + 1 :]]
            found = validation(tried)
            if sum(found["loss"]) < sum(best["loss"]):
                scales, best = tried, found
    validation(scales)
    at_end = matrices(sequence, [evaluate(sequence, adapted.model, data, "test")])
    seconds = {"seconds": round(time.perf_counter() - start)}
    return {"scales": scales} | at_end | of_validation(sequence, best) | seconds
