"""The checks of a fit: what would go wrong without an error."""

import logging
import math

from lightning.pytorch import Trainer
from torch import Tensor, nn

from cola_lightning import layout
from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.schedule import ChainSchedule, FitPosition
from cola_lightning.errors import UserError
from cola_lightning.lora.inject import first_names
from cola_lightning.lora.layer import is_quantized, lora_layers

log = logging.getLogger(__name__)


def check_one_seed(seed: int | None) -> None:
    """Refuses processes that have drawn a seed each.

    Raises:
        UserError: for a model that was accessed before the processes were joined, without a seed.
    """
    if len(seeds := set(layout.gather_objects(seed))) > 1:
        raise UserError(
            "model.seed: set it, or seed_everything. The model was accessed before the processes were joined, so they drew "
            f"{len(seeds)} different seeds"
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
            f"model.rank, model.alpha, chain.ranks, chain.alphas: link {adapted.link} has been trained with {adapted.live}, "
            f"and cannot go on with {planned}"
        )
    return False


def warn_of_lengths(schedule: ChainSchedule, lengths: list[int], n_finished: int) -> None:
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


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the adapted layers whose links are to be trained and have no gradient; a gradient of zeros is one."""
    return [
        name
        for name, layer in lora_layers(model).items()
        if layer.lora_B.requires_grad and layer.lora_A.grad is None and layer.lora_B.grad is None
    ]


def warn_of_no_gradient(names: list[str], model: nn.Module) -> None:
    """Warns of the adapted layers of a model that have these names, and no gradient in a fit's first step."""
    if names:
        log.warning(
            "model.target_modules: %d of %d adapted layers got no gradient in the first step's batches (%s): the link of a "
            "layer whose weight the model reads without calling the layer is never trained; a layer that these batches did "
            "not use, such as an expert without tokens, is trained once it is used",
            len(names),
            len(lora_layers(model)),
            first_names(names),
        )


def summary(adapted: AdaptedModel, parameters: list[Tensor], trained: list[nn.Parameter]) -> str:
    """How many of a module's parameters are trained, and where.

    Args:
        adapted: the adapted model.
        parameters: all parameters of the module.
        trained: the trained ones.
    """
    text, saved = "model:", adapted.config.modules_to_save
    if not layout.has_fsdp1(adapted.model):  # which hides sharded parameters in flat ones
        n_trained = sum(p.numel() for p in trained)
        packed = [part.get_parameter("weight") for part in adapted.model.modules() if is_quantized(part)]
        n_all = sum(p.numel() for p in [*parameters, *packed])  # a packed weight has two values in a byte
        text += f" {n_trained:,} of {n_all:,} parameters are trained ({n_trained / max(1, n_all):.2%})"
    if adapted.live is None:
        return text
    rank, alpha = adapted.live
    text += f", link {adapted.link} of rank {rank} and alpha {alpha:g} on {len(adapted.layers)} layers"
    return text + (f", and all of {', '.join(saved)}" if saved else "")


def check_frozen(adapted: AdaptedModel, schedule: ChainSchedule) -> None:
    """Refuses to train adapted weights beside their links, if there are knots: no earlier link could be restored."""
    if schedule.has_knots and (trained := [name for name, layer in adapted.layers.items() if layer.weight.requires_grad]):
        raise UserError(
            f"model: the base weight of layer {trained[0]!r} is trainable, but a chain needs it frozen. Did you call "
            "unfreeze()?"
        )


def check_whole_windows(trainer: Trainer) -> None:
    """Refuses to resume in the middle of what is now an accumulation window."""
    done, window = trainer.fit_loop.batch_idx + 1, trainer.accumulate_grad_batches
    if done % max(1, window) and done != trainer.num_training_batches:
        raise UserError(
            f"trainer.accumulate_grad_batches: must divide {done}, the number of batches of the epoch before the checkpoint, "
            f"got {window}"
        )


def beginning_of_epoch(trainer: Trainer, now: FitPosition) -> FitPosition:
    """When the epoch began; earlier ones may have been of another length, in a run that resumes with other options."""
    window = max(1, trainer.accumulate_grad_batches)  # fewer are refused with the run's length
    return FitPosition(now.epoch, now.global_step - math.ceil((trainer.fit_loop.batch_idx + 1) / window))
