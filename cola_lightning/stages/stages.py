"""A resumable sequence of stages: finds those that are missing, or whose result would be another one, and trains them."""

import gc
import itertools
import logging
import math
import re
import shlex
import sys
import traceback
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
from cola_lightning.chain.checkpoint import read_chain, read_chain_and_held_out
from cola_lightning.chain.schedule import RESERVED, is_stage_name
from cola_lightning.chain.sources import Source
from cola_lightning.chain.sources import join as join_chains
from cola_lightning.cli.made_run import MadeRun, in_silence, resolve
from cola_lightning.errors import OutsideError, UserError, one_line, refusal
from cola_lightning.module.run import InitChain
from cola_lightning.runs.facts import changes, facts_of, with_contents
from cola_lightning.runs.folder import LAST, RECORD, begin, hash_of_last, read_record, why_again, write_record
from cola_lightning.runs.processes import by_first, claimed, is_first, join
from cola_lightning.stages.matrix import Matrix, scales_table
from cola_lightning.stages.measure import Measurer, Row
from cola_lightning.stages.options import StagesOptions
from cola_lightning.stages.replay import add_replay
from cola_lightning.stages.scales import Scale, fit_scales
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

Config = dict[str, Any]
TAKEN = ("base", "null", "measured")  # a row of the matrix; no name for the parser; a folder of this command's
NAME = re.compile(r"\w[\w. -]{0,99}")
NO_STEPS = {"max_steps": 0, "max_time": None, "num_sanity_val_steps": 0, "logger": False, "enable_progress_bar": False}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its name, and its links'.
        folder: its run's.
        config: the complete configuration of its fit, without replay and the chain that it begins from.
        fit_config: the same with replay.
        own_facts: what its result depends on, besides the stage before it.
        before: that stage; None: it is the first.
        given: how it is given; empty: it is trained.
    """

    name: str
    folder: Path
    config: Config
    fit_config: Config
    own_facts: dict[str, Any]
    before: "Stage | None"
    given: Config

    @property
    def sources(self) -> tuple[list[str], list[str]]:
        """From where its chain is read, and the names of those that continue the adapter before them."""
        if not self.given:
            return [str((self.folder / LAST).absolute())], []
        sources, continues = self.before.sources if self.before is not None else ([], [])
        source = f"{self.name}={Path(self.given['adapter']).expanduser().absolute()}"
        return [*sources, source], [*continues, *[self.name][: bool(self.given.get("continues"))]]

    @property
    def record(self) -> dict[str, Any]:
        """What is known of its run; empty if it has not begun."""
        return read_record(self.folder / RECORD)

    @property
    def facts(self) -> dict[str, Any]:
        """All that its result depends on."""
        return self.own_facts | {"the stage before it": self.before and self.before.record.get("checkpoint")}

    @property
    def is_finished(self) -> bool:
        """Whether it is trained, and would be trained to the same result."""
        return "checkpoint" in self.record and why_again(self.folder, self.facts) is None


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
        configs, given = stage_configs(options, fit_words)
        with_replay = {name: {**config, "trainer": dict(config["trainer"])} for name, config in configs.items()}
        if options.replay is not None:
            add_replay(with_replay, options.replay)
        self.stages, self.trainer = list[Stage](), cast(Trainer, None)
        for name, config in configs.items():
            with _of_stage(name), in_silence():
                made = MadeRun(config)
                self.trainer = self.trainer or made.trainer
                ours, first = (one.num_devices * one.num_nodes for one in (made.trainer, self.trainer))
                if ours != first:  # each of them would train alone, to the same file
                    raise UserError(f"trainer.devices: all stages need the same number of processes, got {ours} and {first}")
                fit_config = config if given[name] else with_replay[name]
                replay = None if fit_config["trainer"] == config["trainer"] else options.replay
                knot, before = (options.knot, self.stages[-1]) if self.stages else (None, None)
                facts = facts_of(config, made.datamodule, knot=knot, replay=replay, given=with_contents(given[name]) or None)
            self.stages.append(Stage(name, self.folder / name, config, fit_config, facts, before, given[name]))

    def run(self) -> int:
        """Trains the stages that are missing, in order, and then shows the matrix; returns the exit status."""
        join(self.trainer)
        with claimed(self.folder / ".claim") as is_ours:
            if not is_ours:
                raise UserError(f"output: another process is at work in {str(self.folder)!r}. Wait for its end")
            return self._run()

    def _run(self) -> int:
        self._rehearse(by_first(lambda: [*itertools.takewhile(lambda stage: stage.is_finished, self.stages)]))
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

    def _rehearse(self, finished: Sequence[Stage]) -> None:
        """Lets each stage refuse what it refuses, before anything is trained, and what is measured at the end too.

        A rehearsal is a fit that ends before its first step. By then it has read its rows and made its model, which begins from
        that of the rehearsal before it.

        Args:
            finished: the stages that need none.

        Raises:
            UserError: naming the stage.
        """
        missing = self.stages[len(finished) :]
        chain, held_out = read_chain_and_held_out(finished[-1].folder) if finished and missing else (None, [])
        for stage in missing:
            with _of_stage(stage.name), in_silence():
                made = MadeRun(stage.fit_config | {"trainer": stage.fit_config["trainer"] | NO_STEPS})
                run, knot = made.model.run, self.options.knot
                if stage.given:
                    source, knot = Source(stage.given["adapter"], stage.name), "cola"
                    chains = [] if chain is None else [(Source("the stage before"), chain)]
                    continues = [stage.name] if stage.given.get("continues") else []
                    joined = join_chains([*chains, (source, read_chain(source.path, field="adapter"))], continues)
                    if chain is not None and len(joined.links) == len(chain.links):
                        raise UserError(f"adapter: {source.path!r} is already an earlier stage. Name another adapter")
                    chain = joined
                if chain is not None:
                    place = str(self.folder if stage.before is None else stage.before.folder)  # for messages
                    run.start, run.first_chain = InitChain(place, knot=knot), chain
                    run.restore_held_out(held_out)
                made.fit()
                made.trainer.fit_loop.epoch_loop.val_loop.setup_data()
                if self.options.fit_scales and not sum(made.trainer.num_val_batches):
                    raise UserError("--fit_scales needs validation rows, and there are none. Set data.val_size")
                if self.options.max_forgetting < math.inf and not getattr(made.datamodule, "can_be_tested", True):
                    raise UserError("--max_forgetting needs test rows, and there are none. Set data.test_size")
                chain, held_out = chain if stage.given else made.model.full_chain(), run.held_out
            del made, run
            gc.collect()

    # ------------------------------------------------------------------ a stage

    def _train(self, stage: Stage) -> None:
        """Trains a stage, or resumes it, unless it is finished."""
        if (config := by_first(lambda: self._begin(stage))) is None:
            return
        with _of_stage(stage.name):
            (made := MadeRun(config, folder=stage.folder)).fit()
            if stage.given:  # a fit of no steps has written none
                made.trainer.save_checkpoint(stage.folder / LAST)
        by_first(lambda: write_record(stage.folder / RECORD, stage.record | {"checkpoint": hash_of_last(stage.folder)}))

    def _begin(self, stage: Stage) -> Config | None:
        """Makes a stage's folder ready; returns the configuration of its fit, or None if it is finished."""
        name, before = f"stage {stage.name} ({self.stages.index(stage) + 1} of {len(self.stages)})", stage.before
        if stage.is_finished:
            log.info("%s: finished", name)
            return None
        first, of_chain = stage if stage.given else before, dict[str, Any]()
        if first is not None:
            of_chain = dict(zip(("init_chain", "init_continues"), first.sources, strict=True))
            of_chain["init_knot"] = "cola" if stage.given else self.options.knot
        last = begin(stage.folder, stage.facts, name, of_chain=of_chain)
        config, model = stage.fit_config, stage.fit_config["model"]
        model = model | {"init_args": model["init_args"] | stage.record["of_chain"]}
        # Where Lightning writes, and looks for, the checkpoint of a job that the cluster has requeued.
        trainer = config["trainer"] | {"default_root_dir": str(stage.folder)}
        if stage.given:  # without a name for its empty link, which then belongs to no stage
            trainer, config = trainer | NO_STEPS, config | {"chain": config["chain"] | {"name": None}}
        return config | {"model": model, "trainer": trainer, "ckpt_path": last and str(last)}

    # ------------------------------------------------------------------ the matrix

    def _show(self, finished: Sequence[Stage], *, is_finished: bool) -> int:
        """Measures and shows the matrix of the finished stages; returns the exit status."""
        configs, last = {stage.name: stage.config for stage in finished}, finished[-1].folder / LAST
        self.finished, self.measurer = finished, Measurer(configs, last, keeps_models=self.options.fit_scales)
        self.is_complete = True  # until a stage cannot be measured
        tests = self._measure("matrix", "test", {name: {} for name in ("base", *(stage.name for stage in finished))})
        if self.options.max_forgetting < math.inf and not self.is_complete:
            raise UserError("--max_forgetting needs test rows of every stage. Set data.test_size")
        matrix = Matrix.of(tests)
        if is_first():
            matrix.write(self.folder)
            if matrix.columns and find_spec("matplotlib"):
                matrix.draw(self.folder / "matrix.png")
            rich.print(matrix.on_screen())
        for sentence in matrix.averages:
            log.info("%s", sentence)
        log.info("written: %s", self.folder / "matrix.csv")
        if self.options.fit_scales and is_finished:
            self._fit_scales(tests)
        limit = self.options.max_forgetting
        worse = [column for column in matrix.columns if limit < math.inf and not column.forgetting.value <= limit]  # also NaN
        for column in worse:
            what = column.task, column.forgetting.value, column.metric
            log.error("max_forgetting: %s is worse by %.4g in %s than at its best", *what)
        return 3 if worse else int(not self.is_complete)

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
        scaled = self._measure("scaled", "test", {"0": scale})
        columns = Matrix.of({name: [*tests[name], *rows] for name, rows in scaled.items()}).columns
        if is_first():
            rich.print(scales_table(names[-1], columns))
        factor_text, run = yaml.safe_dump(factors, default_flow_style=True).strip(), str(self.stages[-1].folder)
        log.info("export it: %s", shlex.join(["cola", "export", run, "--scale", factor_text, "--output", "DIR"]))

    def _measure(self, what: str, command: str, states: Mapping[str, Scale]) -> dict[str, list[Row]]:
        """Measures the finished stages, unless the file of an earlier call has all of them; see :meth:`Measurer.measure`."""
        path, last = self.folder / "measured" / f"{what}.json", self.finished[-1]
        facts = {stage.name: stage.own_facts for stage in self.finished}
        asked = {"states": dict(states), "checkpoint": by_first(lambda: last.record["checkpoint"])}
        known = by_first(lambda: read_record(path))
        is_same = known.get("asked") == asked and known["facts"].keys() == facts.keys() == known["rows"].keys()
        if is_same and not any(change for name in facts for change in changes(facts[name], known["facts"][name])):
            return dict(known["rows"])
        rows = self.measurer.measure(command, states)
        self.is_complete &= rows.keys() == facts.keys()
        by_first(lambda: write_record(path, {"asked": asked, "facts": facts, "rows": rows}))
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


def stage_configs(options: StagesOptions, fit_words: Sequence[str]) -> tuple[dict[str, Config], dict[str, Config]]:
    """The complete configuration of each stage's fit, by its name, in order, and how stages are given.

    Args:
        options: those of the command.
        fit_words: options of ``cola fit`` for every stage.

    Raises:
        UserError: for names that no stage can have, and for what a fit would refuse when its options are parsed.
    """
    base, stages = read_stages(options.config)
    configs, adapters = dict[str, Config](), dict[str, Config]()
    for name, given in stages.items():
        with _of_stage(name):
            adapters[name] = {key: given.pop(key) for key in ("adapter", "continues") if key in given}
            if adapters[name].get("continues") and options.fit_scales:
                raise UserError("--fit_scales needs a new adapter in each stage, and this stage continues an earlier one")
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
    return configs, adapters


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
        if not NAME.fullmatch(name) or not is_stage_name(name) or name in (*TAKEN, *names[:index]):
            raise UserError(
                f"stages: a stage has a name of its own, that of its folder: up to 100 letters, digits, dots, hyphens, but no "
                f"number and none of {', '.join([*TAKEN, *RESERVED])}, got {name!r}"
            )
    return config, {name: changes or {} for name, changes in zip(names, stages.values(), strict=True)}
