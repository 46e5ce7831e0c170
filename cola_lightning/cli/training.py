"""``cola fit``, ``validate``, ``test`` and ``predict``: stock LightningCLI with the groups ``chain`` and ``last``."""

import contextlib
import copy
import csv
import itertools
import logging
import os
import shlex
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import rich
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

import cola_lightning.data  # noqa: F401  # gives the command line the data modules' short names
from cola_lightning import __version__, layout
from cola_lightning.callbacks.chain_of_lora import ChainOfLoRA, check_strategy
from cola_lightning.callbacks.command import ConfigSaver, ProgressLines, RunWatch
from cola_lightning.callbacks.last_checkpoint import LastCheckpoint
from cola_lightning.callbacks.prediction_writer import PredictionWriter
from cola_lightning.callbacks.run_folder import run_folder
from cola_lightning.chain.chain import number_of_links
from cola_lightning.chain.checkpoint import OpenedCheckpoint, last_checkpoint_of
from cola_lightning.chain.report import metrics_table
from cola_lightning.cli.command_line import CLASSES, as_texts, completed
from cola_lightning.cli.help import DESCRIPTION, ELSEWHERE, OPTIONS, SUBCOMMANDS, TEXTS, add_scale, help_formatter, usage
from cola_lightning.errors import JSONARGPARSE, Interruption, UserError, nearest, nearest_path
from cola_lightning.hf.causal_lm import COLACausalLM
from cola_lightning.module.module import COLAModule
from cola_lightning.module.state import AtomicCheckpointIO, described_data
from cola_lightning.runs.facts import option_changes
from cola_lightning.runs.folder import claim, is_claimed
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)
EPOCHS = 3  # of a fit without a limit: Lightning's default is 1000


class Parser(LightningArgumentParser):
    """LightningCLI's parser, for which ``--model.help CLASS`` writes options as ``--help`` does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": help_formatter()} | kwargs)


class RunSaver(ConfigSaver):
    """Also claims the run while it trains, by its configuration's file, so that nobody resumes it beside itself."""

    claim: TextIO | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if not self.already_saved:
            super().on_train_batch_start(trainer, *args)
            path = Path(run_folder(trainer), self.config_filename)
            if trainer.is_global_zero and path.is_file():  # and not at a URL
                with contextlib.suppress(OSError, UserError):  # of a disk without locks
                    self.claim = claim(path)

    def _release(self, *args: Any, **kwargs: Any) -> None:
        if self.claim is not None:
            self.claim.close()

    teardown = on_exception = _release


class COLACLI(LightningCLI):
    """LightningCLI with the group ``chain``, metrics in a CSV file, and predictions in a JSONL file.

    Args:
        words: the arguments of ``cola``; the subcommand alone if there is a ``resolved`` configuration.
        watch: handles signals.
        folder: the run's; None: a new one.
        resolved: the complete configuration, see :func:`resolve`; None: that of the arguments.
    """

    def __init__(
        self, words: list[str], watch: RunWatch, folder: Path | None = None, resolved: Mapping[str, Any] | None = None
    ) -> None:
        self.words, self.watch, self.folder, self.resolved = words, watch, folder, resolved
        self.opened: OpenedCheckpoint | None = None
        # Without allow_abbrev=False, argparse would accept --chain.every_n_epoch as --chain.every_n_epochs.
        strict: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
        strict["formatter_class"] = help_formatter(is_evaluation=words[:1] != ["fit"])
        by_command = {name: strict | {"description": SUBCOMMANDS[name], "usage": usage(name)} for name in self.subcommands()}
        super().__init__(
            COLAModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # True would build one optimizer for all links; the module builds one for each link.
            auto_configure_optimizers=False,
            seed_everything_default=0,  # as Lightning's own, which it warns of
            save_config_callback=RunSaver,
            trainer_defaults={"callbacks": [PredictionWriter(), watch]},
            parser_class=Parser,
            parser_kwargs=strict | by_command | {"prog": "cola", "description": DESCRIPTION, "version": __version__},
        )

    # ------------------------------------------------------------------ the options

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the subcommand that runs, because Lightning makes a parser for each."""
        every = LightningCLI.subcommands()
        return {name: skipped for name, skipped in every.items() if [name] == self.words[:1]} or every

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Puts first in ``--help`` what users set most: model, data and chain; then the Trainer with its many options."""
        parser.add_lightning_class_args(COLAModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        parser.add_lightning_class_args(ChainOfLoRA, "chain")
        parser.add_class_arguments(LastCheckpoint, "last")
        is_fit, measures = self.words[:1] == ["fit"], self.words[:1] in (["validate"], ["test"])
        every = " Type `all` to measure the base and the model after each link, and to print a table." if measures else ""
        whose = "--model.init_chain" if is_fit else "--ckpt_path or, without it, of --model.init_chain"
        links = f"{OPTIONS['links']}{every} The links are those of {whose}."
        parser.add_argument("--links", type=int | str | None, default=None, help=links)
        if not is_fit:  # which would go on from a chain that was never trained
            add_scale(parser)
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({"trainer.gradient_clip_val": 1.0})
        for name, (title, description) in TEXTS["groups"].items():
            group = parser.groups[name]  # type: ignore[index]
            group.title, group.description = title, description if is_fit or name not in TEXTS["of a fit"] else None
        self.options = parser

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser._action_groups[-1].title = "The checkpoint"  # else the first line of the docstring of the Trainer's method
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self._parse(parser)
        self._settle()

    def _parse(self, parser: LightningArgumentParser) -> None:
        if self.resolved is not None:
            (name,) = self.words
            # A copy: the parser puts its own objects into lists.
            self.config = parser.parse_object({"subcommand": name, name: copy.deepcopy(self.resolved)})
            return
        words = as_texts(completed(self.words) if self.words[0] in self.subcommands() else self.words)
        try:
            self.config = parser.parse_args(words)
        except ArgumentError as error:
            error.add_note(self._what_is_meant(str(error)))
            raise

    def _settle(self) -> None:
        """Checks and completes the options, before anything is instantiated."""
        self.subcommand = self.config["subcommand"]
        config = self.config[self.subcommand]
        for args in self._save_dirs():  # Lightning replaces ~ in some of a run's paths alone
            args.save_dir = os.path.expanduser(args.save_dir)
        self._open_checkpoint()
        self._check_links()
        trainer = config.trainer
        if self.subcommand == "fit":
            has_limit = trainer.max_epochs is not None or trainer.max_steps != -1 or trainer.max_time is not None
            if not has_limit and not trainer.fast_dev_run:  # saved in the run's configuration, as if it had been given
                trainer.max_epochs = EPOCHS
                log.info("No trainer.max_epochs, max_steps or max_time given; using max_epochs %d", EPOCHS)
        elif config.ckpt_path is None:
            log.warning("%s: no --ckpt_path given; using the base, and model.init_chain if given", self.subcommand)
        if self.subcommand == "predict":
            config.return_predictions = False  # they are written to a file

    def _what_is_meant(self, message: str) -> str:
        """The end of jsonargparse's message about an unknown option or file: the nearest that exist."""
        if file := JSONARGPARSE["missing file"].search(message):
            return nearest_path(file[1])
        if not (unknown := JSONARGPARSE["unknown option"].search(message)):
            return ""
        of_option, _, word = unknown[1].rpartition(".")
        if here := ELSEWHERE.get(word):
            return f"; here it is {here}"
        if unknown[1] == "class_path":
            return "; options of a class are inside its init_args"
        classes = CLASSES | dict(JSONARGPARSE["class"].findall(message))
        self.options.set_defaults({group: {"class_path": name} for group, name in classes.items()})
        keys = self.options.get_defaults(skip_validation=True).keys()
        (group, *_) = [*JSONARGPARSE["key"].findall(message), of_option]
        names = [key.replace(".init_args", "") for key in keys if not key.endswith("class_path")]
        every, of_group = ({name.rpartition(".")[2]: name for name in names if name.startswith(one)} for one in ("", group))
        return nearest(word, of_group, of_group.__getitem__) or nearest(word, every, every.__getitem__)

    @override
    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let hyperparameters in the checkpoint override the user's."""

    @cached_property
    def config_dump(self) -> dict[str, Any]:
        """The subcommand's options as plain values. Lightning's own, for hyperparameters, would check each option again."""
        parser = self._parser(self.subcommand)
        text = parser.dump(self.config[self.subcommand], skip_none=False, skip_validation=True, skip_link_targets=False)
        config: dict[str, Any] = yaml.safe_load(text)
        return config

    def _save_dirs(self) -> list[Any]:
        """The arguments of those of a configuration's loggers that have a folder."""
        loggers = self._get(self.config, "trainer").logger
        loggers = loggers if isinstance(loggers, list) else [loggers]
        arguments = [getattr(logger, "init_args", None) for logger in loggers]
        return [args for args in arguments if args is not None and args.get("save_dir") is not None]

    def _open_checkpoint(self) -> None:
        """Checks the checkpoint before anything is created; ``last`` is that of the newest run here with the same options."""
        config = self.config[self.subcommand]
        if config.ckpt_path == "last":
            root = Path(config.trainer.default_root_dir or os.getcwd()).expanduser()
            folders = [root / "runs", *(Path(args.save_dir) for args in self._save_dirs())]
            # Without a checkpoint beside it, a config.yaml there is the user's own.
            configs = {file for file in root.glob("config.yaml") if (root / "checkpoints" / "last.ckpt").exists()}
            for folder, run in itertools.product(folders, ("*", "*/*")):  # the first: of a logger without a name
                configs |= {*folder.glob(f"{run}/config.yaml")}
            config.ckpt_path = str(self._newest_of_same_run({file.parent: file for file in configs}))
            log.info("ckpt_path: %s", config.ckpt_path)
        is_part = config.links is not None or config.get("scale") is not None  # which Lightning alone would not load
        if config.ckpt_path is not None and (is_part or "://" not in config.ckpt_path):
            self.opened = OpenedCheckpoint.open(config.ckpt_path, "ckpt_path", weights_only=config.weights_only is not False)
            config.ckpt_path = self.opened.path  # of a run's folder, the file in it
            own = Path(self.opened.path).parent.parent / "config.yaml"
            if self.subcommand == "fit" and own.is_file() and is_claimed(own):
                raise UserError(f"ckpt_path: the run in {shortest(own.parent)} is still running. Wait for its end, or stop it")

    def _newest_of_same_run(self, configs: Mapping[Path, Path]) -> Path:
        """The newest checkpoint of a run with this command's model, data and chain; warns of a newer run that has none.

        Args:
            configs: the configurations of runs, by their folders.

        Raises:
            UserError: if there is none; it names an option in which the newest differs.
        """
        groups, different = {name: self.config_dump[name] for name in ("model", "data", "chain")}, ""
        checkpoints = {folder: folder / "checkpoints" / "last.ckpt" for folder in configs}
        newest = {folder: file if file.exists() else configs[folder] for folder, file in checkpoints.items()}
        for folder in sorted(configs, key=lambda folder: newest[folder].stat().st_mtime, reverse=True):
            theirs = yaml.safe_load(configs[folder].read_text(encoding="utf-8"))
            option = next((name for name, *_ in option_changes(groups, {name: theirs.get(name) for name in groups})), None)
            if checkpoints[folder].exists():
                if option is None:
                    return checkpoints[folder]
                different = different or f" {checkpoints[folder]}, the newest, differs in {option}"
            elif option is None and "last" in theirs and not {"verbose", "return_predictions"} & theirs.keys():  # of a fit
                log.warning("ckpt_path: the newer run %s has no checkpoint", folder)
        raise UserError(f"ckpt_path: no run here with the same options of model, data and chain has a checkpoint.{different}")

    def _check_links(self) -> None:
        """Passes the ``links`` of ``init_chain`` on to the module, and refuses those of a fit that resumes.

        Raises:
            UserError: for these, and for links, stages and factors that the checkpoint does not have.
        """
        config = self.config[self.subcommand]
        self.links, self.tests_each_link = config.links, self.subcommand in ("validate", "test") and config.links == "all"
        scale = config.get("scale")
        if (scale or self.tests_each_link) and (config.ckpt_path is None or (scale and self.tests_each_link)):
            raise UserError("links, scale: --links all and --scale need --ckpt_path, and cannot be combined")
        if self.opened is not None and self.subcommand != "fit":
            self.links = 0 if self.tests_each_link else number_of_links(self.links, self.opened.state.names)
            if scale:
                self.opened.state.all_links(config.links).scaled(scale)
        if self.links is None or (config.ckpt_path is not None and self.subcommand != "fit"):
            return
        if config.ckpt_path is not None:
            raise UserError(
                "links: fit resumes the whole chain of ckpt_path. To start from some of its links, use model.init_chain"
            )
        config.model.init_args.init_links, config.links = self.links, None

    # ------------------------------------------------------------------ the run

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        root = os.path.expanduser(config.default_root_dir or os.getcwd())
        run = Path(self.opened.path).parent.parent if self.opened is not None else Path()
        if not config.barebones:
            if self.folder is not None:  # before the config's own loggers: the first decides where checkpoints are
                own = config.logger if isinstance(config.logger, list) else [config.logger]
                own = [logger for logger in own if not isinstance(logger, bool | None)]
                kwargs["logger"] = [CSVLogger(self.folder, name="", version=""), *own]
            elif config.logger in (None, True):  # Lightning's own choice depends on whether tensorboard is installed
                is_evaluated = self.subcommand != "fit" and self.opened is not None and (run / "config.yaml").is_file()
                kwargs["logger"] = CSVLogger(run, name=self.subcommand) if is_evaluated else CSVLogger(root, name="runs")
            callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
            callbacks = kwargs["callbacks"] = list(filter(None, callbacks))
            if config.enable_progress_bar is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
                callbacks.append(RichProgressBar() if rich.get_console().is_terminal else ProgressLines())
            if config.enable_checkpointing is not False:
                callbacks.append(self._get(self.config_init, "last"))
        if config.enable_model_summary is None:  # the module says itself what is trained
            kwargs["enable_model_summary"] = False
        trainer = super().instantiate_trainer(**kwargs)
        check_strategy(trainer.strategy)  # here, too: a forked process could not report it in one line
        if self.opened is not None:
            self._continue_metrics(trainer, run)
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else the user has chosen one
                trainer.strategy.checkpoint_io = AtomicCheckpointIO(self.opened)
        return trainer

    @rank_zero_only
    def _continue_metrics(self, trainer: Trainer, run: Path) -> None:
        """Has a CSVLogger append to the ``metrics.csv`` in the folder of the checkpoint's run, which Lightning would remove."""
        for logger in [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]:
            path = Path(logger.log_dir, "metrics.csv")
            if path.exists() and path.parent.samefile(run):
                earlier = path.rename(path.with_name("metrics.earlier.csv"))
                with warnings.catch_warnings(action="ignore"):  # it announces the removal
                    writer = logger.experiment
                writer.metrics_keys = earlier.read_text(encoding="utf-8").partition("\n")[0].split(",")
                earlier.rename(path)

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.opened is not None:
            scale = self.config[self.subcommand].get("scale")
            self.model.expect_state(self.opened.state, links=self.links, scale=scale)
        else:
            _ = self.model.run.first_chain  # a chain that does not exist is refused here, before the data is prepared

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            if self.tests_each_link:
                self._test_each_link()
            else:
                super()._run_subcommand(subcommand)
        except Interruption:
            if subcommand == "fit":
                self._log_command("resume", "fit")
            raise

    def _test_each_link(self) -> None:
        """Measures the base, and the model after each link: a table, which is also written to ``links.csv``."""
        assert self.opened is not None
        assert self.subcommand is not None
        rows, measure = [], getattr(self.trainer, self.subcommand)
        arguments = self._prepare_subcommand_kwargs(self.subcommand) | {"verbose": False}
        for links, name in enumerate(["base", *self.opened.state.names]):
            self.model.expect_state(self.opened.state, links=links)
            rows.append({"links": links, "stage": name or ""})
            for metrics in measure(**arguments):  # of each data loader
                rows[-1] |= metrics
        path = Path(run_folder(self.trainer), "links.csv")  # on all processes: run_folder broadcasts
        if self.trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[-1])
                writer.writeheader()
                writer.writerows(rows)
            rich.print(metrics_table(rows))
            log.info("written: %s", shortest(path))

    def after_fit(self) -> None:
        """Logs the checkpoint's path, and the next command for it."""
        can_be_tested = is_overridden("test_step", self.model) and getattr(self.datamodule, "can_be_tested", True)
        kind = described_data(self.model.run, "prompt_format").get("kind")
        if isinstance(self.model, COLACausalLM) and kind in ("response", "text"):
            self._log_command("try it", "generate")
        else:
            self._log_command("use it", "test" if can_be_tested else "predict")

    def _log_command(self, what: str, subcommand: str) -> None:
        """Logs the checkpoint's path, and a command for it."""
        folder = Path(run_folder(self.trainer))  # on all processes: run_folder broadcasts
        kind = LastCheckpoint if subcommand == "fit" else ModelCheckpoint  # a fit resumes from the newest state
        callbacks = [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, kind)]
        path = next(filter(None, (callback.best_model_path for callback in callbacks)), None)
        config = folder / "config.yaml"
        if path is None or not config.exists() or not self.trainer.is_global_zero:  # a fit with nothing left to do saves none
            return
        log.info("checkpoint: %s", shortest(path))
        place = shortest(folder if Path(path) == last_checkpoint_of(folder) else path)
        config_words = ["--config", shortest(config), "--ckpt_path", place]
        words = [place, "--prompt", "TEXT"] if subcommand == "generate" else config_words
        log.info("%s: %s", what, shlex.join(["cola", subcommand, *words]))


def shortest(path: str | Path) -> str:
    """A path as people type it: relative where it is in the current folder."""
    return str(path).removeprefix(f"{Path.cwd()}{os.sep}")


def train(words: list[str]) -> int:
    """Runs a LightningCLI subcommand.

    Args:
        words: the arguments of ``cola``.

    Returns:
        The exit status, 0.

    Raises:
        Interruption: after Ctrl-C or SIGTERM, with their exit status.
    """
    watch = RunWatch()
    with watch.listening():
        try:
            cli = COLACLI(words, watch)
            with contextlib.suppress(RuntimeError):  # if another process has failed
                cli.trainer.strategy.barrier()
        finally:
            layout.leave_processes()
    return 0
