"""A resumable sequence of stages: finds those that are missing, or that were asked for otherwise, and trains them."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError

from cola_lightning.chain.schedule import RESERVED, is_stage_name
from cola_lightning.cli.training import differences
from cola_lightning.errors import UserError, one_line
from cola_lightning.stages.options import StagesOptions
from cola_lightning.stages.run import CONFIG, LAST
from cola_lightning.study.config import as_words, data_files, resolve_config
from cola_lightning.study.methods import model_option
from cola_lightning.study.run import LOG, RESULT, claim_run, execute
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
        for index, config in enumerate(configs.values()):
            for name in ("init_chain", "init_knot"):  # refused here, and not after the first stage
                model_option(config, name)
            if index:
                config["model"]["init_args"] |= {"init_chain": None, "init_links": None, "init_knot": options.knot}
        folder = Path(options.output)
        self.stages = [Stage(name, folder / name, config, data_files(config)) for name, config in configs.items()]

    def run(self) -> int:
        """Trains the stages that are missing, in order; returns the exit status."""
        before: Stage | None = None
        for stage in self.stages:
            if not self._train(stage, before):
                log.error("failed: %s", stage.folder / LOG)
                return 1
            before = stage
        return 0

    def _train(self, stage: Stage, before: Stage | None) -> bool:
        """Trains a stage unless it is finished, and returns whether it is then."""
        place = f"stage {stage.name} ({self.stages.index(stage) + 1} of {len(self.stages)})"
        after = None if before is None else result_of(before.folder)["checkpoint"]
        asked = {"config": stage.config, "files": stage.files, "after": after}
        if known := result_of(stage.folder):
            other = next(differences(asked, known["asked"]), None)
            if other is None:
                log.info("%s: finished", place)
                return True
            if other[0] != "after":  # else its own earlier stage has said so
                what = (
                    "its data" if other[0].startswith("files") else other[0].removeprefix("config.").replace(".init_args", "")
                )
                log.info("%s: %s has changed, so this stage and the later ones are trained again", place, what)
            (stage.folder / RESULT).unlink()
        config = stage.config | {"trainer": stage.config["trainer"] | {"enable_progress_bar": False}}  # its output is in a file
        if before is not None:
            init_args = stage.config["model"]["init_args"] | {"init_chain": str(before.folder / LAST)}
            config["model"] = stage.config["model"] | {"init_args": init_args}
        log.info("%s: training, see %s", place, stage.folder / LOG)
        return execute_in(stage.folder, config, asked)


def result_of(folder: Path) -> dict[str, Any]:
    """The result of the run in a folder; empty if it has none."""
    path = folder / RESULT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def execute_in(folder: Path, config: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Executes a run in its folder, by a process of its own, and returns whether it has a result.

    Args:
        folder: the run's.
        config: the complete configuration of its fit.
        asked: what its result will say that it is of.

    Raises:
        UserError: if the run refuses its options, or another process executes it.
    """
    if (claim := claim_run(folder)) is None:
        if result_of(folder).get("asked") == asked:
            return True
        raise UserError(f"output: another process is at work in {str(folder)!r}. Wait for its end")
    try:
        with atomic_file(folder / CONFIG) as partial:
            partial.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        return execute(claim, {"config": config, "asked": asked}, "stages")
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
                notes = "".join(getattr(error, "__notes__", []))
                raise UserError(f"stages.{name}: {one_line(str(error))}{notes}") from error
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
