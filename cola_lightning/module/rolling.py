"""A rolling chain: a knot finishes the oldest components of a link, and the rest of the link goes on.

A component is a row of A with its column of B. Those that a knot finishes become a link of their number, and are drawn anew. The
optimizer goes on, without their moments. It counts steps, and has a rate, for a factor as a whole: so each of its steps is scaled,
component by component, to what it would be in an optimizer that began with the component, after a warm-up of its own.

Source: SwitchLoRA (arXiv 2406.06564) and SRLoRA (arXiv 2505.12433) exchange a few dimensions of a LoRA at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain import Link
from cola_lightning.module.run import Run, trainer_of

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
    if run.trainer is not None:
        for optimizer in run.trainer.optimizers:
            clear_state(optimizer, adapted, oldest)
    return link


@torch.no_grad()
def clear_state(optimizer: Optimizer, adapted: AdaptedModel, components: list[int]) -> None:
    """Zeroes an optimizer's moments of some components, in place; other state, and step counts, do not change."""
    for factor, dim in factors_of(adapted):
        for value in optimizer.state.get(factor, {}).values():
            if isinstance(value, Tensor) and value.shape == factor.shape:
                value.index_fill_(dim, torch.tensor(components, device=value.device), 0)


def factors_of(adapted: AdaptedModel) -> Iterator[tuple[Tensor, int]]:
    """The factors of the current link, each with the dimension of its components: 0 for A, 1 for B."""
    for layer in adapted.layers.values():
        yield layer.lora_A, 0
        yield layer.lora_B, 1


def scale_steps(optimizer: Optimizer, adapted: AdaptedModel, run: Run, warmup_steps: Callable[[int], float]) -> None:
    """Has an optimizer step with each component as it would if it had begun with it.

    Args:
        optimizer: of the run.
        adapted: the model.
        run: knows when each component began.
        warmup_steps: of a component that began at a step.
    """
    before: list[Tensor] = []

    @torch.no_grad()
    def remember(*_: Any) -> None:
        before[:] = [factor.clone() for factor, _ in factors_of(adapted)] if run.components else []

    @torch.no_grad()
    def scale(optimizer: Optimizer, *_: Any) -> None:
        assert run.trainer is not None
        counts = {row: run.trainer.global_step + 1 - start for row, start in run.components}
        rises = {row: warmup_steps(start) if start else 0 for row, start in run.components}
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for (factor, dim), old in zip(factors_of(adapted), before, strict=False):
            weights = torch.ones(factor.shape[dim])
            for row, count in counts.items():
                warm = min(1, (count - 1) / rises[row]) if rises[row] else 1
                weights[row] = warm * _correction(groups[id(factor)], optimizer.state[factor], count)
            shape = (-1, 1) if dim == 0 else (1, -1)
            factor.copy_(old.lerp_(factor, weights.to(factor).view(shape)))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale)


def _correction(group: Mapping[str, Any], state: Mapping[str, Any], count: int) -> float:
    """Adam's bias correction after so many steps, divided by that after all steps that the state counts; else 1."""
    if "exp_avg_sq" not in state:
        return 1.0
    (beta1, beta2), total = group["betas"], float(state["step"])
    own, common = (math.sqrt(1 - beta2**n) / (1 - beta1**n) for n in (min(count, total), total))
    return own / common
