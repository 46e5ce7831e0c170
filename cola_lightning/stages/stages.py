"""A resumable sequence of stages: finds those that are missing, or whose result would be another one, and trains them."""

import gc
import itertools
import logging
import math
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import rich
import yaml
from lightning.pytorch import Trainer

from cola_lightning import layout
from cola_lightning.chain import Chain
from cola_lightning.chain.checkpoint import read_chain_and_held_out
from cola_lightning.chain.facts import Records
from cola_lightning.chain.schedule import RESERVED, is_stage_name
from cola_lightning.cli.training import MadeRun, in_silence, resolve
from cola_lightning.errors import OutsideError, UserError, one_line, refusal
from cola_lightning.module.run import InitChain
from cola_lightning.runs.facts import facts_of
from cola_lightning.runs.folder import LAST, RECORD, begin, hash_of_last, read_record, why_again, write_record
from cola_lightning.runs.processes import by_first, claimed, is_first, join
from cola_lightning.stages.matrix import SHOWN, Matrix, scales_table
from cola_lightning.stages.measure import Measurer, Row
from cola_lightning.stages.options import StagesOptions
from cola_lightning.stages.replay import add_replay
from cola_lightning.stages.scales import Scale, fit_scales
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

Config = dict[str, Any]
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


class Stages:
    """A sequence of stages, from the first to the last.

    Args:
        options: those of the command.
        fit_words: options of ``cola fit`` for every stage.

    Raises:
        UserError: for what any stage's fit would refuse when its options are parsed and its objects are made.
    """

    def __init__(self, options: StagesOptions, fit_words: Sequence[str]) -> None:
        self.options, self.folder = options, Path(options.output)
        configs = stage_configs(options, fit_words)
        with_replay = {name: {**config, "trainer": dict(config["trainer"])} for name, config in configs.items()}
        if options.replay is not None:
            add_replay(with_replay, options.replay)
        self.stages, self.measurer, self.trainer = list[Stage](), cast(Measurer | None, None), cast(Trainer, None)
        for name, config in configs.items():
            with _of_stage(name), in_silence():
                made = MadeRun(config)
                self.trainer = self.trainer or made.trainer
                has_replay = with_replay[name]["trainer"] != config["trainer"]
                before = {"knot": options.knot if self.stages else None, "replay": options.replay if has_replay else None}
                facts = facts_of(config, made.datamodule, **before)
            self.stages.append(Stage(name, self.folder / name, config, with_replay[name], facts))

    def run(self) -> int:
        """Trains the stages that are missing, in order, and then shows the matrix; returns the exit status."""
        join(self.trainer)
        with claimed(self.folder / ".claim") as is_ours:
            if not is_ours:
                raise UserError(f"output: another process is at work in {str(self.folder)!r}. Wait for its end")
            return self._run()

    def _run(self) -> int:
        self._rehearse(by_first(lambda: sum(1 for _ in itertools.takewhile(self._is_finished, self.stages))))
        finished, failure = list[Stage](), None
        for stage in self.stages:
            try:
                self._train(stage)
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

    def _rehearse(self, n_finished: int) -> None:
        """Lets each stage refuse what it refuses, before anything is trained, and what is measured at the end too.

        A rehearsal is a fit that ends before its first step. By then it has read its rows and made its model, which begins from
        that of the rehearsal before it.

        Args:
            n_finished: how many stages are finished.

        Raises:
            UserError: naming the stage.
        """
        chain, held_out = cast(Chain | None, None), cast(Records, ())
        if 0 < n_finished < len(self.stages):
            chain, held_out = read_chain_and_held_out(self.stages[n_finished - 1].folder)
        quiet = {"max_steps": 0, "max_epochs": 1, "max_time": None, "num_sanity_val_steps": 0, "logger": False}
        quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
        for stage in self.stages[n_finished:]:
            with _of_stage(stage.name), in_silence():
                made = MadeRun(stage.fit_config | {"trainer": stage.fit_config["trainer"] | quiet})
                if chain is not None:
                    before = str(self.stages[self.stages.index(stage) - 1].folder)
                    made.model.run.start = InitChain(before, knot=self.options.knot)
                    made.model.run.first_chain = chain
                    made.model.run.restore_held_out(held_out)
                made.fit()
                made.trainer.fit_loop.epoch_loop.val_loop.setup_data()
                if self.options.fit_scales and not sum(made.trainer.num_val_batches):
                    raise UserError("--fit_scales needs validation rows, and there are none. Set data.val_size")
                if self.options.max_forgetting is not None and not getattr(made.datamodule, "can_be_tested", True):
                    raise UserError("--max_forgetting needs test rows, and there are none. Set data.test_size")
                chain, held_out = made.model.full_chain(), made.model.run.held_out
            del made
            gc.collect()

    # ------------------------------------------------------------------ a stage

    def _before(self, stage: Stage) -> Stage | None:
        return self.stages[self.stages.index(stage) - 1] if stage is not self.stages[0] else None

    def _facts(self, stage: Stage) -> dict[str, Any]:
        """All that the result of a stage depends on."""
        before = self._before(stage)
        return stage.facts | {"the stage before it": None if before is None else before.record.get("checkpoint")}

    def _is_finished(self, stage: Stage) -> bool:
        return "checkpoint" in stage.record and why_again(stage.folder, self._facts(stage)) is None

    def _train(self, stage: Stage) -> None:
        """Trains a stage, or resumes it, unless it is finished."""
        if (config := by_first(lambda: self._begin(stage))) is None:
            return
        with _of_stage(stage.name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")  # of a run that was stopped
            MadeRun(config, folder=stage.folder).fit()
        by_first(lambda: write_record(stage.folder / RECORD, stage.record | {"checkpoint": hash_of_last(stage.folder)}))

    def _begin(self, stage: Stage) -> Config | None:
        """Makes a stage's folder ready; returns the configuration of its fit, or None if it is finished."""
        name, before = f"stage {stage.name} ({self.stages.index(stage) + 1} of {len(self.stages)})", self._before(stage)
        if self._is_finished(stage):
            log.info("%s: finished", name)
            return None
        init_chain = None if before is None else str((before.folder / LAST).absolute())
        last = begin(stage.folder, self._facts(stage), name, init_chain=init_chain)
        config, model = stage.fit_config, stage.fit_config["model"]
        if before is not None:
            of_chain = {"init_chain": stage.record["init_chain"], "init_knot": self.options.knot}
            model = model | {"init_args": model["init_args"] | of_chain}
        # Where Lightning writes, and looks for, the checkpoint of a job that the cluster has requeued.
        trainer = config["trainer"] | {"default_root_dir": str(stage.folder)}
        return config | {"model": model, "trainer": trainer, "ckpt_path": last and str(last)}

    # ------------------------------------------------------------------ the matrix

    def _show(self, finished: Sequence[Stage], *, is_finished: bool) -> int:
        """Measures and shows the matrix of the finished stages; returns the exit status."""
        self.finished = finished
        tests = self._measure("matrix", "test", {name: {} for name in ("base", *(stage.name for stage in finished))})
        if self.options.max_forgetting is not None and len(tests) < len(finished):
            raise UserError("--max_forgetting needs test rows of every stage. Set data.test_size")
        matrix = Matrix.of(tests)
        if not matrix.columns:
            log.warning("no matrix: no stage has tests that log %s", " or ".join(f"test_{name}" for name in SHOWN))
            return 0
        if is_first():
            matrix.write(self.folder)
            if find_spec("matplotlib"):
                matrix.draw(self.folder / "matrix.png")
            rich.print(matrix.on_screen())
        for sentence in matrix.averages:
            log.info("%s", sentence)
        log.info("written: %s", self.folder / "matrix.csv")
        if self.options.fit_scales and is_finished:
            self._fit_scales(tests)
        allowed = math.inf if self.options.max_forgetting is None else self.options.max_forgetting
        worse = [column for column in matrix.columns if column.forgetting.value > allowed]
        for column in worse:
            log.error(
                "max_forgetting: %s is worse by %.4g in %s than at its best, and %g is allowed",
                *(column.task, column.forgetting.value, column.metric, allowed),
            )
        return 3 if worse else 0

    def _fit_scales(self, tests: Mapping[str, Sequence[Row]]) -> None:
        """Chooses a factor for each stage, shows the tests with these factors, and writes ``scales.yaml``.

        Args:
            tests: each task's tests without factors.
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
        scaled = self._measure("scaled", "test", {"0": scale})
        columns = Matrix.of({name: [*tests[name], *rows] for name, rows in scaled.items()}).columns
        if is_first():
            rich.print(scales_table(names[-1], columns))
        factor_text, run = yaml.safe_dump(factors, default_flow_style=True).strip(), str(self.stages[-1].folder)
        log.info("export it: %s", shlex.join(["cola", "export", run, "--scale", factor_text, "--output", "DIR"]))

    def _measure(self, what: str, command: str, states: Mapping[str, Scale]) -> dict[str, list[Row]]:
        """Measures the finished stages, unless the file of an earlier call has the same; see :meth:`Measurer.measure`."""
        path, last = self.folder / "measured" / f"{what}.json", self.finished[-1]
        facts = {stage.name: stage.facts for stage in self.finished}
        asked = {"states": dict(states), "checkpoint": by_first(lambda: last.record["checkpoint"]), "facts": facts}
        if (known := by_first(lambda: read_record(path))).get("asked") == asked:
            return dict(known["rows"])
        if self.measurer is None:
            configs = {stage.name: stage.config for stage in self.finished}
            self.measurer = Measurer(configs, last.folder / LAST, keeps_models=self.options.fit_scales)
        rows = self.measurer.measure(command, states)
        by_first(lambda: write_record(path, {"asked": asked, "rows": rows}))
        return rows


@contextmanager
def _of_stage(name: str) -> Iterator[None]:
    """Names the stage in what is refused inside the block."""
    try:
        yield
    except Exception as error:
        if (refused := refusal(error)) is None:
            raise
        message, status = refused
        raise (UserError if status == 2 else OutsideError)(f"stages.{name}: {message}") from error


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
    for name, given in stages.items():
        with _of_stage(name):
            texts = [yaml.safe_dump(part, default_flow_style=True, width=sys.maxsize) for part in (base, given)]
            config = resolve([*(word for text in texts for word in ("--config", text)), *fit_words])
            model_given = (given.get("model") or {}).get("init_args") or {}
            for option, is_given, why in (
                ("ckpt_path", config["ckpt_path"] is not None, "A stage that was stopped is resumed by itself"),
                ("chain.name", config["chain"]["name"] is not None, "A stage's links have the name of the stage"),
                ("model.init_chain", configs and model_given.get("init_chain"), "A stage begins from the one before it"),
            ):
                if is_given:
                    raise UserError(f"{option} must be left out. {why}")
        config["chain"] = config["chain"] | {"name": name}
        if configs:
            config["model"]["init_args"] |= {"init_chain": None, "init_links": None, "init_continues": [], "init_knot": "cola"}
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
