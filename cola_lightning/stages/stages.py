"""A resumable sequence of stages: finds those that are missing, or that were asked for otherwise, and trains them."""

import json
import logging
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import rich
import yaml
from jsonargparse import ArgumentError

from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.schedule import RESERVED, is_stage_name
from cola_lightning.cli.training import differences
from cola_lightning.errors import OutsideError, UserError, one_line
from cola_lightning.lora.config import LoRAConfig
from cola_lightning.stages.matrix import SHOWN, Matrix, scales_table
from cola_lightning.stages.options import StagesOptions
from cola_lightning.stages.replay import add_replay
from cola_lightning.stages.run import CONFIG, LAST
from cola_lightning.stages.scales import Scale, fit_scales
from cola_lightning.study.config import as_words, data_files, resolve_config
from cola_lightning.study.methods import model_option
from cola_lightning.study.run import LOG, OPTIONS, RESULT, claim_run, execute
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

Config = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its name, and its links'.
        folder: its run's.
        config: the complete configuration of its fit, as the user asks for it.
        files: sizes and hashes of its data's files.
    """

    name: str
    folder: Path
    config: Config
    files: dict[str, Any]


class Stages:
    """A sequence of stages, from the first to the last.

    Args:
        options: those of the command.
        fit_words: options of ``cola fit`` for every stage.

    Raises:
        UserError: for what any stage's fit would refuse when its options are parsed.
    """

    def __init__(self, options: StagesOptions, fit_words: Sequence[str]) -> None:
        configs = stage_configs(options.config, fit_words)
        before: Config | None = None
        for stage, config in configs.items():  # what a fit would refuse once the first stage is trained
            sizes = {name: model_option(config, name) for name in ("rank", "alpha", "init_chain", "init_knot")}
            if before is not None:
                config["model"]["init_args"] |= {"init_chain": None, "init_links": None, "init_knot": options.knot}
                if options.knot != "cola" and any(before[name] != sizes[name] for name in ("rank", "alpha")):
                    raise UserError(
                        f"stages.{stage}: with --knot {options.knot}, all stages have one model.rank and model.alpha"
                    )
            before = sizes
        if options.replay is not None:
            add_replay(configs, options.replay)
        self.folder, self.max_forgetting, self.fits_scales = Path(options.output), options.max_forgetting, options.fit_scales
        self.stages = [Stage(name, self.folder / name, config, data_files(config)) for name, config in configs.items()]

    def run(self) -> int:
        """Trains the stages that are missing, in order, and then shows the matrix; returns the exit status."""
        finished: list[Stage] = []
        for stage in self.stages:
            if not self._train(stage, finished[-1] if finished else None):
                log.error("failed: %s", stage.folder / LOG)
                break
            finished.append(stage)
        tests = {stage.name: rows for stage in finished if (rows := self._test(stage, finished))}
        kinds = {stage.name: " ".join(stage.config[name]["class_path"] for name in ("model", "data")) for stage in finished}
        is_finished, matrix = len(finished) == len(self.stages), Matrix.of(tests, kinds)
        if not matrix.columns:
            log.warning("no matrix: no stage has tests that log %s", " or ".join(f"test_{name}" for name in SHOWN))
            return 0 if is_finished and self.max_forgetting is None else 1
        matrix.write(self.folder)
        if find_spec("matplotlib"):
            matrix.draw(self.folder / "matrix.png")
        else:
            log.info("matrix.png: needs matplotlib")
        rich.print(matrix.on_screen())
        for sentence in matrix.averages:
            log.info("%s", sentence)
        log.info("written: %s", self.folder / "matrix.csv")
        if self.fits_scales and is_finished:
            self._fit_scales(tests, kinds)
        return self._check_forgetting(matrix) if is_finished else 1

    def _check_forgetting(self, matrix: Matrix) -> int:
        """Returns the exit status: 3 if a task was forgotten by more than the user allows."""
        worst = max(matrix.columns, key=lambda column: column.forgetting.value, default=None)
        if worst is None or self.max_forgetting is None or worst.forgetting.value <= self.max_forgetting:
            return 0
        log.error(
            "max_forgetting: %s is worse by %.4g in %s than at its best, and %g is allowed",
            *(worst.task, worst.forgetting.value, worst.metric, self.max_forgetting),
        )
        return 3

    def _test(self, stage: Stage, finished: Sequence[Stage]) -> list[dict[str, Any]]:
        """Tests the base and the model after each finished stage on a stage's test data.

        Returns:
            A row of metrics for each state of the model; empty if `cola test` refuses the stage.

        Raises:
            OutsideError: if the tests failed.
        """
        try:
            states = ["base", *(other.name for other in finished)]
            return self._measure(stage, finished[-1], "test", {name: {} for name in states}, "matrix")
        except UserError as error:  # no test rows, for example
            if self.max_forgetting is not None:
                raise
            log.warning("stage %s: is not in the matrix (%s)", stage.name, error)
            return []

    def _fit_scales(self, tests: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str]) -> None:
        """Chooses a factor for each stage, shows the tests with these factors, and writes ``scales.yaml``.

        Args:
            tests: each task's tests without factors.
            kinds: see :class:`Matrix`.
        """
        last, names = self.stages[-1], [stage.name for stage in self.stages]

        def losses_of(name: str, tried: Sequence[Scale]) -> list[list[float]]:
            states = {str(number): scale for number, scale in enumerate(tried)}  # no stage can have a number as its name
            log.info("fit_scales: stage %s (%d of %d)", name, names.index(name) + 1, len(names))
            tasks = [self._measure(stage, last, "validate", states, f"scales/{name}") for stage in self.stages]
            return [
                [sum(row[key] for key in row if key.startswith("val_loss")) for row in rows]
                for rows in zip(*tasks, strict=True)
            ]

        scale = fit_scales(names, losses_of)
        with atomic_file(self.folder / "scales.yaml") as partial:
            partial.write_text(yaml.safe_dump(dict(scale), sort_keys=False), encoding="utf-8")
        log.info("written: %s", self.folder / "scales.yaml")
        factors = {name: factor for name, factor in scale.items() if factor != 1}
        if not factors:
            log.info("fit_scales: no other factor is better than 1")
            return
        of_tasks = [stage for stage in self.stages if stage.name in tests]
        scaled = {stage.name: self._measure(stage, last, "test", {"0": scale}, "scaled") for stage in of_tasks}
        columns = Matrix.of({name: [*tests[name], *rows] for name, rows in scaled.items()}, kinds).columns
        rich.print(scales_table(last.name, columns))
        factor_text = yaml.safe_dump(factors, default_flow_style=True).strip()
        log.info("export it: %s", shlex.join(["cola", "export", str(last.folder), "--scale", factor_text, "--output", "DIR"]))

    def _measure(
        self, stage: Stage, last: Stage, command: str, states: Mapping[str, Mapping[str, float]], name: str
    ) -> list[dict[str, Any]]:
        """Measures states of the model on a stage's data, from the last checkpoint alone.

        The module's class and data are those of the stage, and its links those of the checkpoint. What was measured of the
        same checkpoint is not measured again.

        Args:
            stage: the stage.
            last: the one with the checkpoint.
            command: ``test``, or ``validate`` for the validation data.
            states: see :class:`~cola_lightning.stages.run.StageTests`.
            name: of the folder in the stage's folder.

        Returns:
            A row of metrics for each state.

        Raises:
            UserError: if the command refuses the stage.
            OutsideError: if it failed.
        """
        folder, model, checkpoint = stage.folder / name, stage.config["model"], read(last.folder / RESULT)["checkpoint"]
        asked = {"config": stage.config, "files": stage.files, "states": states, "checkpoint": checkpoint}
        known = read(folder / RESULT)
        if known and read(folder / OPTIONS)["asked"] == asked:
            return list(known["rows"])
        (folder / RESULT).unlink(missing_ok=True)
        of_last = last.config["model"]["init_args"]
        lora = {field.name for field in fields(LoRAConfig)} & model["init_args"].keys() & of_last.keys()
        init_args = model["init_args"] | {name: of_last[name] for name in lora}
        init_args |= {"init_chain": None, "init_links": None, "init_knot": "cola"}
        reference = init_args.get("reference", "start")
        if "reference" in init_args:  # which rows without these links do not have: they are their own reference
            init_args["reference"] = "start"
        trainer = stage.config["trainer"] | {"enable_progress_bar": False, "logger": None}
        options = {
            "config": stage.config | {"model": model | {"init_args": init_args}, "trainer": trainer},
            "asked": asked,
            "checkpoint": str(last.folder / LAST),
            "command": command,
            "states": states,
            "reference": start_of(stage.name, last) if reference in ("start", "link") else reference,
        }
        if not execute_in(folder, options):
            raise OutsideError(f"stage {stage.name}: {command} failed, see {folder / LOG}")
        return list(read(folder / RESULT)["rows"])

    def _train(self, stage: Stage, before: Stage | None) -> bool:
        """Trains a stage unless it is finished, and returns whether it is then."""
        place = f"stage {stage.name} ({self.stages.index(stage) + 1} of {len(self.stages)})"
        after = None if before is None else read(before.folder / RESULT)["checkpoint"]
        asked = {"config": stage.config, "files": stage.files, "after": after}
        earlier = read(stage.folder / OPTIONS).get("asked", {})
        other, *_ = next(differences(asked, earlier), (None,)) if earlier else (None,)
        if earlier and other is None and read(stage.folder / RESULT):
            log.info("%s: finished", place)
            return True
        if other not in (None, "after"):  # "after": the stage that has changed has said so
            what = "its data" if other.startswith("files") else other.removeprefix("config.").replace(".init_args", "")
            log.info("%s: %s has changed, so this stage and the later ones are trained again", place, what)
        if earlier:
            (stage.folder / RESULT).unlink(missing_ok=True)
        config = stage.config | {"trainer": stage.config["trainer"] | {"enable_progress_bar": False}}  # its output is in a file
        if before is not None:
            init_args = stage.config["model"]["init_args"] | {"init_chain": str(before.folder / LAST)}
            config["model"] = stage.config["model"] | {"init_args": init_args}
        log.info("%s: training, see %s", place, stage.folder / LOG)
        return execute_in(stage.folder, {"config": config, "asked": asked})


def read(path: Path) -> dict[str, Any]:
    """What a file of a run has; empty if there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def start_of(stage: str, last: Stage) -> int:
    """How many links the model had when a stage began.

    Args:
        stage: its name.
        last: a later stage, or itself.
    """
    links = read_chain(last.folder / LAST).links
    return next(link.index for link in links if link.name == stage)


def execute_in(folder: Path, options: Mapping[str, Any]) -> bool:
    """Executes a run in its folder, by a process of its own, and returns whether it has a result.

    Args:
        folder: the run's.
        options: its complete ``config``, what is ``asked`` for, which a later call compares, and what else its process needs.

    Raises:
        UserError: if the run refuses its options, or another process executes it.
    """
    if (folder / LAST).exists() and not (folder / OPTIONS).exists():
        raise UserError(f"output: {str(folder)!r} has another run, which would be lost. Use another --output")
    if (claim := claim_run(folder)) is None:
        raise UserError(f"output: another process is at work in {str(folder)!r}. Wait for its end")
    try:
        with atomic_file(folder / CONFIG) as partial:
            partial.write_text(yaml.safe_dump(options["config"], sort_keys=False), encoding="utf-8")
        return execute(claim, options, "stages")
    finally:
        claim.unlink(missing_ok=True)


# ---------------------------------------------------------------------- the configuration


def stage_configs(path: str, fit_words: Sequence[str]) -> dict[str, Config]:
    """The complete configuration of each stage's fit, by its name, in order.

    Args:
        path: a config file of ``cola fit`` with the group ``stages``.
        fit_words: options of ``cola fit`` for every stage.

    Raises:
        UserError: for names that no stage can have, and for what a fit would refuse when its options are parsed.
    """
    base, stages = read_stages(path)
    configs = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "config.yaml"), Path(folder, "stage.yaml")]
        for name, changes in stages.items():
            for file, content in zip(files, (base, changes), strict=True):
                file.write_text(yaml.safe_dump(content), encoding="utf-8")
            words = [word for file in files for word in ("--config", str(file))]
            try:
                configs[name] = resolve_config([*words, *fit_words, *as_words({"chain.name": name})])
            except (ArgumentError, UserError) as error:
                message = one_line(str(error)) + "".join(getattr(error, "__notes__", []))
                for file in files:
                    message = message.replace(str(file), path)
                raise UserError(f"stages.{name}: {message}") from error
            if configs[name]["ckpt_path"] is not None:
                raise UserError(f"stages.{name}: ckpt_path must be left out. A stage that was stopped is resumed by itself")
    return configs


def read_stages(path: str) -> tuple[Config, dict[str, Config]]:
    """What a config file says of all stages, and of each.

    Raises:
        UserError: for a file that cannot be read, and for names that no stage can have.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        config, root = yaml.safe_load(text), yaml.compose(text)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"config: cannot read {path!r}: {getattr(error, 'strerror', None) or one_line(str(error))}") from error
    stages = config.pop("stages", None) if isinstance(config, dict) else None
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"stages: {path} must name its stages in order: `stages: {{sft: ..., dpo: ...}}`")
    assert isinstance(root, yaml.MappingNode)
    nodes = next(value for key, value in root.value if key.value == "stages").value
    names = [key.value for key, _ in nodes]  # as they are written: a dict would not have a name twice
    for index, name in enumerate(names):
        if not is_stage_name(name):
            raise UserError(f"stages: a stage's name must be a text other than a number, {', '.join(RESERVED)}, got {name!r}")
        if name in names[:index]:
            raise UserError(f"stages: there are two stages {name!r}. Each needs a name of its own")
    return config, {name: changes or {} for name, changes in zip(names, stages.values(), strict=True)}
