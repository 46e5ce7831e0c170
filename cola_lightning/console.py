"""The package's log lines on the console, for the command line and for a script that configures no logging."""

import contextlib
import logging
from collections.abc import Iterator

from typing_extensions import override

PACKAGE = "cola_lightning"


class ConsoleHandler(logging.Handler):
    """Prints log lines through rich's console, which keeps its progress bar intact; one line each."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        import rich

        rich.get_console().print(self.format(record), soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def log_on_console(*, is_shown: bool = True) -> Iterator[None]:
    """Inside the block, the package's log lines are printed from level INFO on.

    Args:
        is_shown: false for all processes of a run except the first.
    """
    package, handler = logging.getLogger(PACKAGE), ConsoleHandler()
    level = package.level
    if is_shown:
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def is_logging_configured() -> bool:
    """Whether the user or the command line has chosen where the package's log lines go, or which."""
    package = logging.getLogger(PACKAGE)
    return bool(package.level or package.handlers or logging.getLogger().handlers)
