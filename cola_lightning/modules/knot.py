"""Ties a knot in a run: finishes the link in the model, records its steps and metrics, and makes the next optimizer."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from cola_lightning.adapted_model import check_next
from cola_lightning.chain import Link
from cola_lightning.chain.schedule import Counters
from cola_lightning.errors import UserError
from cola_lightning.modules.optimization import check_new_optimizers
from cola_lightning.modules.run_state import trainer_of

if TYPE_CHECKING:
    from cola_lightning.modules.base import COLAModule

HOOKS_OF_A_STEP = {
    "training_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "lr_scheduler_step",
}


def tie_knot(module: "COLAModule", rank: int | None, alpha: float | None) -> Link:
    """Finishes a module's live link and begins the next; see :meth:`~cola_lightning.COLAModule.tie_knot`."""
    if module.target_modules is None:
        raise UserError("model.target_modules: expected layers to adapt for a chain with knots, received null")
    check_next(rank, alpha, module.max_rank)
    _check_between_steps(module)
    module.configure_model()
    adapted, run, trainer = module.adapted, module.run_state, trainer_of(module)
    planned_rank, planned_alpha = module.link_plan.of(module.link + 1)
    run.is_tying = True
    link = adapted.tie_knot(
        planned_rank if rank is None else rank, planned_alpha if alpha is None else alpha, **facts_of_live_link(module)
    )
    module.link_metrics.begin_link(trainer)
    run.link_start = counters_now(module)
    _make_optimizers(module)
    run.is_tying = False  # not in a finally: after a knot that failed halfway nothing may be written
    return link


def begin_at(module: "COLAModule", start: Counters) -> None:
    """Corrects the moment at which the live link begins, before its first step, and its learning-rate schedule."""
    module.run_state.link_start = start
    _make_optimizers(module)


def _make_optimizers(module: "COLAModule") -> None:
    """Makes the live link's optimizers and learning-rate schedules, in a fit or after it.

    After a fit they are those of the checkpoint that its Trainer may write. Their state is empty, as a next fit's is.
    """
    if (trainer := _fitting_trainer(module)) is not None:
        before = trainer.optimizers
        trainer.strategy.setup_optimizers(trainer)
        check_new_optimizers(before, trainer.optimizers)
        module.optimization.keep_state(before, trainer.optimizers, module.adapted)
    elif (trainer := _last_trainer(module)) is not None and trainer.optimizers:
        trainer.strategy.setup_optimizers(trainer)


def _fitting_trainer(module: "COLAModule") -> Trainer | None:
    """The Trainer that fits a module, also in a validation inside of the fit, where ``trainer.training`` is False."""
    trainer = trainer_of(module)
    is_fitting = trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"
    return trainer if is_fitting else None


def _last_trainer(module: "COLAModule") -> Trainer | None:
    """The Trainer that has fitted a module; None if there is none, or if it has another module now."""
    trainer = module.run_state.trainer() if module.run_state.trainer else None
    return trainer if trainer is not None and trainer.lightning_module is module else None


def _check_between_steps(module: "COLAModule") -> None:
    """Refuses a knot while Lightning is inside of an optimizer's step, which would then take the new link's first one.

    Lightning stores the hook that it is calling under a private name only.
    """
    trainer = _fitting_trainer(module)
    if trainer is None or not trainer.lightning_module.automatic_optimization:
        return
    if (hook := trainer.lightning_module._current_fx_name) in HOOKS_OF_A_STEP:
        raise UserError(
            f"tie_knot: expected a call between optimizer steps, as in on_train_batch_start, received one in {hook}"
        )


def facts_of_live_link(module: "COLAModule") -> dict[str, Any]:
    """Steps, metrics and values outside of the model, which a module adds to its live link."""
    start = module.run_state.link_start.global_step
    facts = {"metrics": module.link_metrics.of(trainer_of(module), start), "outside": module.trained_state.outside()}
    return {"start_step": start, "end_step": counters_now(module).global_step} | facts


def counters_now(module: "COLAModule") -> Counters:
    """The epoch and optimizer step that a module's fit has reached, also after it: another Trainer may only evaluate."""
    trainer, run = trainer_of(module), module.run_state
    if trainer is not None and trainer.state.fn == "fit":
        return Counters(trainer.current_epoch, trainer.global_step)
    if run.left_at is None or run.left_at.global_step < run.link_start.global_step:
        return run.link_start
    return run.left_at
