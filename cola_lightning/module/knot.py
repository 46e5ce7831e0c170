"""Ties a knot in a run: finishes the link in the model, records its steps and metrics, and makes the next optimizer."""

from lightning.pytorch.callbacks import BaseFinetuning

from cola_lightning.chain import Link
from cola_lightning.chain.schedule import FitPosition
from cola_lightning.errors import UserError
from cola_lightning.module.base import AdaptedModule
from cola_lightning.module.optimization import add_groups_of
from cola_lightning.module.run import run_of, trainer_of


def tie_knot(module: AdaptedModule, rank: int | None, alpha: float | None) -> Link:
    """Finishes a module's current link and begins the next; see :meth:`~cola_lightning.COLAModule.tie_knot`."""
    module.adapted.check_next(rank)
    module.step_loss.check()  # before the link is recorded
    adapted, run, trainer = module.adapted, run_of(module), trainer_of(module)
    run.is_tying = True
    rank = run.schedule.rank(module.link + 1) if rank is None else rank
    alpha = run.schedule.alpha(module.link + 1) if alpha is None else alpha
    link = adapted.tie_knot(rank, alpha, **run.metadata(trainer))
    run.link_start = run.position(trainer)
    _make_optimizers(module)
    run.begin_metrics(trainer)
    run.is_tying = False  # not in a finally: after a knot that failed halfway nothing may be written
    return link


def begin_link(module: AdaptedModule, rank: int | None, alpha: float | None) -> None:
    """Begins the current link again, before its first step; see :meth:`~cola_lightning.COLAModule.begin_link`."""
    adapted, run = module.adapted, run_of(module)
    adapted.check_next(rank)
    if any(layer.has_begun for layer in adapted.layers.values()):
        raise UserError("begin_link: the current link has been trained; tie a knot to begin another one")
    assert adapted.live is not None
    before = adapted.live
    adapted.begin_link(before[0] if rank is None else rank, before[1] if alpha is None else alpha)
    begin_at(module, run.position(trainer_of(module)))


def begin_at(module: AdaptedModule, start: FitPosition) -> None:
    """Corrects the moment at which the current link begins, before its first step, and its learning-rate schedule."""
    run_of(module).link_start = start
    _make_optimizers(module)


def _make_optimizers(module: AdaptedModule) -> None:
    """Makes the current link's optimizers and learning-rate schedules, in a fit or after it.

    After a fit they are those of the checkpoint that its Trainer may write. Their state is empty, as a next fit's is.
    """
    trainer, run = trainer_of(module), run_of(module)
    is_fitting = trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"
    trainer = trainer if is_fitting else run.trainer  # also in a validation of the fit
    if trainer is None or trainer.lightning_module is not module or not (is_fitting or trainer.optimizers):
        return
    before = trainer.optimizers
    trainer.strategy.setup_optimizers(trainer)
    if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        for old, new in zip(before, trainer.optimizers, strict=True):
            add_groups_of(old, new)
    if not is_fitting:
        return
    if any(new is old for new in trainer.optimizers for old in before):  # whose moments would outlive the link
        raise UserError(
            "configure_optimizers: expected a new optimizer from each call, one for each link, received the same twice (of "
            "LightningCLI's optimizer there is one: model.optimizer makes as many as there are links)"
        )
    run.optimization.keep_state(before, trainer.optimizers, module.adapted)
