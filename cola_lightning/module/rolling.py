"""A rolling chain: a knot finishes the oldest components of a link, and the rest of the link goes on.

A component is a row of A with its column of B. Those that a knot finishes become a link of their number, and are drawn anew.
The optimizer goes on without their moments. It counts steps, and has a rate, for a factor as a whole; so each of its steps is
scaled, component by component, to that of an optimizer that began with the component, in the component's own warm-up.

Source: SwitchLoRA (arXiv 2406.06564) and SRLoRA (arXiv 2505.12433) exchange a few components of a LoRA at a time.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain import Link
from cola_lightning.chain.schedule import warmup_length
from cola_lightning.module.run import Component, Run, trainer_of

if TYPE_CHECKING:
    from cola_lightning.module.module import COLAModule


def refresh(module: "COLAModule", rank: int) -> Link:
    """Finishes the oldest components of a module's current link, as a link of this rank, and begins them anew."""
    adapted, run, trainer = module.adapted, module.run, trainer_of(module)
    start = run.link_start.global_step
    if not run.components:
        run.components = [Component(row, start, 0) for row in range(next(iter(adapted.layers.values())).rank)]
    oldest = [component.row for component in run.components[:rank]]
    link = adapted.tie_knot(components=oldest, **run.metadata(trainer))
    run.link_start = run.position(trainer)
    now = run.link_start.global_step
    life = (now - start) * len(run.components) / rank  # of a component, if the knots go on at this distance
    rise = warmup_length(module.optimization.knot_warmup_steps, life)
    run.components = [*run.components[rank:], *(Component(row, now, rise) for row in oldest)]
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


@torch.no_grad()
def scale_next_step(optimizer: Optimizer, adapted: AdaptedModel, run: Run) -> RemovableHandle:
    """Scales the step that an optimizer is about to take, component by component.

    Args:
        optimizer: of a run after a knot.
        adapted: the model.
        run: knows when each component began.

    Returns:
        A handle, to be removed before the step after.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    before = [(factor, dim, factor.clone()) for factor, dim in factors_of(adapted) if id(factor) in groups]

    @torch.no_grad()
    def scale(optimizer: Optimizer, *_: Any) -> None:
        assert run.trainer is not None
        vectors: dict[tuple[Any, ...], Tensor] = {}  # few: factors that had as many steps share one
        for factor, dim, old in before:
            group, state = groups[id(factor)], optimizer.state.get(factor, {})
            key = id(group), float(state.get("step", 0)), factor.dtype, factor.device
            if key not in vectors:
                scales = torch.ones(factor.shape[dim])
                for row, start, rise in run.components:
                    age = run.trainer.global_step - start
                    scales[row] = _correction(group, state, age + 1) * (age / rise if age < rise else 1)
                vectors[key] = scales.to(factor)
            factor.copy_(old.lerp(factor, vectors[key].view((-1, 1) if dim == 0 else (1, -1))))
        before.clear()

    return optimizer.register_step_post_hook(scale)


def _correction(group: Mapping[str, Any], state: Mapping[str, Any], n_steps: int) -> float:
    """Adam's bias correction after so many steps over that after all that its state counts; 1 for optimizers without."""
    has_second_moment = "exp_avg_sq" in state or "state2" in state  # the latter: bitsandbytes'
    if not has_second_moment or "step" not in state:
        return 1.0
    beta1, beta2 = map(float, group["betas"][:2])
    total = float(state["step"])
    own, common = (math.sqrt(1 - math.pow(beta2, n)) / (1 - math.pow(beta1, n)) for n in (min(n_steps, total), total))
    return own / common
