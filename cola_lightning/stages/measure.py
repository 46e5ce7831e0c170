"""States of one chain's model, measured on the data of several stages: one model is loaded for all that can share it."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.callbacks.command import RunWatch
from cola_lightning.chain.chain import number_of_links
from cola_lightning.cli.training import COLACLI, in_silence
from cola_lightning.errors import UserError, one_line
from cola_lightning.hf.transformers_module import RowValues
from cola_lightning.module import COLAModule
from cola_lightning.module.optimization import LinkConfig

log = logging.getLogger(__name__)

Scale = Mapping[str, float]  # the factor of each stage's updates
Row = dict[str, Any]
# Options of the Trainer that matter to no evaluation.
OF_FIT = {"max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "overfit_batches"}
OF_FIT |= {"val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps"}
OF_FIT |= {"accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "reload_dataloaders_every_n_epochs"}


class RowCollector(Callback):
    """Collects what each test row adds to a metric, and sets the reference of preferences.

    Attributes:
        first_link: how many links the reference of preferences has, whatever the checkpoint's last run began from.
        rows: by metric, the values and weights of the last test's rows.
    """

    first_link = 0

    def __init__(self) -> None:
        self.rows: dict[str, list[list[float]]] = {}

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, COLAModule)
        pl_module.fit_progress.first_link, self.rows = self.first_link, {}

    on_test_start = on_validation_start

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collects the values of the batch's rows, of a ``test_step`` that returns them."""
        suffix = f"/dataloader_idx_{dataloader_idx}" * (len(trainer.num_test_batches) > 1)
        for name, rows in outputs.items() if isinstance(outputs, Mapping) else ():
            if isinstance(rows, RowValues):
                collected = self.rows.setdefault(f"test_{name}{suffix}", [[], []])
                for numbers, of_batch in zip(collected, rows, strict=True):
                    numbers += of_batch.tolist()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Joins the rows of all processes."""
        parts = layout.gather_objects(self.rows)
        self.rows = {name: [[n for part in parts for n in part[name][place]] for place in (0, 1)] for name in parts[0]}


class Evaluation(COLACLI):
    """A ``cola test`` or ``cola validate`` whose objects are made, and then used by :func:`measure`."""

    @override
    def _run_subcommand(self, subcommand: str) -> None: ...


class Task:
    """A stage's data, and the options by which it is measured.

    Args:
        name: the stage's.
        config: the complete configuration of the stage's fit.
        of_last: that of the last stage, whose links are measured.

    Attributes:
        config: a complete configuration. Tasks with the same ``model`` and ``trainer`` are measured on one model.
        reference: of preferences, as a number of links or a stage.
    """

    def __init__(self, name: str, config: Mapping[str, Any], of_last: Mapping[str, Any]) -> None:
        self.name, model = name, config["model"]
        theirs = of_last["model"]["init_args"]
        of_links = ({field.name for field in fields(LinkConfig)} | {"optimizer"}) & model["init_args"].keys() & theirs.keys()
        init_args = model["init_args"] | {name: theirs[name] for name in of_links}
        init_args |= {"init_chain": None, "init_links": None, "init_knot": "cola"}
        self.reference = init_args.get("reference", "start")
        if "reference" in init_args:  # which rows without these links do not have: they are their own reference
            init_args["reference"] = "start"
        trainer = config["trainer"] | {"logger": False}
        trainer |= {name: value for name, value in of_last["trainer"].items() if name in OF_FIT}
        self.config = config | {"model": model | {"init_args": init_args}, "trainer": trainer}


def measure(
    tasks: Sequence[Task], checkpoint: Path, command: str, states: Mapping[str, Scale], *, may_refuse: bool = False
) -> dict[str, list[Row]]:
    """Measures states of a checkpoint's model on the data of stages.

    Args:
        tasks: the stages' data.
        checkpoint: of the last stage.
        command: ``test``, or ``validate`` for the validation data.
        states: by their names, factors of the stages' updates. A state whose name is ``base`` or a stage's is the model without
            the later stages, and another one has all stages.
        may_refuse: whether a task that the command refuses, such as one without test rows, is left out with a warning.

    Returns:
        By task, a row for each state, with ``links``, ``stage``, metrics, and ``row_values``: by metric, what each row adds.

    Raises:
        UserError: if the command refuses a task.
    """
    rows: dict[str, list[Row]] = {task.name: [] for task in tasks}
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(json.dumps([task.config["model"], task.config["trainer"]]), []).append(task)
    for group in groups.values():
        watch, collector = RunWatch(), RowCollector()
        with watch.listening():
            runs = {task.name: _evaluation(task, checkpoint, command, watch, states) for task in group}
            opened, trainer, module = (getattr(runs[group[0].name], name) for name in ("opened", "trainer", "model"))
            trainer.callbacks = [collector, *trainer.callbacks]
            names = opened.state.names
            links = {"base": 0} | {name: number_of_links(name, names) for name in names if name}
            for number, (state, scale) in enumerate(states.items(), start=1):  # outside of the tasks: links are only added
                log.info("%s %s: state %d of %d", command, ", ".join(runs), number, len(states))
                for task in [task for task in group if task.name in rows]:
                    is_start = task.reference in ("start", "link")
                    collector.first_link = names.index(task.name) if is_start else number_of_links(task.reference, names)
                    n_links = links.get(state, len(names))
                    module.expect_state(opened.state, links=n_links, scale=scale)
                    run = trainer.test if command == "test" else trainer.validate
                    try:
                        with in_silence():
                            found = run(module, datamodule=runs[task.name].datamodule, ckpt_path=str(checkpoint), verbose=False)
                    except (UserError, MisconfigurationException) as error:
                        if not may_refuse:
                            raise UserError(f"stages.{task.name}: {one_line(str(error))}") from error
                        log.warning("stage %s: is not in the matrix (%s)", task.name, one_line(str(error)))
                        del rows[task.name]
                        continue
                    row = {"links": n_links, "stage": state, "row_values": collector.rows}
                    rows[task.name].append({name: value for metrics in (row, *found) for name, value in metrics.items()})
    return rows


def _evaluation(task: Task, checkpoint: Path, command: str, watch: RunWatch, states: Mapping[str, Scale]) -> Evaluation:
    """The objects of a command for a task's data."""
    init_args, config = task.config["model"]["init_args"], task.config | {"ckpt_path": str(checkpoint)}
    if any(states.values()) and not init_args.get("quantization"):  # each state begins at the base, which stays in memory
        config["model"] = config["model"] | {"init_args": init_args | {"save_base": True}}
    return Evaluation([command], watch, None, config)
