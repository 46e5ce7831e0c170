"""A rolling chain: a knot finishes the oldest components of a link, and the rest of the link goes on.

A component is a row of A with its column of B. Those that a knot finishes become a link of their number, and are drawn anew.
The optimizer goes on without their moments. It counts steps, and has a rate, for a factor as a whole; so each of its steps is
scaled, component by component, to that of an optimizer that began with the component, in the component's own warm-up.

Source: SwitchLoRA (arXiv 2406.06564) and SRLoRA (arXiv 2505.12433) exchange a few components of a LoRA at a time.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain import Link
from cola_lightning.chain.schedule import warmup_length
from cola_lightning.module.run import trainer_of

if TYPE_CHECKING:
    from cola_lightning.module.module import COLAModule


def refresh(module: "COLAModule", rank: int) -> Link:
    """Finishes the oldest components of a module's current link, as a link of this rank, and begins them anew."""
    adapted, run, trainer = module.adapted, module.run, trainer_of(module)
    if not run.components:
        first = next(iter(adapted.layers.values()))
        run.components = [(row, run.link_start.global_step) for row in range(first.rank)]
    oldest = [row for row, _ in run.components[:rank]]
    link = adapted.tie_knot(components=oldest, **run.metadata(trainer))
    run.link_start = run.position(trainer)
    run.components = [*run.components[rank:], *((row, run.link_start.global_step) for row in oldest)]
    for optimizer in [] if run.trainer is None else run.trainer.optimizers:
        clear_state(optimizer, adapted, oldest)
    return link


def factors_of(adapted: AdaptedModel) -> Iterator[tuple[Tensor, int]]:
    """The factors of the current link, each with the dimension of its components: 0 for A, 1 for B."""
    for layer in adapted.layers.values():
        yield layer.lora_A, 0
        yield layer.lora_B, 1


@torch.no_grad()
def clear_state(optimizer: Optimizer, adapted: AdaptedModel, components: list[int]) -> None:
    """Zeroes an optimizer's moments of some components, in place; other state, and its counts of steps, do not change."""
    for factor, dim in factors_of(adapted):
        for value in optimizer.state.get(factor, {}).values():
            if isinstance(value, Tensor) and value.shape == factor.shape:
                value.index_fill_(dim, torch.tensor(components, device=value.device), 0)


def scale_steps(module: "COLAModule", optimizers: Sequence[Optimizer]) -> None:
    """Has optimizers of a rolling chain step with each component as they would if they had begun with it."""
    adapted, run, before = module.adapted, module.run, list[Tensor]()

    @torch.no_grad()
    def remember(*_: Any) -> None:
        before[:] = [factor.clone() for factor, _ in factors_of(adapted)] if run.components else []

    @torch.no_grad()
    def scale(optimizer: Optimizer, *_: Any) -> None:
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        vectors: dict[tuple[Any, ...], Tensor] = {}  # few: factors that had as many steps share one
        for (factor, dim), old in zip(factors_of(adapted), before, strict=False):  # none before the first knot
            if (group := groups.get(id(factor))) is None:
                continue
            state = optimizer.state.get(factor, {})
            key = id(group), float(state.get("step", 0)), factor.dtype, factor.device
            if key not in vectors:
                scales = {row: rising * _correction(group, state, age + 1) for row, (age, rising) in _ages(module).items()}
                vectors[key] = torch.tensor([scales.get(row, 1.0) for row in range(factor.shape[dim])]).to(factor)
            factor.copy_(old.lerp(factor, vectors[key].view((-1, 1) if dim == 0 else (1, -1))))
        before.clear()

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(scale)


def _ages(module: "COLAModule") -> dict[int, tuple[int, float]]:
    """The steps that each component has taken, and where it is in its warm-up: a factor from 0 to 1."""
    run = module.run
    assert run.trainer is not None
    rises = warmups(run.components, module.optimization.knot_warmup_steps)
    ages = {row: (run.trainer.global_step - start, rises[start]) for row, start in run.components}
    return {row: (age, age / rise if age < rise else 1.0) for row, (age, rise) in ages.items()}


def warmups(components: Sequence[tuple[int, int]], knot_warmup_steps: float) -> dict[int, int]:
    """The warm-up of each component by the step at which it began; none for the oldest ones, whose warm-up is over.

    Args:
        components: rows of A, from the oldest to the newest, and the step at which each began.
        knot_warmup_steps: a number of steps; below 1, a share of a component's life if the knots go on at this distance.

    Example:
        >>> warmups([(2, 0), (3, 0), (0, 100), (1, 100)], 0.25)
        {0: 0, 100: 50}
    """
    starts = dict.fromkeys(start for _, start in components)
    rises = dict.fromkeys(starts, 0)
    for previous, start in itertools.pairwise(starts):
        n_begun = sum(begun == start for _, begun in components)
        rises[start] = warmup_length(knot_warmup_steps, (start - previous) * len(components) / n_begun)
    return rises


def _correction(group: Mapping[str, Any], state: Mapping[str, Any], n_steps: int) -> float:
    """Adam's bias correction after so many steps over that after all that its state counts; 1 for optimizers without."""
    if "exp_avg_sq" not in state:
        return 1.0
    beta1, beta2 = map(float, group["betas"])
    total = float(state["step"])
    own, common = (math.sqrt(1 - math.pow(beta2, n)) / (1 - math.pow(beta1, n)) for n in (min(n_steps, total), total))
    return own / common
