"""The ``cola`` command: stock LightningCLI, with one clear line and an exit status for everything that can go wrong.

Exit status: 0; 2 for what the user wrote wrong, with one last line ``error: ...``; 1 for what failed while running; 130 after
Ctrl-C; 143 after SIGTERM.
"""

import contextlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import rich
import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

import cola_lightning.data  # noqa: F401  # known to the command line by their short names, as the modules are
from cola_lightning import __version__
from cola_lightning.callbacks import ChainOfLoRA, PredictionWriter, RunWatch, check_strategy
from cola_lightning.errors import HubError, UserError, causes, one_line
from cola_lightning.modules import CHECKPOINT_KEY, COLAModule, base_from_checkpoint

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
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise UserError(f"config: expected a text file in UTF-8, received bytes that are none ({error.reason})") from error
        self.subcommand = self.config["subcommand"]
        for group in ("trainer", "chain"):
            if not isinstance(value := self._get(self.config, group), Namespace):
                raise UserError(f"{group}: expected options, each with its value, received {value!r}")
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything: expected a whole number from 0 to 2**32 - 1, received {seed}")
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
        is_found_by_lightning = value == "last" and self.subcommand == "fit"  # of an earlier fit into the same folder
        return None if value is None or is_found_by_lightning or "://" in value else Path(value)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        root = config.default_root_dir or os.getcwd()
        _check_writable("trainer.default_root_dir", root)
        if config.logger in (None, True) and not config.barebones:
            # Lightning's own choice depends on whether tensorboard is installed.
            kwargs["logger"] = CSVLogger(root, name="runs")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError, ValueError) as error:  # Lightning's words for arguments that do not go together
            raise UserError(f"trainer: {one_line(str(error))}") from error
        check_strategy(trainer.strategy)  # here, too: a forked process could not tell of it in one line
        for logger in trainer.loggers:
            if logger.save_dir is not None:
                _check_writable("trainer.logger.save_dir", Path(logger.save_dir) / (logger.name or ""))
        for callback in trainer.checkpoint_callbacks:
            if dirpath := getattr(callback, "dirpath", None):
                _check_writable("trainer.callbacks.dirpath", dirpath)
        if trainer.loggers and trainer.log_dir:
            self.watch.expect_folder(trainer.log_dir)
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
        if config.exists():  # a fit that had nothing left to do saves none
            command = shlex.join(["cola", "test", "--config", str(config), "--ckpt_path", path])
            log.info("use it: %s (or validate, predict; fit goes on from it)", command)


def _check_checkpoint(path: Path) -> None:
    """Refuses a file that is not there or not a checkpoint of a COLA module."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"ckpt_path: expected a checkpoint file, received {str(path)!r}, which {what}")
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
    for cause in causes(error):  # jsonargparse wraps what a constructor raises
        if isinstance(cause, UserError):
            return str(cause)
    if isinstance(error, ValueError) and "Does not validate against any of the Union subtypes" in str(error):
        *_, innermost = causes(error)  # what a class that jsonargparse makes said of its arguments
        return one_line(str(innermost))
    # What Lightning's own code refuses (a val_check_interval above the number of batches, say) is a mistake in its arguments.
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    is_lightnings = isinstance(error, TypeError | ValueError) and Path(lightning.__file__).parent in Path(place).parents
    if is_lightnings or isinstance(error, ArgumentError | MisconfigurationException):
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
        except KeyboardInterrupt:  # before Lightning's own handler
            return 130
        except SystemExit as exit_:  # --help, and Lightning after Ctrl-C
            return watch.exit_status or int(exit_.code or 0)
        except Exception as error:
            hub_error = next((cause for cause in causes(error) if isinstance(cause, HubError)), None)
            if (message := str(hub_error) if hub_error else _users_mistake(error)) is None:
                raise
            watch.remove_empty_folders()
            print(f"error: {message}", file=sys.stderr)
            return 1 if hub_error else 2
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # else gloo's threads may abort the process as it exits
    return watch.exit_status
