"""A resumable sequence of stages: finds those that are missing, or whose result would be another one, and trains them."""

import gc
import logging
import re
import shlex
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO, cast

import rich
import yaml
from jsonargparse import ArgumentError
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.callbacks.command import RunWatch
from cola_lightning.chain.base import BaseIdentity, check_same_base
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.schedule import RESERVED, is_stage_name
from cola_lightning.cli.training import COLACLI, MadeRun, in_silence, resolve
from cola_lightning.errors import UserError, causes, one_line
from cola_lightning.runs.facts import DEVICES, changes, facts_of, option_changes
from cola_lightning.runs.folder import LAST, claim, hash_of_last, read_record, set_aside, write_record
from cola_lightning.runs.processes import by_first, is_first, join
from cola_lightning.stages.matrix import SHOWN, Matrix, scales_table
from cola_lightning.stages.measure import Measurer, Row
from cola_lightning.stages.options import StagesOptions
from cola_lightning.stages.replay import add_replay
from cola_lightning.stages.scales import Scale, fit_scales
from cola_lightning.study.methods import model_option
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

Config = dict[str, Any]
RECORD = "run.json"  # in a stage's folder: what its result depends on and, once it is finished, a hash of its checkpoint
TAKEN = ("base", "null", "measured")  # a row of the matrix; no name for the parser; a folder of this command's
NAME = re.compile(r"\w[\w. -]{0,99}")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its name, and its links'.
        folder: its run's.
        config: the complete configuration of its fit, without replay and the chain that it begins from.
        fit_config: the same with replay.
        facts: what its result depends on, besides the stage before it.
    """

    name: str
    folder: Path
    config: Config
    fit_config: Config
    facts: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """What is known of its run; empty if it has not begun."""
        return read_record(self.folder / RECORD)


class Rehearsal(COLACLI):
    """A fit that ends before its first step: by then it has read its rows, made its model, and refused what it refuses.

    Args:
        config: the fit's complete configuration.
        before: the base of the stage before it, on which this one must go on.
    """

    def __init__(self, config: Config, before: BaseIdentity | None) -> None:
        self.before = before
        quiet = {"max_steps": 0, "max_epochs": 1, "max_time": None, "num_sanity_val_steps": 0, "logger": False}
        trainer = config["trainer"] | quiet | {"enable_progress_bar": False, "enable_model_summary": False}
        super().__init__(["fit"], RunWatch(), None, config | {"trainer": trainer})
        self.base: BaseIdentity = self.model.adapted.chain.base
        if before is not None:
            check_same_base(before, self.base)

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.before is not None and self.model.labels_of_base is None:  # as from the chain
            self.model.labels_of_base = self.before.labels

    @override
    def after_fit(self) -> None: ...


class StageFit(COLACLI):
    """The fit of a stage, whose next command is the same one again."""

    @override
    def _log_command(self, what: str, subcommand: str) -> None: ...


class Stages:
    """A sequence of stages, from the first to the last.

    Args:
        options: those of the command.
        fit_words: options of ``cola fit`` for every stage.

    Raises:
        UserError: for what any stage's fit would refuse when its options are parsed and its objects are made.
    """

    def __init__(self, options: StagesOptions, fit_words: Sequence[str]) -> None:
        self.options, self.folder, self.claim = options, Path(options.output), cast(TextIO | None, None)
        configs = stage_configs(options, fit_words)
        with_replay = {name: {**config, "trainer": dict(config["trainer"])} for name, config in configs.items()}
        if options.replay is not None:
            add_replay(with_replay, options.replay)
        self.stages, self.measurer = list[Stage](), cast(Measurer | None, None)
        for name, config in configs.items():
            with _of_stage(name), in_silence():
                fit = MadeRun(config)
                has_replay = with_replay[name]["trainer"] != config["trainer"]
                before = {"knot": options.knot if self.stages else None, "replay": options.replay if has_replay else None}
                facts = facts_of(config, fit.datamodule, **before)
            self.stages.append(Stage(name, self.folder / name, config, with_replay[name], facts))
            if name == next(iter(configs)):
                self.first_trainer = fit.trainer

    def run(self) -> int:
        """Trains the stages that are missing, in order, and then shows the matrix; returns the exit status."""
        join(self.first_trainer)
        if not by_first(self._claim):
            raise UserError(f"output: another process is at work in {str(self.folder)!r}. Wait for its end")
        try:
            return self._run()
        finally:
            if self.claim is not None:
                self.claim.close()

    def _run(self) -> int:
        self._rehearse(by_first(self._missing))
        finished, failure = list[Stage](), None
        for stage in self.stages:
            try:
                self._train(stage, finished[-1] if finished else None)
            except Exception as error:
                if layout.has_processes() or not finished:  # the other processes may not get here
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold the model
                failure = error
                log.error("failed: stage %s. This is the matrix of the stages before it", stage.name)
                break
            finally:
                gc.collect()
            finished.append(stage)
        status = self._show(finished, is_finished=failure is None)
        if failure is not None:
            raise failure
        return status

    # ------------------------------------------------------------------ what is missing

    def _claim(self) -> bool:
        self.claim = claim(self.folder / ".claim")
        return self.claim is not None

    def _missing(self) -> list[str]:
        """The stages that have to be trained from their start, as far as that is known before the first one is trained."""
        missing, after = list[str](), None
        for stage in self.stages:
            record = stage.record
            if not record and (stage.folder / LAST).exists():
                raise UserError(f"output: {str(stage.folder)!r} has another run, which would be lost. Use another --output")
            if missing:  # the stage before may come out as it was
                after = record.get("facts", {}).get("after")
            if why_again(stage, stage.facts | {"after": after}) is not None:
                missing.append(stage.name)
            after = record.get("checkpoint")
        return missing

    def _rehearse(self, missing: Sequence[str]) -> None:
        """Lets each missing stage refuse what it refuses, before anything is trained, and what is measured at the end too.

        Raises:
            UserError: naming the stage.
        """
        base: BaseIdentity | None = None
        for stage in self.stages:
            if stage.name not in missing:
                base = read_chain(stage.folder).base
                continue
            with _of_stage(stage.name), in_silence():
                log.debug("rehearsal of stage %s", stage.name)
                rehearsal = Rehearsal(stage.fit_config, base)
                base, data, options = rehearsal.base, rehearsal.datamodule, self.options
                if options.fit_scales and not sum(rehearsal.trainer.num_val_batches):
                    raise UserError("--fit_scales needs validation rows, and there are none. Set data.val_size")
                if options.max_forgetting is not None and not getattr(data, "can_be_tested", True):
                    raise UserError("--max_forgetting needs test rows, and there are none. Set data.test_size")
            del rehearsal, data
            gc.collect()

    # ------------------------------------------------------------------ a stage

    def _train(self, stage: Stage, before: Stage | None) -> None:
        """Trains a stage, or resumes it, unless it is finished."""
        config = by_first(lambda: self._begin(stage, before))
        if config is None:
            return
        watch = RunWatch()
        with _of_stage(stage.name), watch.listening(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")  # of a run that was stopped
            StageFit(["fit"], watch, stage.folder, config)
        by_first(lambda: write_record(stage.folder / RECORD, stage.record | {"checkpoint": hash_of_last(stage.folder)}))

    def _begin(self, stage: Stage, before: Stage | None) -> Config | None:
        """Makes a stage's folder ready for its fit; returns the configuration of that, or None if the stage is finished."""
        place = f"stage {stage.name} ({self.stages.index(stage) + 1} of {len(self.stages)})"
        facts = stage.facts | {"after": None if before is None else before.record["checkpoint"]}
        record, why = stage.record, why_again(stage, facts)
        if why is None and "checkpoint" in record:
            log.info("%s: finished", place)
            return None
        if why is None:
            for name, here, there in option_changes(facts, record["facts"]):
                if name in DEVICES:
                    log.info("%s: goes on with %s %s, and began with %s", place, name, here, there)
            log.info("%s: goes on from %s", place, stage.folder / LAST)
            return self._fit_config(stage, record["init_chain"]) | {"ckpt_path": str(stage.folder / LAST)}
        if why:
            log.info("%s: %s, so it is trained again. The earlier run is kept in %s", place, why, set_aside(stage.folder))
        init_chain = None if before is None else str((before.folder / LAST).absolute())
        write_record(stage.folder / RECORD, {"facts": facts, "init_chain": init_chain})
        log.info("%s: training", place)
        return self._fit_config(stage, init_chain)

    def _fit_config(self, stage: Stage, init_chain: str | None) -> Config:
        """The configuration of a stage's fit.

        Args:
            stage: the stage.
            init_chain: the checkpoint that it begins from; None: that of its own options.
        """
        config, model = stage.fit_config, stage.fit_config["model"]
        init_args = model["init_args"]
        if init_chain is not None:
            init_args = init_args | {"init_chain": init_chain, "init_knot": self.options.knot}
        # Where Lightning writes, and looks for, the checkpoint of a job that the cluster has requeued.
        trainer = config["trainer"] | {"default_root_dir": str(stage.folder)}
        return config | {"model": model | {"init_args": init_args}, "trainer": trainer}

    # ------------------------------------------------------------------ the matrix

    def _show(self, finished: Sequence[Stage], *, is_finished: bool) -> int:
        """Measures and shows the matrix of the finished stages; returns the exit status."""
        may_refuse, self.finished = self.options.max_forgetting is None, finished
        states: dict[str, Scale] = {name: {} for name in ("base", *(stage.name for stage in finished))}
        tests = self._measure("matrix", "test", states, may_refuse=may_refuse)
        kinds = {stage.name: " ".join(stage.config[name]["class_path"] for name in ("model", "data")) for stage in finished}
        matrix = Matrix.of(tests, kinds)
        if not matrix.columns:
            log.warning("no matrix: no stage has tests that log %s", " or ".join(f"test_{name}" for name in SHOWN))
            return 0 if may_refuse else 1
        if is_first():
            matrix.write(self.folder)
            if find_spec("matplotlib"):
                matrix.draw(self.folder / "matrix.png")
            else:
                log.info("matrix.png: needs matplotlib")
            rich.print(matrix.on_screen())
        for sentence in matrix.averages:
            log.info("%s", sentence)
        log.info("written: %s", self.folder / "matrix.csv")
        if self.options.fit_scales and is_finished:
            self._fit_scales(tests, kinds)
        return self._check_forgetting(matrix)

    def _check_forgetting(self, matrix: Matrix) -> int:
        """Returns the exit status: 3 if a task was forgotten by more than the user allows."""
        allowed = self.options.max_forgetting
        worse = [column for column in matrix.columns if allowed is not None and column.forgetting.value > allowed]
        for column in worse:
            log.error(
                "max_forgetting: %s is worse by %.4g in %s than at its best, and %g is allowed",
                *(column.task, column.forgetting.value, column.metric, allowed),
            )
        return 3 if worse else 0

    def _fit_scales(self, tests: Mapping[str, Sequence[Row]], kinds: Mapping[str, str]) -> None:
        """Chooses a factor for each stage, shows the tests with these factors, and writes ``scales.yaml``.

        Args:
            tests: each task's tests without factors.
            kinds: see :class:`Matrix`.
        """
        names = [stage.name for stage in self.stages]

        def losses_of(name: str, tried: Sequence[Scale]) -> list[list[float]]:
            states = {str(number): scale for number, scale in enumerate(tried)}  # no stage can have a number as its name
            log.info("fit_scales: stage %s (%d of %d)", name, names.index(name) + 1, len(names))
            tasks = self._measure(f"scales of {name}", "validate", states).values()
            losses = [[sum(row[key] for key in row if key.startswith("val_loss")) for row in rows] for rows in tasks]
            return [list(of_state) for of_state in zip(*losses, strict=True)]

        scale = fit_scales(names, losses_of)
        factors = {name: factor for name, factor in scale.items() if factor != 1}
        if is_first():
            with atomic_file(self.folder / "scales.yaml") as partial:
                partial.write_text(yaml.safe_dump(dict(scale), sort_keys=False), encoding="utf-8")
        log.info("written: %s", self.folder / "scales.yaml")
        if not factors:
            log.info("fit_scales: no other factor is better than 1")
            return
        scaled = self._measure("scaled", "test", {"0": scale}, may_refuse=True)
        columns = Matrix.of({name: [*tests[name], *rows] for name, rows in scaled.items()}, kinds).columns
        if is_first():
            rich.print(scales_table(names[-1], columns))
        factor_text, run = yaml.safe_dump(factors, default_flow_style=True).strip(), str(self.stages[-1].folder)
        log.info("export it: %s", shlex.join(["cola", "export", run, "--scale", factor_text, "--output", "DIR"]))

    def _measure(
        self, what: str, command: str, states: Mapping[str, Scale], *, may_refuse: bool = False
    ) -> dict[str, list[Row]]:
        """Measures the finished stages, unless the file of an earlier call has the same; see :meth:`Measurer.measure`."""
        path, facts = self.folder / "measured" / f"{what}.json", {stage.name: stage.facts for stage in self.finished}

        def find() -> dict[str, Any] | None:
            known = read_record(path)
            is_same = known.get("asked") == asked and known["facts"].keys() == facts.keys()
            is_same = is_same and not any(any(changes(facts[name], known["facts"][name])) for name in facts)
            return known["rows"] if is_same else None

        last = self.finished[-1]
        asked = {"states": dict(states), "checkpoint": by_first(lambda: last.record["checkpoint"])}
        if (rows := by_first(find)) is None:
            if self.measurer is None:
                configs = {stage.name: stage.config for stage in self.finished}
                self.measurer = Measurer(configs, last.folder / LAST, keeps_models=self.options.fit_scales)
            rows = self.measurer.measure(command, states, may_refuse=may_refuse)
            by_first(lambda: write_record(path, {"asked": asked, "facts": facts, "rows": rows}))
        return rows


def why_again(stage: Stage, facts: Mapping[str, Any]) -> str | None:
    """Why a stage is trained from its start; empty if nothing was trained before, None if it is finished or goes on.

    Args:
        stage: the stage.
        facts: what its result depends on, with the stage before it.
    """
    record, last = stage.record, hash_of_last(stage.folder)
    if last is None and "checkpoint" not in record:
        return ""
    if "facts" not in record:
        return "another version of cola-lightning has written its record"
    for name, here, there in changes(facts, record["facts"]):
        name = {"after": "the stage before it"}.get(name, name)
        values = "" if name.startswith(("the ", "what ")) else f" (now {here}, before {there})"
        return f"{name} has changed{values}"
    return None if record.get("checkpoint", last) == last else "its checkpoint is not the one that was written"


@contextmanager
def _of_stage(name: str) -> Iterator[None]:
    """Names the stage in what is refused inside the block."""
    try:
        yield
    except Exception as error:
        refusal = next((cause for cause in causes(error) if isinstance(cause, UserError | ArgumentError)), None)
        if refusal is None:
            error.add_note(f"in stage {name}")
            raise
        message = one_line(str(refusal)) + "".join(getattr(refusal, "__notes__", []))
        raise UserError(f"stages.{name}: {message}") from error


# ---------------------------------------------------------------------- the configuration


def stage_configs(options: StagesOptions, fit_words: Sequence[str]) -> dict[str, Config]:
    """The complete configuration of each stage's fit, by its name, in order.

    Args:
        options: those of the command.
        fit_words: options of ``cola fit`` for every stage.

    Raises:
        UserError: for names that no stage can have, and for what a fit would refuse when its options are parsed.
    """
    base, stages = read_stages(options.config)
    configs = dict[str, Config]()
    sizes = list[tuple[Any, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "config.yaml"), Path(folder, "stage.yaml")]
        for name, given in stages.items():
            for file, content in zip(files, (base, given), strict=True):
                file.write_text(yaml.safe_dump(content), encoding="utf-8")
            try:
                with _of_stage(name):
                    config = resolve([*(word for file in files for word in ("--config", str(file))), *fit_words])
            except UserError as error:
                message = str(error)
                for file in files:
                    message = message.replace(str(file), options.config)
                raise UserError(message) from error
            model_given = (given.get("model") or {}).get("init_args") or {}
            for option, is_given, why in (
                ("ckpt_path", config["ckpt_path"] is not None, "A stage that was stopped is resumed by itself"),
                ("chain.name", config["chain"]["name"] is not None, "A stage's links have the name of the stage"),
                ("model.init_chain", configs and model_given.get("init_chain"), "A stage begins from the one before it"),
            ):
                if is_given:
                    raise UserError(f"stages.{name}: {option} must be left out. {why}")
            config["chain"] = config["chain"] | {"name": name}
            sizes.append((model_option(config, "rank"), model_option(config, "alpha")))
            if configs:
                config["model"]["init_args"] |= {"init_chain": None, "init_links": None, "init_knot": "cola"}
                if options.knot != "cola" and sizes[-1] != sizes[0]:
                    raise UserError(
                        f"stages.{name}: with --knot {options.knot}, all stages have one model.rank and model.alpha"
                    )
            configs[name] = config
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
        if not NAME.fullmatch(name) or not is_stage_name(name) or name in TAKEN:
            raise UserError(
                f"stages: a stage's name is that of its folder: up to 100 letters, digits, dots and hyphens, but no number and "
                f"none of {', '.join([*TAKEN, *RESERVED])}, got {name!r}"
            )
        if name in names[:index]:
            raise UserError(f"stages: there are two stages {name!r}. Each needs a name of its own")
    return config, {name: changes or {} for name, changes in zip(names, stages.values(), strict=True)}
