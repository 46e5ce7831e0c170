"""States of one chain's model, measured on the data of several stages: one model is loaded for all that can share it."""

import copy
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.chain.chain import number_of_links
from cola_lightning.cli.made_run import MadeRun, in_silence
from cola_lightning.errors import UserError, one_line
from cola_lightning.hf.transformers_module import RowValues
from cola_lightning.module.module import COLAModule
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
        pl_module.run.first_link, self.rows = self.first_link, {}

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


class Measurer:
    """Measures states of a checkpoint's model on the data of several stages.

    Stages with one class of module and equal options share a model. Their links are those of the last stage.

    Args:
        configs: the complete configuration of each stage's fit, by its name, in order.
        checkpoint: of the last one.
        keeps_models: whether the models stay in memory for another call, each with a copy of its base, from which a state with
            other factors is made.
    """

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], checkpoint: Path, *, keeps_models: bool) -> None:
        self.checkpoint, self.keeps_models = checkpoint, keeps_models
        self.groups: dict[str, dict[str, dict[str, Any]]] = {}
        self.references: dict[str, Any] = {}  # of preferences, as a number of links or a stage
        *_, last = configs.values()
        of_links = {field.name for field in fields(LinkConfig)} | {"optimizer"}
        for name, config in configs.items():
            own, theirs = config["model"]["init_args"], last["model"]["init_args"]
            init_args = own | {name: theirs[name] for name in of_links & own.keys() & theirs.keys()}
            init_args |= {"init_chain": None, "init_links": None, "init_continues": [], "init_knot": "cola"}
            self.references[name] = init_args.get("reference", "start")
            if "reference" in init_args:  # which rows without these links do not have: they are their own reference
                init_args["reference"] = "start"
            trainer = {name: (last if name in OF_FIT else config)["trainer"][name] for name in config["trainer"]}
            shared = {"model": config["model"] | {"init_args": init_args}, "trainer": trainer | {"logger": False}}
            ours = {**config, **shared} | {"ckpt_path": str(checkpoint)}
            self.groups.setdefault(json.dumps(shared), {})[name] = ours
        self.made: dict[str, dict[str, MadeRun]] = {}

    def measure(self, command: str, states: Mapping[str, Scale]) -> dict[str, list[Row]]:
        """Measures states of the model.

        Args:
            command: ``test``, or ``validate`` for the validation data.
            states: by their names, factors of the stages' updates. A state whose name is ``base`` or a stage's is the model
                without the later stages, and another one has all stages.

        Returns:
            By stage, unless it cannot be measured, a row for each state, with ``links``, ``stage``, ``kind``: the classes of
            model and data, metrics, and ``row_values``: by metric, what each row adds.
        """
        rows: dict[str, list[Row]] = {}
        for key, configs in self.groups.items():
            with in_silence():
                made = self.made.pop(key, None) or self._made(configs)
            rows |= self._measure_group(made, command, states)
            if self.keeps_models:
                self.made[key] = made
        return {name: rows[name] for name in self.references if name in rows}

    def _made(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, MadeRun]:
        made = {name: MadeRun(config, "test") for name, config in configs.items()}
        model: Any = next(iter(made.values())).model
        if self.keeps_models and not getattr(model, "quantization", None):
            built = functools.cache(model.build_model)
            model.build_model = lambda: copy.deepcopy(built())
        return made

    def _measure_group(self, made: Mapping[str, MadeRun], command: str, states: Mapping[str, Scale]) -> dict[str, list[Row]]:
        rows: dict[str, list[Row]] = {name: [] for name in made}
        first: Any = next(iter(made.values()))
        trainer, names = first.trainer, first.opened.state.names
        run = trainer.test if command == "test" else trainer.validate
        trainer.callbacks = [collector := RowCollector(), *(c for c in trainer.callbacks if not isinstance(c, RowCollector))]
        kinds = {name: " ".join(type(part).__name__ for part in (one.model, one.datamodule)) for name, one in made.items()}
        links = {"base": 0} | {name: number_of_links(name, names) for name in names if name}
        with first.watch.listening():
            for number, (state, scale) in enumerate(states.items(), start=1):  # outside of the stages: links are only added
                log.info("%s %s: state %d of %d", command, ", ".join(rows), number, len(states))
                for name in list(rows):
                    reference, n_links = self.references[name], links.get(state, len(names))
                    is_start = reference in ("start", "link")
                    collector.first_link = names.index(name) if is_start else number_of_links(reference, names)
                    first.model.expect_state(first.opened.state, links=n_links, scale=scale)
                    first.model.trained_template = None  # of the last stage's data: each stage's names its own
                    logging.disable(logging.INFO)  # the fit has said it
                    try:
                        data = made[name].datamodule
                        found = run(first.model, datamodule=data, ckpt_path=str(self.checkpoint), verbose=False)
                    except (UserError, MisconfigurationException) as error:
                        log.error("stage %s: cannot be measured (%s)", name, one_line(str(error)))
                        del rows[name]
                        continue
                    finally:
                        logging.disable(logging.NOTSET)
                    row = {"links": n_links, "stage": state, "kind": kinds[name], "row_values": collector.rows}
                    rows[name].append({key: value for metrics in (row, *found) for key, value in metrics.items()})
        return rows
