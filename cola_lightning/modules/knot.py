"""Ties a knot in a run: finishes the link in the model, records its steps and metrics, and makes the next optimizer."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from cola_lightning.chain import Link
from cola_lightning.chain.schedule import FitPosition
from cola_lightning.errors import UserError
from cola_lightning.modules.run import trainer_of

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
    """Finishes a module's current link and begins the next; see :meth:`~cola_lightning.COLAModule.tie_knot`."""
    module.adapted.check_next(rank, alpha)
    _check_between_steps(module)
    adapted, run, trainer = module.adapted, module.run, trainer_of(module)
    run.is_tying = True
    link = adapted.tie_knot(
        run.schedule.rank(module.link + 1) if rank is None else rank,
        run.schedule.alpha(module.link + 1) if alpha is None else alpha,
        **metadata_of_link(module),
    )
    run.begin_metrics(trainer)
    run.link_start = run.position(trainer)
    _make_optimizers(module)
    run.is_tying = False  # not in a finally: after a knot that failed halfway nothing may be written
    return link


def begin_at(module: "COLAModule", start: FitPosition) -> None:
    """Corrects the moment at which the current link begins, before its first step, and its learning-rate schedule."""
    module.run.link_start = start
    _make_optimizers(module)


def _make_optimizers(module: "COLAModule") -> None:
    """Makes the current link's optimizers and learning-rate schedules, in a fit or after it.

    After a fit they are those of the checkpoint that its Trainer may write. Their state is empty, as a next fit's is.
    """
    if (trainer := _fitting_trainer(module)) is not None:
        before = trainer.optimizers
        trainer.strategy.setup_optimizers(trainer)
        module.optimization.keep_state(before, trainer.optimizers, module.adapted)
    elif (trainer := module.run.trainer) is not None and trainer.lightning_module is module and trainer.optimizers:
        trainer.strategy.setup_optimizers(trainer)


def _fitting_trainer(module: "COLAModule") -> Trainer | None:
    """The Trainer that fits a module, also in a validation inside of the fit, where ``trainer.training`` is False."""
    trainer = trainer_of(module)
    is_fitting = trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"
    return trainer if is_fitting else None


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


def metadata_of_link(module: "COLAModule") -> dict[str, Any]:
    """Steps and metrics, which a module adds to its current link."""
    run, trainer = module.run, trainer_of(module)
    steps = {"start_step": run.link_start.global_step, "end_step": run.position(trainer).global_step}
    return steps | {"metrics": run.metrics(trainer)}
