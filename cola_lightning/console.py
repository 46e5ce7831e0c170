"""The package's log lines on the console, for the command line."""

import contextlib
import logging
from collections.abc import Iterator

from typing_extensions import override

PACKAGE = "cola_lightning"


class ConsoleHandler(logging.Handler):
    """Prints log lines through rich's console, which keeps its progress bar intact; one line each.

    Args:
        is_stderr: print them to standard error.
    """

    def __init__(self, *, is_stderr: bool = False) -> None:
        super().__init__()
        self.is_stderr = is_stderr

    @override
    def emit(self, record: logging.LogRecord) -> None:
        import rich
        from rich.console import Console

        console = Console(stderr=True) if self.is_stderr else rich.get_console()
        console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def log_on_console(*, is_shown: bool = True, is_stderr: bool = False) -> Iterator[None]:
    """Inside the block, the package's log lines are printed from level INFO on.

    Args:
        is_shown: false for all processes of a run except the first.
        is_stderr: print them to standard error, because standard output is a result.
    """
    package, handler = logging.getLogger(PACKAGE), ConsoleHandler(is_stderr=is_stderr)
    level = package.level
    if is_shown:
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
