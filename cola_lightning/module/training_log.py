"""What loggers get of a fit, in addition to metrics: its configuration, and of each step the rate, the speed and the norm."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from cola_lightning import layout
from cola_lightning.module.arguments import MARK, class_path, is_recorded
from cola_lightning.module.state import data_facts
from cola_lightning.module.step_loss import Late

if TYPE_CHECKING:
    from cola_lightning.module.module import COLAModule


class TrainingLog:
    """The log of one fit, which begins with its configuration.

    Args:
        trainer: the Trainer of the fit.
        module: the module.
    """

    def __init__(self, trainer: Trainer, module: "COLAModule") -> None:
        self.module = module
        self._waiting: tuple[int, dict[str, float], Late | None] | None = None  # the present step's, if logged
        self.restart_clock()
        for logger in trainer.loggers:
            logger.log_hyperparams(configuration(trainer, module))

    def restart_clock(self) -> None:
        """Begins to measure the speed: at the start, at a logged step, and after a validation, which is no training."""
        self._since, self._n_before = time.perf_counter(), self.module.step_loss.n_tokens

    def add(self, trainer: Any, optimizer: Optimizer) -> None:
        """Takes the values of an optimizer step, before it, if Lightning will log it."""
        every, step = trainer.log_every_n_steps, trainer.global_step  # counted from 0, as Lightning logs it
        if not trainer.loggers or not every or not ((step + 1) % every == 0 or trainer.should_stop):
            return
        values, rate = {"link": float(self.module.n_finished)}, optimizer.param_groups[0]["lr"]
        if rate is not None:  # Adafactor may choose its own
            values["lr"] = float(rate)
        if n_tokens := self.module.step_loss.n_tokens - self._n_before:  # of this process, whose others have about as many
            values["tokens_per_second"] = n_tokens * trainer.world_size / (time.perf_counter() - self._since)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        is_whole = not any(map(layout.is_sharded, gradients))  # else the norm needs all processes
        self._waiting = step, values, Late(get_total_norm(gradients)) if is_whole else None
        self.restart_clock()

    def flush(self, trainer: Trainer) -> None:
        """Logs the values that are waiting, at the end of the batch, where Lightning reads the loss from the device."""
        if self._waiting is None:
            return
        (step, values, norm), self._waiting = self._waiting, None
        for logger in trainer.loggers:
            logger.log_metrics(values | ({} if norm is None else {"grad_norm": norm.read()}), step=step)


def configuration(trainer: Trainer, module: "COLAModule") -> dict[str, dict[str, Any]]:
    """The plain options of a fit: of model, data, chain and optimizer; no secret, and nothing that is not set."""
    arguments, optimizer = module.constructor_arguments, trainer.optimizers[0]
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    found = {
        "model": {"class_path": arguments["class_path"]} | arguments["defaults"] | arguments["init_args"],
        "chain": asdict(module.fit_progress.schedule),
        "optimizer": {"class_path": class_path(type(optimizer))} | _plain(optimizer.defaults),
    }
    if data is not None:
        found["data"] = {"class_path": class_path(type(data))} | data_facts(trainer, "identity") | _plain(vars(data))
    is_set = {part: {name: value for name, value in options.items() if value is not None} for part, options in found.items()}
    text = json.dumps(is_set, default=str)  # of a marked configuration or dtype, its contents
    plain: dict[str, dict[str, Any]] = json.loads(text, object_hook=lambda value: value["value"] if MARK in value else value)
    return plain


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are numbers, texts or pairs of numbers, without what is private, a secret or Lightning's."""
    kinds, of_lightning = bool | int | float | str | tuple, vars(LightningDataModule())
    named = {name: value for name, value in values.items() if isinstance(value, kinds) and is_recorded(name)}
    return {name: value for name, value in named.items() if name[0] != "_" and name not in of_lightning}
