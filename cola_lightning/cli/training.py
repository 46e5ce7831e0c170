"""``cola fit``, ``validate``, ``test`` and ``predict``: stock LightningCLI, with a clear one-line message for user errors."""

import contextlib
import itertools
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

import cola_lightning.data  # noqa: F401  # gives the command line the data modules' short names
from cola_lightning import __version__, layout
from cola_lightning.callbacks import (
    ChainOfLoRA,
    ChainProgressBar,
    Interruption,
    LastCheckpoint,
    PredictionWriter,
    RunWatch,
    check_strategy,
    run_folder,
)
from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.cli.help import DESCRIPTION, SUBCOMMANDS, TITLES, usage
from cola_lightning.errors import UserError, causes, one_line, passes_through_own_code
from cola_lightning.hf import COLACausalLM
from cola_lightning.module import COLAModule
from cola_lightning.module.state import prompt_format_of
from cola_lightning.seeding import check_seed
from cola_lightning.writing import check_writable

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).parent.parent
CLASSES = {"model": "cola_lightning.COLACausalLM", "data": "cola_lightning.TextDataModule"}  # where none is named
EPOCHS = 3  # of a fit without a limit: Lightning's default is 1000
CLASS_OPTION = re.compile(
    r"\A--(?P<group>model|data)\.(?!help\b|class_path\b|init_args\b|dict_kwargs\b)(?P<name>\w+)(?:=(?P<value>.*))?\Z", re.DOTALL
)


class ConfigSaver(SaveConfigCallback):
    """Saves the run's configuration beside its checkpoints, once it is known to work: when its first epoch starts.

    A fit replaces an existing file; an evaluation, which may use the same folder, leaves the fit's. The checkpoint that the run
    resumed from is omitted: a later command with this configuration would use it in place of the run's own.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.already_saved:
            return
        self.already_saved, folder = True, run_folder(trainer)
        path, files = os.path.join(folder, self.config_filename), get_filesystem(folder)
        if trainer.is_global_zero and (trainer.state.fn == "fit" or not files.exists(path)):
            files.makedirs(folder, exist_ok=True)
            config = self.config.clone()
            config.ckpt_path = config.links = None  # another run's: this run's own checkpoints are beside the file
            self.parser.save(config, path, skip_none=False, overwrite=True, multifile=self.multifile)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: D102
        self._save(trainer, pl_module)

    on_validation_start = on_test_start = on_predict_start = _save


class COLACLI(LightningCLI):
    """LightningCLI with the group ``chain``, metrics in a CSV file, and predictions in a JSONL file."""

    def __init__(self, args: Sequence[str] | None, watch: RunWatch) -> None:
        self.watch = watch
        self.words = sys.argv[1:] if args is None else list(args)
        self.opened: OpenedCheckpoint | None = None
        super().__init__(
            COLAModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # True would build one optimizer for all links; the module builds one for each link.
            auto_configure_optimizers=False,
            seed_everything_default=0,  # as Lightning's own, which it warns of
            save_config_callback=ConfigSaver,
            trainer_defaults={"callbacks": [PredictionWriter(), watch]},
            # Without allow_abbrev=False, argparse would accept --chain.every_n_epoch as --chain.every_n_epochs.
            parser_kwargs={"prog": "cola", "description": DESCRIPTION, "version": __version__}
            | {"allow_abbrev": False, "exit_on_error": False}
            | {
                name: {"allow_abbrev": False, "exit_on_error": False, "description": SUBCOMMANDS[name], "usage": usage(name)}
                for name in self.subcommands()
            },
            args=None if args is None else list(args),
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method there
        """The subcommand that the command line names: the parsers of all four would take twice the time to build."""
        known = super().subcommands()
        return {name: known[name] for name in self.words[:1] if name in known} or known

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Puts first in ``--help`` what users set most: model, data and chain; then the Trainer with its many options."""
        parser.add_lightning_class_args(COLAModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        parser.add_lightning_class_args(ChainOfLoRA, "chain")
        parser.add_class_arguments(LastCheckpoint, "last")
        parser.add_argument(
            "--links",
            type=int | None,
            default=None,
            help="Number of links of the checkpoint, or of model.init_chain, to use: the finished ones first, then the live "
            "one. 0 is the base. Default: all.",
        )
        parser.add_lightning_class_args(Trainer, "trainer")
        unnamed = {group: {"class_path": name} for group, name in CLASSES.items() if not names_class(group, self.words)}
        parser.set_defaults(unnamed)  # beside another class, the defaults of this one would stay
        for group, title in TITLES.items():
            (parser.groups or {})[group].title = title

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(as_texts(self.words))
        self.subcommand = self.config["subcommand"]
        check_groups(self.config[self.subcommand])
        self._expand_home()
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool):
            check_seed("seed_everything", seed)
        self._open_checkpoint()
        self._check_links()
        self._limit_epochs()
        self._warn_of_base()

    @override
    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let hyperparameters in the checkpoint override the user's."""

    def _expand_home(self) -> None:
        """Replaces ``~`` in the folders of runs: Lightning does so in some of a run's paths alone."""
        trainer = self._get(self.config, "trainer")
        if trainer.default_root_dir is not None:
            trainer.default_root_dir = os.path.expanduser(trainer.default_root_dir)
        for given in _with_save_dir(trainer.logger):
            given.save_dir = os.path.expanduser(given.save_dir)

    def _open_checkpoint(self) -> None:
        """Checks the checkpoint before anything is created; ``last`` is the newest ``last.ckpt`` of the runs in this folder."""
        config = self.config[self.subcommand]
        if config.ckpt_path == "last":
            root = Path(config.trainer.default_root_dir or os.getcwd())
            places = [root / "checkpoints" / "last.ckpt", *root.glob("runs/version_*/checkpoints/last.ckpt")]
            for given in _with_save_dir(config.trainer.logger):
                for run in ("*/*", "*"):  # the second: of a logger without a name
                    places += Path(given.save_dir).glob(f"{run}/checkpoints/last.ckpt")
            if not (found := [place for place in places if place.is_file()]):
                raise UserError(f"ckpt_path: expected the last.ckpt of an earlier run in {str(root)!r}, received none there")
            config.ckpt_path = str(max(found, key=lambda place: place.stat().st_mtime))
            log.info("ckpt_path: %s", config.ckpt_path)
        if config.ckpt_path is not None and "://" not in config.ckpt_path:
            config.ckpt_path = os.path.expanduser(config.ckpt_path)
            is_plain = config.weights_only is not False
            self.opened = OpenedCheckpoint.open(config.ckpt_path, "ckpt_path", weights_only=is_plain)

    def _check_links(self) -> None:
        """Refuses ``links`` without a chain to select them from; passes those of ``init_chain`` on to the module."""
        config = self.config[self.subcommand]
        self.links = config.links
        if self.links is None or (config.ckpt_path is not None and self.subcommand != "fit"):
            return
        if config.ckpt_path is not None:
            raise UserError(
                f"links: expected none beside ckpt_path, for fit resumes with the whole chain, received {self.links}; "
                "--model.init_chain begins a new run from some of its links"
            )
        if self._options_of("model").get("init_chain") is None:
            raise UserError(f"links: expected ckpt_path or model.init_chain beside it, received {self.links} alone")
        config.model.init_args.init_links, config.links = self.links, None

    def _options_of(self, part: str) -> Any:
        """The options of ``model`` or ``data`` by name; none for a constructor without parameters."""
        return self._get(self.config, part).get("init_args") or {}

    def _limit_epochs(self) -> None:
        """Sets three epochs for a fit without a limit; written to the run's configuration, as if they had been given."""
        trainer = self._get(self.config, "trainer")
        has_limit = trainer.max_epochs is not None or trainer.max_steps != -1 or trainer.max_time is not None
        if self.subcommand == "fit" and not has_limit and not trainer.fast_dev_run:
            trainer.max_epochs = EPOCHS
            log.info("trainer.max_epochs: %d, for none of max_epochs, max_steps and max_time is given", EPOCHS)

    def _warn_of_base(self) -> None:
        """Logs what is evaluated if no checkpoint is given; a run's saved configuration does not name one."""
        if self.subcommand != "fit" and self.config[self.subcommand].ckpt_path is None:
            what = self._options_of("model").get("init_chain") or "the base alone"
            log.warning("%s: this is %s, for no --ckpt_path is given", self.subcommand, what)

    @override
    def before_instantiate_classes(self) -> None:
        if self.subcommand == "predict" and not self.config.predict.trainer.callbacks:
            self.config.predict.return_predictions = False  # unused: they are written to a file

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        root = config.default_root_dir or os.getcwd()
        check_writable("trainer.default_root_dir", root)
        if config.logger in (None, True) and not config.barebones:
            # Lightning's own choice depends on whether tensorboard is installed.
            kwargs["logger"] = CSVLogger(root, name="runs")
        if config.enable_model_summary is None:  # the module's own log line says more
            kwargs["enable_model_summary"] = False
        kwargs["callbacks"] = callbacks = _as_list(config.callbacks)
        has_bar = config.enable_progress_bar is False or any(isinstance(callback, ProgressBar) for callback in callbacks)
        if not config.barebones and not has_bar:
            callbacks.append(ChainProgressBar())
        if config.enable_checkpointing is not False and not config.barebones:
            callbacks.append(self._get(self.config_init, "last"))
        try:
            with warnings.catch_warnings():  # refused below
                warnings.filterwarnings("ignore", r"You passed `Trainer\(accelerator='cpu', precision='16-mixed'\)`")
                trainer = super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError, ValueError) as error:  # Lightning's message for incompatible arguments
            if passes_through_own_code(error):
                raise
            raise UserError(f"trainer: {one_line(str(error))}") from error
        if str(config.precision) in ("16", "16-mixed") and isinstance(trainer.accelerator, CPUAccelerator):
            raise UserError(
                "trainer.precision: expected bf16-mixed, bf16-true or 32-true on a CPU, where Lightning replaces 16-mixed by "
                f"bf16-mixed; received {config.precision}"
            )
        check_strategy(trainer.strategy)  # here, too: a forked process could not report it in one line
        if self.subcommand == "fit":
            field = "trainer.default_root_dir" if trainer.logger is None else "trainer.logger"
            _check_config_of_run(field, Path(trainer.log_dir or root) / "config.yaml")
        for logger in trainer.loggers:
            if logger.save_dir is not None:
                check_writable("trainer.logger.save_dir", Path(logger.save_dir) / (logger.name or ""))
        for callback in trainer.checkpoint_callbacks:
            if dirpath := getattr(callback, "dirpath", None):
                check_writable("trainer.callbacks.dirpath", dirpath)
        self.watch.log_dir = trainer.log_dir if trainer.loggers else None
        return trainer

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.opened is not None:
            self.opened.links, self.model.pending = self.links, self.opened
        else:
            _ = self.model.first_chain  # a chain that does not exist is refused here, before the data is prepared

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Interruption:
            if subcommand == "fit":
                self._log_command("resume: %s", "fit")
            raise

    def after_fit(self) -> None:
        """Logs the checkpoint's path, and the commands that work for it and its data."""
        commands, of_data = self._commands(), self._options_of("data")
        others = f"or {', '.join(commands[1:])}; " if commands[1:] else ""
        path = self._log_command(f"use it: %s ({others}fit resumes from it)", commands[0]) if commands else None
        if "predict" in commands and "source" in of_data:
            own = ["--data.source", "NEW_FILE"] + (["--data.subset", "null"] if of_data.get("subset") is not None else [])
            self._log_command("new rows, with or without their labels or answers: %s", "predict", *own)
        if path is not None and self._is_generative:
            or_chat = " (or --chat)" if self.model.tokenizer.chat_template else ""
            log.info("try it: %s", f"{shlex.join(['cola', 'generate', '--checkpoint', path])} --prompt TEXT{or_chat}")
        if self.config_init[self.subcommand].ckpt_path is not None and not self.watch.has_begun:
            log.info("nothing was left to do: the checkpoint is already at trainer.max_epochs or max_steps")

    def after_predict(self) -> None:
        """Logs why there is no file if no batch was predicted."""
        if not sum(self.trainer.num_predict_batches):
            log.info("no predictions: trainer.limit_predict_batches %s leaves no batch", self.trainer.limit_predict_batches)

    @property
    def _is_generative(self) -> bool:
        kind = prompt_format_of(self.trainer).get("kind")
        return isinstance(self.model, COLACausalLM) and kind in ("response", "text")

    def _commands(self) -> list[str]:
        """The subcommands that work for the run's module and data, the most useful one first."""
        data, model = self.datamodule, self.model
        commands = ["validate"] if sum(self.trainer.num_val_batches) else []
        if (
            getattr(data, "can_be_tested", True)
            and is_overridden("test_dataloader", data)
            and is_overridden("test_step", model)
        ):
            commands.insert(0, "test")
        if is_overridden("predict_dataloader", data) and is_overridden("predict_step", model):
            commands.insert(0 if self._is_generative or "test" not in commands else len(commands), "predict")
        return commands

    def _log_command(self, message: str, subcommand: str, *options: str) -> str | None:
        """Logs the checkpoint's path, and a command for it; returns the path, None if there is no checkpoint."""
        config = Path(run_folder(self.trainer)) / "config.yaml"  # on all processes: run_folder broadcasts
        callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if subcommand == "fit":
            callbacks = [c for c in callbacks if isinstance(c, LastCheckpoint)]
        path = next((c.best_model_path for c in callbacks if c.best_model_path), None)
        if path is None or not self.trainer.is_global_zero:
            return None
        if not options:
            log.info("checkpoint: %s", path)
        if config.exists():  # a fit that had nothing left to do saves none
            command = shlex.join(["cola", subcommand, "--config", str(config), "--ckpt_path", path, *options])
            log.info(message, command)
        return path


def check_groups(config: Namespace | dict[str, Any]) -> None:
    """Refuses a group that holds no options, such as ``chain:`` with all of its lines commented out."""
    for group in TITLES:
        if not isinstance(value := config.get(group), Namespace | dict):
            raise UserError(f"{group}: expected options, each with its value, received {value!r}")


def names_class(group: str, words: Sequence[str]) -> bool:
    """Whether a command line, or a configuration file of it, names the class of ``model`` or ``data``.

    Example:
        >>> names_class("data", ["fit", "--data=TextDataModule"]), names_class("data", ["fit", "--data.source", "rows.csv"])
        (True, False)
    """
    if any(word.partition("=")[0] in (f"--{group}", f"--{group}.class_path") for word in words):
        return True
    following = (word for option, word in itertools.pairwise(words) if option == "--config")
    for path in (*following, *(word.removeprefix("--config=") for word in words if word.startswith("--config="))):
        with contextlib.suppress(OSError, AttributeError, yaml.YAMLError, UnicodeDecodeError):  # said where it is parsed
            config = yaml.safe_load(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
            parts = [part.get(group) for part in (config, *config.values()) if isinstance(part, dict)]  # of a subcommand, too
            if any(isinstance(part, str) or (isinstance(part, dict) and "class_path" in part) for part in parts):
                return True
    return False


def as_texts(words: Sequence[str]) -> list[str]:
    """A command line whose options of ``model`` and ``data`` are texts: ``--data.init_args={"prompt": "a: b"}``.

    jsonargparse reads ``--data.prompt 'a: b'`` as YAML before it knows the option's type, and again for that type: a text that
    is a mapping, a list or nothing in YAML is lost. A text inside ``init_args`` is read for its type alone.

    Example:
        >>> as_texts(["fit", "--data.prompt", "a: b", "--model.rank=2", "--chain.ranks", "[2]"])
        ['fit', '--data.init_args={"prompt": "a: b"}', '--model.init_args={"rank": "2"}', '--chain.ranks', '[2]']
    """
    joined: list[str] = []
    for word in words:
        last = CLASS_OPTION.fullmatch(joined[-1]) if joined else None
        if last and last["value"] is None and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [CLASS_OPTION.sub(_inside_init_args, word) for word in joined]


def _inside_init_args(option: re.Match[str]) -> str:
    if option["value"] is None:  # jsonargparse says so
        return option[0]
    text = yaml.safe_dump({option["name"]: option["value"]}, default_style='"', default_flow_style=True, width=sys.maxsize)
    return f"--{option['group']}.init_args={text.strip()}"


def _check_config_of_run(field: str, path: Path) -> None:
    """Refuses a file in place of a run's configuration that no run has saved: it would be replaced."""
    if path.is_file() and not path.read_bytes().startswith(b"# lightning.pytorch=="):
        raise UserError(
            f"{field}: expected a folder without a config.yaml of one's own, for the run saves its configuration there, "
            f"received {str(path.parent)!r}: rename the file or name another folder"
        )


def _with_save_dir(loggers: Any) -> list[Namespace]:
    """The arguments of those of a configuration's loggers that are given a folder."""
    given = [
        one.get("init_args") for one in (loggers if isinstance(loggers, list) else [loggers]) if isinstance(one, Namespace)
    ]
    return [args for args in given if isinstance(args, Namespace) and args.get("save_dir") is not None]


def _as_list(callbacks: list[Callback] | Callback | None) -> list[Callback]:
    return [] if callbacks is None else [*callbacks] if isinstance(callbacks, list) else [callbacks]


def refusal_of_libraries(error: BaseException) -> str | None:
    """The message of Lightning or jsonargparse for invalid arguments, in one line; None for any other error."""
    if isinstance(error, ValueError) and "Does not validate against any of the Union subtypes" in str(error):
        *_, innermost = causes(error)  # raised by a class that jsonargparse instantiated
        is_ours = Path(traceback.extract_tb(innermost.__traceback__)[-1].filename).is_relative_to(PACKAGE)
        return None if is_ours else one_line(str(innermost))  # ours would be a UserError
    # An error from Lightning's own code (for a val_check_interval above the number of batches, say) is a user error.
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    is_lightnings = isinstance(error, TypeError | ValueError) and Path(lightning.__file__).parent in Path(place).parents
    return one_line(str(error)) if is_lightnings or isinstance(error, MisconfigurationException) else None


def train(args: Sequence[str] | None) -> int:
    """Runs a LightningCLI subcommand.

    Args:
        args: the arguments of ``cola``; None: the process's.

    Returns:
        The exit status, 0.

    Raises:
        Interruption: after Ctrl-C or SIGTERM, with their exit status.
    """
    watch = RunWatch()
    with watch.listening():
        try:
            cli = COLACLI(args, watch)
            with contextlib.suppress(RuntimeError):  # if another process has failed
                cli.trainer.strategy.barrier()
        finally:
            watch.remove_empty_folder()
            layout.leave_processes()
    return 0
