"""What a fit will do, before its first step."""

import logging
import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import SequentialSampler

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.lora.inject import is_linear
from cola_lightning.module.optimization import LinkLR
from cola_lightning.module.run import Run

log = logging.getLogger(__name__)
HORIZONS = ("total_steps", "T_max", "total_iters")  # the attributes in which torch's schedulers have their length

MOST_KNOTS = 8  # that are named


def describe_fit(trainer: Any, run: Run) -> list[str]:
    """The lines of the block; what is most likely not meant is a warning.

    Args:
        trainer: the Trainer of the fit, whose data is set up.
        run: what the module's training is.
    """
    lines = [describe_model(run.adapted), f"data: {trainer.num_training_batches} batches in an epoch"]
    if run.adapted.layers:
        lines.append(describe_knots(run))
        warn_of_schedulers(trainer, run)
    return [*lines, describe_resume(trainer)]


def describe_model(adapted: AdaptedModel) -> str:
    """Which layers get links."""
    layers, saved = adapted.live_layers, adapted.config.modules_to_save
    if not layers:
        return "model: all parameters are trained, without links"
    rank, alpha = adapted.current.size
    n_linear = sum(is_linear(module) for module in adapted.model.modules()) + len(adapted.layers)
    n_trained = sum(parameter.numel() for layer in layers.values() for parameter in (layer.lora_A, layer.lora_B))
    line = f"model: link {adapted.n_finished} of rank {rank} and alpha {alpha:g} on {len(layers)} of {n_linear} layers"
    line += f": {n_trained:,} parameters"
    return line + (f"; all of {', '.join(saved)} is trained" if saved else "")


def describe_knots(run: Run) -> str:
    """What the knots of the fit do, and when they fall."""
    schedule, length, start = run.schedule, run.length, run.current.start
    if not schedule.has_knots:
        return "knots: none, so this is plain LoRA"
    if length is None or schedule.has_unknown_lengths(length) or length.end_step == math.inf:
        return f"knots ({schedule.knot}): decided while training"
    lengths = schedule.link_lengths(start, length)
    steps = [start.global_step + sum(lengths[:k]) for k in range(1, len(lengths))]
    if not steps:
        log.warning("this run ends before its first knot: it is one link, plain LoRA")
        return "knots: none before the end"
    shown = ", ".join([*map(str, steps[:MOST_KNOTS]), *["..."] * (len(steps) > MOST_KNOTS)])
    return f"knots ({schedule.knot}): {len(steps)}, before steps {shown}, of {length.end_step:,} steps"


def warn_of_schedulers(trainer: Trainer, run: Run) -> None:
    """Warns of each learning-rate scheduler of the user's that would not end with the link it is made for."""
    if run.length is None or not run.schedule.has_knots or run.schedule.continues_link:
        return
    steps = run.steps_in(run.length)
    for config in trainer.lr_scheduler_configs:
        horizon = next((getattr(config.scheduler, field) for field in HORIZONS if hasattr(config.scheduler, field)), 0)
        n_steps = horizon * config.frequency
        if config.interval == "step" and n_steps > steps and not isinstance(config.scheduler, LinkLR):
            what = "%s takes %d steps, but each link has %d, and a scheduler of its own. Use self.link_steps"
            log.warning(what, type(config.scheduler).__name__, n_steps, steps)


def describe_resume(trainer: Trainer) -> str:
    """Whether a run that goes on from a checkpoint has the bits of a run that was never stopped."""
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        sampler = getattr(loader, "sampler", None)
        if hasattr(sampler, "rows_done"):  # an EpochSampler, which skips the rows that were trained on
            continue
        if isinstance(loader, Stateful):
            return f"resume: exact after the first step of an epoch ({type(loader).__name__})"
        if isinstance(sampler, SequentialSampler):
            return "resume: exact only from the end of an epoch. EpochDataModule makes it exact everywhere"
        name = type(loader).__name__
        log.warning("a %s does not store its order, so no resume is exact. EpochDataModule makes it exact", name)
        return "resume: not exact"
    return "resume: exact, from every checkpoint"
