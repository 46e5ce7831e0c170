"""A fit as a value: its complete configuration, and its objects, with which a caller does what it wants."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from cola_lightning.callbacks.command import RunWatch
from cola_lightning.cli.training import COLACLI


class MadeRun(COLACLI):
    """A run whose objects are made, and which is left to the caller.

    Args:
        config: its complete configuration.
        subcommand: what it would do.
        watch: handles signals; None: a new one.
        folder: the run's; None: a new one.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        subcommand: str = "fit",
        *,
        watch: RunWatch | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__([subcommand], watch or RunWatch(), folder, config)

    def fit(self) -> None:
        """Trains."""
        with self.watch.listening(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")  # of a run that was stopped
            self.trainer.fit(**self._prepare_subcommand_kwargs("fit"))

    @override
    def _run_subcommand(self, subcommand: str) -> None: ...


class _Resolved(COLACLI):
    """The options of a command, with which nothing is done."""

    def _settle(self) -> None:
        self.subcommand = self.config["subcommand"]

    def _set_seed(self) -> None: ...

    @override
    def instantiate_classes(self) -> None: ...

    @override
    def _run_subcommand(self, subcommand: str) -> None: ...


def resolve(words: Sequence[str]) -> dict[str, Any]:
    """The complete configuration of ``cola fit`` with these arguments, including defaults; nothing is made.

    Raises:
        UserError: for arguments that ``cola fit`` would refuse when it parses them; likewise jsonargparse's ArgumentError.
    """
    return _Resolved(["fit", *words], RunWatch()).config_dump


@contextlib.contextmanager
def in_silence() -> Iterator[None]:
    """Inside the block, nothing is logged: a fit that follows will say it again."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
