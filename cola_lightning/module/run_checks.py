"""The callback that begins a module's fits (schedule, position, length, learning rates) and checks its runs.

It checks what would go wrong without an error. A callback, and not the module's hooks, which a subclass could override without
``super()``.
"""

import logging
import math
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.schedule import ChainSchedule, FitPosition, RunLength
from cola_lightning.errors import UserError
from cola_lightning.lora.inject import first_names
from cola_lightning.lora.layer import is_quantized, lora_layers
from cola_lightning.module.batch_seed import BatchSeed
from cola_lightning.module.checkpoint import AtomicCheckpointIO
from cola_lightning.module.fsdp import check_sharding, replicate_trained, shards
from cola_lightning.module.optimization import warn_of_half_precision
from cola_lightning.module.rewind import ExactResume
from cola_lightning.module.run import accumulation_schedulers, run_length, run_of

if TYPE_CHECKING:
    from cola_lightning.module.module import COLAModule

log = logging.getLogger(__name__)


class RunChecks(Callback):
    """Begins the fits of one module, and checks its runs.

    Args:
        module: the module.
    """

    def __init__(self, module: "COLAModule") -> None:
        self.module = module

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if pl_module is not self.module:  # the Trainer's next module: Lightning keeps a module's callbacks
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            others = [one for one in callbacks if not isinstance(one, BatchSeed | RunChecks | ExactResume)]
            trainer.callbacks = others  # type: ignore[attr-defined]
            return
        check_sharding(trainer.strategy, self.module)
        replicate_trained(trainer.strategy)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else the user has chosen one
            trainer.strategy.checkpoint_io = AtomicCheckpointIO(run_of(self.module).pending)
        if shards(trainer.strategy):  # in a later fit FSDP2 would gather into tensors made in inference mode
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                loop.inference_mode = False
        run = run_of(self.module)
        if len(seeds := set(layout.gather_objects(run.seed))) > 1:
            raise UserError(
                "model.seed: expected a number, or seed_everything, for a model that is accessed before processes are joined, "
                f"each of which drew its own; received null and {len(seeds)} processes"
            )
        if stage == "fit":
            run.length = None  # set again when training starts
            run.trainer_ref = weakref.ref(trainer)
            now = FitPosition(trainer.current_epoch, trainer.global_step)
            if not now.global_step or now != run.left_at:  # else this Trainer continues its own fit
                run.link_start = now
                run.n_before += run.left_at is not None and run.left_at.global_step > 0
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(getattr(callback, "schedule", None), ChainSchedule) for callback in callbacks):
                run.use(ChainSchedule())  # in place of an earlier fit's

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of_half_precision(self.module.model)
        _check_frozen(self.module)
        if trainer.ckpt_path is None:  # parameters that a hook has added since the model was made
            self.module.adapted.remember_first_values()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in accumulation_schedulers(trainer):  # it acts at the start of an epoch; a fit may resume inside one
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
        _check_whole_windows(trainer)
        self.module.step_loss.begin()
        self._modes = [(part, part.training) for part in pl_module.modules()]
        self._is_first_step, self._is_loss_shown = True, False
        self._without_gradient: list[str] | None = None  # known after a backward pass
        now, is_resumed = FitPosition(trainer.current_epoch, trainer.global_step), trainer.ckpt_path is not None
        length = run_length(trainer, _beginning_of_epoch(trainer, now) if is_resumed else now)
        run = run_of(self.module)
        run.length, run.schedule = length, run.schedule.in_run(length)
        self._start_optimization(trainer, pl_module, is_resumed=is_resumed)
        self._check_links(length)
        log.info("%s", _summary(self.module))

    def _start_optimization(self, trainer: Trainer, pl_module: LightningModule, *, is_resumed: bool) -> None:
        """Resumes the current link's optimizer, or begins the link as the schedule says."""
        module, run = self.module, run_of(self.module)
        self._is_state_unchecked = run.schedule.has_knots
        if is_resumed:
            run.restore_metrics(trainer)
            run.optimization.resume(trainer)
            return
        if begin_as_scheduled(module.adapted, run.schedule):
            run.begin_metrics(trainer)
        if trainer.global_step:  # the first rate was set before the run's length was known
            trainer.strategy.setup_optimizers(trainer)

    def _check_links(self, length: RunLength) -> None:
        """Checks options against the remaining links of this fit, as far as their lengths are known."""
        module, run = self.module, run_of(self.module)
        if run.schedule.has_unknown_lengths(length) or length.end_step == math.inf:
            run.optimization.check_without_horizon(length)
            return
        lengths = run.schedule.links(run.link_start, length)
        _warn_of_lengths(run.schedule, lengths, module.link)
        run.optimization.check_lengths(lengths)
        links = range(module.link, module.link + len(lengths) - 1)
        module.adapted.reserve_stacks([run.schedule.rank(link) for link in links])

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = run_of(self.module)
        if run.length is not None:  # earlier epochs may have been of another length, if their data were loaded again
            run.length = replace(run.length, epoch_start=FitPosition(trainer.current_epoch, trainer.global_step))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_state_unchecked and not self._is_first_step:  # here: an optimizer without a step has no state
            self._is_state_unchecked = False
            run_of(self.module).optimization.check_state(trainer.optimizers, self.module.adapted)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(trainer, pl_module)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cleans up at the end of a Trainer's run, and stores where it ended."""
        run = run_of(self.module)
        if trainer.state.fn == "fit":
            run.left_at = FitPosition(trainer.current_epoch, trainer.global_step)
        if trainer.state.fn in ("fit", "validate") and self.module.is_made:
            run.earlier_metrics = run.metrics(trainer)  # which the Trainer clears when its next run begins
        fitter = run.trainer
        if fitter is not None and fitter.state.status == TrainerStatus.RUNNING and fitter.lightning_module is pl_module:
            pl_module.trainer = fitter  # inside of whose fit another Trainer has evaluated the module

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer, pl_module)
        if run_of(self.module).is_validating:  # Lightning leaves evaluation mode on: the next fit would lose dropout
            for part, is_training in self._modes:
                part.training = is_training

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.module.step_loss.add(loss)

    def _check_loss(self, trainer: Trainer) -> None:
        """Checks the loss of the last step, and shows it: a progress bar of Lightning's would read a new one at each batch."""
        loss = self.module.step_loss.check()
        if loss is not None and self._is_loss_shown:
            trainer.progress_bar_metrics["train_loss"] = loss

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check_loss(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_loss(trainer)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_first_step:  # here: later a strategy that averages gradients fills in zeros where there is none
            self._without_gradient = _without_gradient(self.module.model)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for parameter in self.module.adapted.frozen_factors():  # so that no optimizer of a subclass changes them, either
            parameter.grad = None
        self._check_loss(trainer)
        step = f"step {trainer.global_step} (epoch {trainer.current_epoch}), in link {self.module.link}"
        loss = self.module.step_loss.finish(optimizer, trainer.accumulate_grad_batches, step)
        if loss is not None:
            self.module.log("train_loss", loss)
        self._is_loss_shown = loss is not None
        names = self._without_gradient
        if not self._is_first_step or names is None:
            return
        self._is_first_step = False
        if names and trainer.is_global_zero:
            log.warning(
                "model.target_modules: %d of %d adapted layers got no gradient in the first step's batches (%s): the link of a "
                "layer whose weight the model reads without calling the layer is never trained; a layer that these batches did "
                "not use, such as an expert without tokens, is trained once it is used",
                len(names),
                len(lora_layers(self.module.model)),
                first_names(names),
            )


def begin_as_scheduled(adapted: AdaptedModel, schedule: ChainSchedule) -> bool:
    """Begins the current link again if it is older than the schedule, which requests another rank or alpha.

    Returns:
        Whether the link was begun again.

    Raises:
        UserError: if the link has been trained with another rank or alpha.
    """
    planned, is_requested = (schedule.rank(adapted.link), schedule.alpha(adapted.link)), schedule.ranks or schedule.alphas
    if adapted.live in (None, planned):
        return False
    if not any(layer.has_begun for layer in adapted.layers.values()) and (is_requested or not adapted.link):
        adapted.begin_link(*planned)
        return True
    if is_requested:
        raise UserError(
            "model.rank, model.alpha, chain.ranks, chain.alphas: expected the rank and alpha with which link "
            f"{adapted.link} has been trained, {adapted.live}, received {planned}"
        )
    return False


def _warn_of_lengths(schedule: ChainSchedule, lengths: list[int], n_finished: int) -> None:
    """Warns of lengths that look wrong.

    Args:
        schedule: of the fit.
        lengths: optimizer steps of each remaining link of the fit, the current one first.
        n_finished: how many links are finished.
    """
    if len(lengths) == 1 and schedule.has_knots and not n_finished:
        log.warning("the run ends before its first knot: it is one link, plain LoRA")
    if len(lengths) > 1 and lengths[-1] < (shortest := min(lengths[:-1])) / 2:
        log.warning("the last link has %d optimizer steps, the others at least %d", lengths[-1], shortest)


def _without_gradient(model: nn.Module) -> list[str]:
    """Names of the adapted layers whose links are to be trained and have no gradient; a gradient of zeros is one."""
    return [
        name
        for name, layer in lora_layers(model).items()
        if layer.lora_B.requires_grad and layer.lora_A.grad is None and layer.lora_B.grad is None
    ]


def _summary(module: "COLAModule") -> str:
    """How many of a module's parameters are trained, and where."""
    text = "model:"
    if not layout.has_fsdp1(module.model):  # which hides sharded parameters in flat ones
        n_trained = sum(p.numel() for p in module.trained_parameters())
        packed = [part.get_parameter("weight") for part in module.model.modules() if is_quantized(part)]
        n_all = sum(p.numel() for p in [*module.parameters(), *packed])  # a packed weight has two values in a byte
        text += f" {n_trained:,} of {n_all:,} parameters are trained ({n_trained / max(1, n_all):.2%})"
    if module.adapted.live is None:
        return text
    rank, alpha = module.adapted.live
    text += f", link {module.link} of rank {rank} and alpha {alpha:g} on {len(module.adapted.layers)} layers"
    saved = module.lora_config.modules_to_save
    return text + (f", and all of {', '.join(saved)}" if saved else "")


def _check_frozen(module: "COLAModule") -> None:
    """Refuses to train adapted weights beside their links, if there are knots: no earlier link could be restored."""
    if run_of(module).schedule.has_knots and (
        trained := [name for name, layer in module.adapted.layers.items() if layer.weight.requires_grad]
    ):
        raise UserError(
            f"model: expected frozen weights under a chain, received a trainable one in the adapted layer {trained[0]!r} (of "
            "LightningModule.unfreeze, say)"
        )


def _check_whole_windows(trainer: Trainer) -> None:
    """Refuses to resume in the middle of what is now an accumulation window."""
    done, window = trainer.fit_loop.batch_idx + 1, trainer.accumulate_grad_batches
    if done % max(1, window) and done != trainer.num_training_batches:
        raise UserError(
            f"trainer.accumulate_grad_batches: expected a divisor of {done}, the batches of its epoch that the checkpoint has "
            f"completed, received {window}"
        )


def _beginning_of_epoch(trainer: Trainer, now: FitPosition) -> FitPosition:
    """When the epoch began; earlier ones may have been of another length, in a run that resumes with other options."""
    window = max(1, trainer.accumulate_grad_batches)  # fewer are refused with the run's length
    return FitPosition(now.epoch, now.global_step - math.ceil((trainer.fit_loop.batch_idx + 1) / window))
