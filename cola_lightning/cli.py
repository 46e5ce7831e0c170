"""The ``cola`` command: stock LightningCLI, with one clear line and an exit status for everything that can go wrong.

Exit status: 0; 2 for what the user wrote wrong, with one last line ``error: ...``; 1 for what failed while running; 130 after
Ctrl-C; 143 after SIGTERM.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from cola_lightning import __version__
from cola_lightning.callbacks import ChainOfLoRA, PredictionWriter
from cola_lightning.data import DigitsDataModule  # noqa: F401  # known to the command line by its short name
from cola_lightning.errors import UserError, find_user_error, one_line
from cola_lightning.modules import CHECKPOINT_KEY, COLAModule, base_from_checkpoint
from cola_lightning.modules.digits import COLADigits  # noqa: F401  # known to the command line by its short name

log = logging.getLogger(__name__)

DESCRIPTION = "Chain of LoRA: fine-tune a pretrained model by a chain of low-rank updates."


class ConfigSaver(SaveConfigCallback):
    """Saves the run's configuration once it is known to be sound: when its first epoch starts, not before."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            super().setup(trainer, pl_module, str(trainer.state.fn))

    on_train_epoch_start = on_validation_start = on_test_start = on_predict_start = _save


class RunWatch(Callback):
    """Remembers where a run writes and why it ended: Lightning exits with 1 after Ctrl-C, and with 0 after SIGTERM."""

    exit_status = 0
    folder: Path | None = None

    def remove_empty_folder(self) -> None:
        """Takes back the folder that a logger made for a run that was refused; one that holds anything stays."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                self.folder.rmdir()
                self.folder.parent.rmdir()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.exit_status = 130
        elif isinstance(exception, SIGTERMException):
            self.exit_status = 143


class COLACLI(LightningCLI):
    """LightningCLI with the group ``chain``, metrics in a CSV file, and predictions in a JSONL file."""

    def __init__(self, args: Sequence[str] | None, watch: RunWatch) -> None:
        self.watch = watch
        super().__init__(
            COLAModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # True would build one optimizer for all links; the module builds one for each.
            auto_configure_optimizers=False,
            save_config_callback=ConfigSaver,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [PredictionWriter(), watch]},
            # Without allow_abbrev=False, argparse would take --chain.every_n_epoch for --chain.every_n_epochs.
            parser_kwargs={"prog": "cola", "description": DESCRIPTION, "version": __version__}
            | {"allow_abbrev": False, "exit_on_error": False}
            | {name: {"allow_abbrev": False, "exit_on_error": False} for name in self.subcommands()},
            args=None if args is None else list(args),
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ChainOfLoRA, "chain")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.subcommand = self.config["subcommand"]
        if self._ckpt_path is not None:  # here, for Lightning reads the file next
            _check_checkpoint(self._ckpt_path)

    @override
    def before_instantiate_classes(self) -> None:
        if "deepspeed" in str(self._get(self.config, "trainer").strategy).lower():
            raise UserError(
                "trainer.strategy: expected one that keeps whole parameters (one device, ddp), received deepspeed, "
                "whose engine owns the optimizer that a knot must replace"
            )

    @property
    def _ckpt_path(self) -> Path | None:
        value = self._get(self.config, "ckpt_path")
        return None if value in (None, "best", "last", "hpc") or "://" in str(value) else Path(value)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        root = config.default_root_dir or os.getcwd()
        _check_writable("trainer.default_root_dir", root)
        if config.logger in (None, True):  # Lightning's own choice depends on whether tensorboard is installed
            kwargs["logger"] = CSVLogger(root, name="runs")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # Lightning's words for arguments that do not go together
            raise UserError(f"trainer: {one_line(str(error))}") from error
        self.watch.folder = Path(trainer.log_dir) if trainer.loggers and trainer.log_dir else None
        for logger in trainer.loggers:
            if logger.save_dir is not None:
                _check_writable("trainer.logger.save_dir", logger.save_dir)
        for callback in trainer.checkpoint_callbacks:
            if dirpath := getattr(callback, "dirpath", None):
                _check_writable("trainer.callbacks.dirpath", dirpath)
        return trainer

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        with contextlib.ExitStack() as stack:
            if self._ckpt_path is not None:
                stack.enter_context(base_from_checkpoint(self._ckpt_path))
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Says where the checkpoint is and what to do with it."""
        config = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "config.yaml"  # log_dir is a broadcast
        callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        path = next((p for c in callbacks for p in (c.last_model_path, c.best_model_path) if p), None)
        if path is None or not self.trainer.is_global_zero:
            return
        log.info("checkpoint: %s", path)
        log.info("use it: cola test --config %s --ckpt_path %s (or validate, predict; fit goes on from it)", config, path)


def _check_checkpoint(path: Path) -> None:
    """Refuses a file that is not there or not a checkpoint of a COLA module."""
    if not path.is_file():
        raise UserError(f"ckpt_path: expected a checkpoint file, received {str(path)!r}, which does not exist")
    try:
        is_ours = CHECKPOINT_KEY in torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # whatever torch.load makes of the bytes
        raise UserError(f"ckpt_path: expected a checkpoint file, received {str(path)!r}, which cannot be read") from error
    if not is_ours:
        raise UserError(f"ckpt_path: expected a checkpoint of a COLA module, received {str(path)!r}, which holds no chain")


def _check_writable(field: str, folder: str | Path) -> None:
    """Refuses a folder that could not be made or written to; makes nothing."""
    if "://" in str(folder):
        return
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{field}: expected a folder that can be written, received {str(folder)!r}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{field}: expected a folder that can be written, received {str(folder)!r}: no permission in {existing}"
        )


class ConsoleHandler(logging.Handler):
    """Prints log lines through rich's console, so that they do not tear its progress bar; one line each."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        rich.get_console().print(self.format(record), soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    package = logging.getLogger("cola_lightning")
    handler = ConsoleHandler()
    level = package.level
    if os.environ.get("LOCAL_RANK", "0") == "0":
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _users_mistake(error: BaseException) -> str | None:
    """What to tell the user, in one line, if the error is of the user's making; else None."""
    if (mistake := find_user_error(error)) is not None:
        return str(mistake)
    if isinstance(error, ArgumentError | MisconfigurationException):
        return one_line(str(error))
    return None


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: what follows ``cola``; None: what the process was given.

    Returns:
        The exit status; see the module's docstring.
    """
    watch = RunWatch()
    with _logging():
        try:
            COLACLI(args, watch)
        except SystemExit as exit_:  # --help, and Lightning after Ctrl-C
            return watch.exit_status or int(exit_.code or 0)
        except Exception as error:
            if (message := _users_mistake(error)) is None:
                raise
            watch.remove_empty_folder()
            print(f"error: {message}", file=sys.stderr)
            return 2
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # else gloo's threads may abort the process as it exits
    return watch.exit_status


def entry_point() -> None:
    """The console script."""
    sys.exit(main())
