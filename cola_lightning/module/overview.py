"""What a fit will do, before its first step: for its reader, and its configuration for loggers."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parameter import is_lazy
from torch.utils.data import SequentialSampler

from cola_lightning import layout
from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.lora.experts import is_experts
from cola_lightning.lora.inject import is_linear
from cola_lightning.lora.layer import is_quantized, lora_layers
from cola_lightning.module.arguments import MARK, class_path, is_recorded
from cola_lightning.module.optimization import LinkLR
from cola_lightning.module.run import Run
from cola_lightning.module.state import described_data

MOST_KINDS, MOST_KNOTS = 5, 8  # that are named
WARNINGS = ("WARNING", "resume: not exact")  # begin lines that say what is most likely not meant
HORIZONS = ("total_steps", "T_max", "total_iters")  # the attributes in which torch's schedulers have their length


def describe_fit(trainer: Any, run: Run, parameters: list[nn.Parameter]) -> list[str]:
    """The lines of the block, at most fifteen.

    Args:
        trainer: the Trainer of the fit, whose data is set up.
        run: what the module's training is.
        parameters: all parameters of the module.
    """
    data = trainer.datamodule
    lines = [*describe_model(run.adapted), describe_parameters(run, parameters)]
    described = data.describe() if hasattr(data, "describe") else None  # another package's may be for something else
    lines += described if isinstance(described, list) else [f"data: {trainer.num_training_batches} batches in an epoch"]
    if run.adapted.layers:
        lines += [describe_knots(run), *describe_schedulers(trainer, run)]
    return [*lines, describe_resume(trainer), describe_folder(trainer)]


def describe_model(adapted: AdaptedModel) -> list[str]:
    """Which layers get links, and what stays frozen, by kind."""
    layers, saved = lora_layers(adapted.model), adapted.config.modules_to_save
    if not layers:
        return ["model: all parameters are trained, without links"]
    rank, alpha = adapted.current.size
    n_linear = sum(is_linear(module) for module in adapted.model.modules()) + len(layers)
    line = f"model: link {adapted.n_finished} of rank {rank} and alpha {alpha:g} on {len(layers)} of {n_linear} layers"
    lines = [line + (f"; all of {', '.join(saved)} is trained" if saved else "")]
    if kinds := frozen_kinds(adapted.model):
        named = [f"{n} {kind}" for kind, n in kinds.most_common(MOST_KINDS)]
        more = [f"{len(kinds) - MOST_KINDS} more kinds"] if len(kinds) > MOST_KINDS else []
        hint = " (model.experts true adapts experts)" if any(map(is_experts, adapted.model.modules())) else ""
        lines.append(f"frozen, without links: {', '.join(named + more)}{hint}")
    return lines


def frozen_kinds(model: nn.Module) -> Counter[str]:
    """How many modules of each kind have parameters of their own that are all frozen, and no link."""
    adapted = {id(layer) for layer in lora_layers(model).values()}
    kinds = Counter[str]()
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and id(module) not in adapted and not any(parameter.requires_grad for parameter in parameters):
            kinds[type(module).__name__] += 1
    return kinds


def describe_parameters(run: Run, parameters: list[nn.Parameter]) -> str:
    """How many parameters are trained."""
    if layout.has_fsdp1(run.adapted.model):  # which hides sharded parameters in flat ones
        return "parameters: sharded by FSDP"
    n_trained = sum(
        parameter.numel() for parameter in run.module.parameters() if parameter.requires_grad and not is_lazy(parameter)
    )
    packed = [part.get_parameter("weight") for part in run.adapted.model.modules() if is_quantized(part)]
    known = [parameter for parameter in parameters if not is_lazy(parameter)]
    n_all = sum(parameter.numel() for parameter in [*known, *packed])  # a packed weight has two values in a byte
    lazy = ", and those of lazy modules" if len(known) < len(parameters) else ""
    return f"parameters: {n_trained:,} of {n_all:,} are trained ({n_trained / max(1, n_all):.2%}){lazy}"


def describe_knots(run: Run) -> str:
    """What the knots of the fit do, and when they fall."""
    schedule = run.schedule
    if schedule.knot == "half" and schedule.has_knots and run.config.lr_schedule != "stable":
        advice = f"Knots of half were measured with model.lr_schedule stable, here it is {run.config.lr_schedule}"
        return f"{_knots(run)}. {advice}"
    return _knots(run)


def _knots(run: Run) -> str:
    schedule, length, start = run.schedule, run.length, run.current.start
    if not schedule.has_knots:
        return "knots: none, so this is plain LoRA"
    if length is None or schedule.has_unknown_lengths(length) or length.end_step == math.inf:
        return f"knots ({schedule.knot}): decided while training"
    lengths = schedule.link_lengths(start, length)
    steps = [start.global_step + sum(lengths[:k]) for k in range(1, len(lengths))]
    if not steps:
        return "knots: none in this run, which ends before the first"
    shown = ", ".join(map(str, steps[:MOST_KNOTS])) + (
        f" and {len(steps) - MOST_KNOTS} more" if len(steps) > MOST_KNOTS else ""
    )
    return f"knots ({schedule.knot}): before steps {shown}, of {length.end_step:,} steps"


def describe_schedulers(trainer: Trainer, run: Run) -> list[str]:
    """A line for each learning-rate scheduler of the user's that would not end with the link it is made for."""
    length, schedule = run.length, run.schedule
    if length is None or not schedule.has_knots or schedule.goes_on:
        return []
    steps, lines = run.steps_in(length), list[str]()
    for config in trainer.lr_scheduler_configs:
        name = type(config.scheduler).__name__
        horizon = next((getattr(config.scheduler, field) for field in HORIZONS if hasattr(config.scheduler, field)), 0)
        n_steps = horizon * config.frequency
        if config.interval == "step" and n_steps > steps and not isinstance(config.scheduler, LinkLR):
            what = f"{name} takes {n_steps:,} steps, but each link has {steps:,}, and a scheduler of its own"
            lines.append(f"WARNING: {what}. Use self.link_steps in configure_optimizers")
    return lines


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
        return f"resume: not exact, because a {type(loader).__name__} does not store its order. EpochDataModule makes it exact"
    return "resume: exact, from every checkpoint"


def describe_folder(trainer: Any) -> str:
    """The folder of the first callback that writes checkpoints."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    found = next((str(folder) for folder in folders if folder is not None), None)
    return "no checkpoint is written" if found is None else f"checkpoints: {found.removeprefix(f'{os.getcwd()}{os.sep}')}"


# ---------------------------------------------------------------------- for loggers


def configuration(trainer: Trainer, run: Run) -> dict[str, dict[str, Any]]:
    """The plain options of a fit, for loggers: of model, data, chain and optimizer; no secret, and nothing that is not set."""
    arguments, optimizer = run.arguments, trainer.optimizers[0]
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    found = {
        "model": {"class_path": arguments.class_path} | arguments.defaults | arguments.init_args,
        "chain": asdict(run.schedule),
        "optimizer": {"class_path": class_path(type(optimizer))} | _plain(optimizer.defaults),
    }
    if data is not None:
        found["data"] = {"class_path": class_path(type(data))} | described_data(run, "identity") | _plain(vars(data))
    is_set = {part: {name: value for name, value in options.items() if value is not None} for part, options in found.items()}
    text = json.dumps(is_set, default=str)  # of a marked configuration or dtype, its contents
    plain: dict[str, dict[str, Any]] = json.loads(text, object_hook=lambda value: value["value"] if MARK in value else value)
    return plain


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are numbers, texts or pairs of numbers, without what is private, a secret or Lightning's."""
    kinds, of_lightning = bool | int | float | str | tuple, vars(LightningDataModule())
    named = {name: value for name, value in values.items() if isinstance(value, kinds) and is_recorded(name)}
    return {name: value for name, value in named.items() if name[0] != "_" and name not in of_lightning}
