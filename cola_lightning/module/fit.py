"""A module's callback: it begins fits, seeds batches, checks steps, and makes checkpoints resume exactly."""

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.base import check_unchanged
from cola_lightning.chain.schedule import ChainSchedule, FitPosition
from cola_lightning.errors import UserError
from cola_lightning.lora.layer import is_quantized_model, lora_layers
from cola_lightning.module.fsdp import check_sharding, replicate_trained, shards
from cola_lightning.module.overview import describe_fit
from cola_lightning.module.rewind import Rewind, awaiting_validation, can_validate, resume_rewound
from cola_lightning.module.run import Run, accumulation_schedulers, run_length
from cola_lightning.module.state import AtomicCheckpointIO, described_data, prepare_checkpoint
from cola_lightning.seeding import derive_seed, seeded

log = logging.getLogger(__name__)


class FitCallback(Callback):
    """The one callback of a module. The module attaches it to each of its Trainers.

    It is a callback, and not the module's own hooks, because a subclass may override those without ``super()``.

    Each training batch, and each batch of a fit's validation, has its own seed, for the global generators. It depends on the
    module's seed and on the batch's place: process, epoch and index; in a validation process, optimizer step, loader and index.
    Fits of a module that has been trained before draw other numbers than those fits did.

    Args:
        run: what the module's training is.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._rewind = Rewind()
        self._batch = ExitStack()  # the scope of a batch's seed
        self._pending = ExitStack()  # the scope in which a resumed fit awaits the validation that comes first
        self._has_pending = False  # whether there is one
        self._is_rate_due = False  # whether it resumes before the update of the rates that depend on a metric
        self._is_first_step = self._is_loss_shown = False
        self._logged: dict[str, Tensor] = {}  # the metrics that the Trainer of the resumed checkpoint had logged last

    # ------------------------------------------------------------------ the beginning and the end of a run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run = self.run
        if pl_module is not run.module:  # a later module of the Trainer's, which is not of this package
            trainer.callbacks = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
            return
        check_sharding(trainer.strategy, run)
        replicate_trained(trainer.strategy)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else the user has chosen one
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if shards(trainer.strategy):  # in a later fit FSDP2 would gather into tensors made in inference mode
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                loop.inference_mode = False
        check_one_seed(run.seed)
        self._has_pending = False
        if stage == "fit":
            run.begin_fit(trainer, schedule_of(trainer))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run: Any = self.run
        run.module.make_model()  # which Lightning has done, except where a subclass' configure_model left super() out
        adapted = run.adapted
        if not (run.is_sharded or is_quantized_model(adapted.model) or trainer.precision in ("bf16-true", "16-true")):
            check_unchanged(adapted.model, adapted.chain.base, adapted.layers.keys() if adapted.n_finished else ())
        warn_of_half_precision(adapted.model)
        check_frozen(adapted, run.schedule)
        if trainer.ckpt_path is not None:
            return
        adapted.trained.record_initial()  # parameters that a hook has added since the model was made
        run.begin_links()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pending.close()  # the length of the fit is as it was
        run = self.run
        for callback in accumulation_schedulers(trainer):  # it acts at the start of an epoch; a fit may resume inside one
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
        run.step_loss.begin(getattr(trainer.precision_plugin, "scaler", None))
        self._is_first_step, self._is_loss_shown = True, False
        now, is_resumed = FitPosition(trainer.current_epoch, trainer.global_step), trainer.ckpt_path is not None
        run.length = run_length(trainer, beginning_of_epoch(trainer, now) if is_resumed else now)
        run.schedule = run.schedule.in_run(run.length, run.stable_share(run.length))
        self._start_optimization(trainer, is_resumed=is_resumed)
        run.check_used(trainer)
        run.check_schedule(run.length)
        if trainer.is_global_zero:
            log.info("before the first step\n%s", "\n".join(f"  {line}" for line in describe_fit(trainer, run)))
        self._rewind.begin_fit(trainer, pl_module, run.adapted.trained.state().keys())
        if self._has_pending and can_validate(trainer):
            self._pending.enter_context(awaiting_validation(trainer))

    def _start_optimization(self, trainer: Trainer, *, is_resumed: bool) -> None:
        """Resumes the current link's optimizer, or begins the link as the schedule says."""
        run = self.run
        if is_resumed:
            device = trainer.strategy.root_device
            # Lightning does not restore them, and a rule that reads metrics may need them.
            trainer.callback_metrics.update({name: value.to(device) for name, value in self._logged.items()})
            run.forget_logged()
            run.resume_optimizer(trainer)
            if self._is_rate_due:
                update_rates_by_metrics(trainer)
            end = run.length.end_step if run.length is not None else math.inf
            log.info("resumed at step %d%s", trainer.global_step, "" if end == math.inf else f" of {end}")
            return
        run.begin_as_scheduled()
        if trainer.global_step:  # the first rate was set before the run's length was known
            trainer.strategy.setup_optimizers(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._rewind.interrupt(trainer)
        modes = getattr(trainer._active_loop, "_module_mode", None)
        if modes is not None:  # of an evaluation, after which Lightning leaves evaluation mode on: a fit would lose dropout
            modes.restore(pl_module)
        self._leave(trainer, pl_module)

    def _leave(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Cleans up at the end of a Trainer's run, and stores where it ended."""
        self._batch.close()
        self._pending.close()
        run = self.run
        if trainer.state.fn == "fit":
            run.end = FitPosition(trainer.current_epoch, trainer.global_step)
            run.note_progress()  # the Trainer's next run clears its metrics
            run.fitted_data = {name: described_data(run, name) for name in ("prompt_format", "identity")}

    teardown = _leave

    # ------------------------------------------------------------------ epochs and batches

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self.run
        if run.length is not None:  # earlier epochs may have been of another length, if their data were loaded again
            now = FitPosition(trainer.current_epoch, trainer.global_step)
            run.length = replace(run.length, epoch_start=now)
        self._rewind.begin_epoch(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed(trainer.global_rank, trainer.current_epoch, batch_idx)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._rewind.begin_window(trainer, pl_module)
        align_logged_step(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch.close()
        self._rewind.end_batch(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_validating_in_fit(trainer):
            self._pending.close()
            self._check_loss(trainer)
            self._rewind.begin_validation(trainer, pl_module)
            align_logged_step(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if is_validating_in_fit(trainer):
            self._seed("validation", trainer.global_rank, trainer.global_step, dataloader_idx, batch_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_validating_in_fit(trainer):
            self._rewind.end_validation()

    def _restore_generators(self, *args: Any, **kwargs: Any) -> None:
        """Ends the scope of a batch's seed."""
        self._batch.close()

    on_validation_batch_end = _restore_generators

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch.close()  # if a hook has cut the epoch short
        trainer.fit_loop._restarting = False  # else Lightning updates no rate that depends on a metric in a resumed epoch

    def _seed(self, *place: object) -> None:
        """Seeds the global generators for a batch; they are restored after it."""
        self._batch.close()
        n_before = self.run.n_earlier_fits
        self._batch.enter_context(seeded(derive_seed(self.run.adapted.seed, *place, *[f"after {n_before}"] * (n_before > 0))))

    # ------------------------------------------------------------------ steps

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.run.step_loss.add(loss)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._check_loss(trainer)
        self.run.note_step()  # the optimizer may be one that the run did not make
        step = f"step {trainer.global_step} (epoch {trainer.current_epoch}), in link {self.run.adapted.n_finished}"
        loss = self.run.step_loss.finish(optimizer, trainer.accumulate_grad_batches, step)
        if loss is not None:
            pl_module.log("train_loss", loss)
        self._is_loss_shown = loss is not None
        if self._is_first_step and trainer.is_global_zero:
            warn_of_no_gradient(self.run.adapted.model)
        self._is_first_step = False

    def _check_loss(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Checks the loss of the last step, and shows it: a progress bar of Lightning's would read a new one at each batch."""
        loss = self.run.step_loss.check()
        if loss is not None and self._is_loss_shown:
            trainer.progress_bar_metrics["train_loss"] = loss

    on_train_end = _check_loss

    # ------------------------------------------------------------------ checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        prepare_checkpoint(self.run, checkpoint)
        if self.run.trainer is trainer:  # of a fit
            self._rewind.write(checkpoint, trainer, self.state_key)
            logged = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
            checkpoint["callbacks"].setdefault(self.state_key, {})["logged"] = logged

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._has_pending = resume_rewound(checkpoint, self.state_key)
            if self._has_pending:
                self._pending.enter_context(awaiting_validation(trainer))
            stored = checkpoint["callbacks"].get(self.state_key, {})
            self._logged, self._is_rate_due = stored.get("logged", {}), stored.get("is_rate_due", False)


def attach(run: Run, trainer: Trainer) -> None:
    """Attaches a module's callback to its Trainer: after the user's, and before those that write checkpoints."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, FitCallback) and callback.run is run for callback in callbacks):
        others = [c for c in callbacks if not isinstance(c, FitCallback)]  # of another module
        last = [c for c in others if isinstance(c, Checkpoint)]
        first = [c for c in others if c not in last]
        trainer.callbacks = [*first, FitCallback(run), *last]  # type: ignore[attr-defined]


def schedule_of(trainer: Trainer) -> ChainSchedule:
    """The schedule of the fit's ChainOfLoRA, which is above this file; without one, that of a single link."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedules = (getattr(callback, "schedule", None) for callback in callbacks)
    return next((schedule for schedule in schedules if isinstance(schedule, ChainSchedule)), ChainSchedule())


# ---------------------------------------------------------------------- what would go wrong without an error


def update_rates_by_metrics(trainer: Trainer) -> None:
    """Updates learning rates by the metrics of a finished epoch, as Lightning does after the hooks that write checkpoints."""
    for config in trainer.lr_scheduler_configs if trainer.lightning_module.automatic_optimization else ():
        value = trainer.callback_metrics.get(config.monitor or "")
        is_due = config.interval == "epoch" and trainer.current_epoch % config.frequency == 0
        if config.reduce_on_plateau and is_due and value is not None:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, value)


def check_one_seed(seed: int | None) -> None:
    """Refuses processes that have drawn different seeds.

    Raises:
        UserError: for a model that was accessed before the processes were joined, without a seed.
    """
    if len(set(layout.gather_objects(seed))) > 1:
        raise UserError("model.seed: set it, or seed_everything: the model was accessed before the processes were joined")


def warn_of_half_precision(model: nn.Module) -> None:
    """Warns of fully trained parameters in half precision; links are always in float32."""
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        log.warning(
            "fully trained parameters are in half precision, which rounds small steps away: model.dtype float32 with "
            "trainer.precision bf16-mixed keeps them in float32"
        )


def warn_of_no_gradient(model: nn.Module) -> None:
    """Warns of adapted layers that should have a gradient in a fit's first step; a gradient of zeros is one."""
    layers = lora_layers(model)
    trained = {name: layer for name, layer in layers.items() if layer.has_link and layer.lora_B.requires_grad}
    names = [name for name, layer in trained.items() if layer.lora_A.grad is None and layer.lora_B.grad is None]
    if names:
        log.warning(
            "model.target_modules: %d of %d adapted layers got no gradient in the first step (%s). A link is never trained if "
            "the model reads the weight of its layer without calling the layer. It is trained later if only these batches did "
            "not use the layer, such as an expert without tokens",
            *(len(names), len(layers), ", ".join([*names[:3], *["..."] * (len(names) > 3)])),
        )


def check_frozen(adapted: AdaptedModel, schedule: ChainSchedule) -> None:
    """Refuses to train adapted weights next to their links, if there are knots: no earlier link could be restored."""
    if schedule.has_knots and (trained := [name for name, layer in adapted.layers.items() if layer.weight.requires_grad]):
        raise UserError(f"model: the base weight of {trained[0]!r} must be frozen under a chain. Did you unfreeze() it?")


def beginning_of_epoch(trainer: Trainer, now: FitPosition) -> FitPosition:
    """When the epoch began; earlier ones may have been of another length, in a run that resumes with other options."""
    window = max(1, trainer.accumulate_grad_batches)  # fewer are refused with the run's length
    return FitPosition(now.epoch, now.global_step - math.ceil((trainer.fit_loop.batch_idx + 1) / window))


def is_validating_in_fit(trainer: Trainer) -> bool:
    """Whether a validation inside a fit is running, and not the sanity check before it."""
    return trainer.state.fn == "fit" and trainer.validating


def align_logged_step(trainer: Trainer) -> None:
    """Sets the loggers' step to the number of optimizer steps: a resume may leave it off by one."""
    if not trainer.lightning_module.automatic_optimization:  # manual optimization may take several steps in a batch
        return
    loop = trainer.fit_loop.epoch_loop
    is_before_its_count = trainer.validating and not loop._should_accumulate()
    loop._batches_that_stepped = trainer.global_step - is_before_its_count
