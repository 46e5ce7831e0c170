"""The ``cola`` command: runs a subcommand, and reports an error by one line and the exit status.

Exit status: 0; 2 for a user error, with one last line ``error: ...``; 1 for a failure while running, which has its traceback
where it comes from the user's own code; 130 after Ctrl-C; 143 after SIGTERM.

Only what a subcommand needs is imported: ``inspect`` needs neither lightning nor transformers.
"""

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

from typing_extensions import override

from cola_lightning import __version__
from cola_lightning.cli.help import SUBCOMMANDS, overview
from cola_lightning.errors import OutsideError, UserError, causes, nearest, one_line, passes_through_own_code

# The subcommands that are not LightningCLI's: where the function of that name is, which is imported when it is called.
COMMANDS = {
    "compare": "cola_lightning.study.command",
    "configs": "cola_lightning.cli.configs",
    "export": "cola_lightning.cli.export",
    "generate": "cola_lightning.cli.generate",
    "inspect": "cola_lightning.cli.inspect",
}
# Lightning's log lines that say nothing about the run.
NOISE = ("💡 Tip:", "TPU available:", "HPU available:")
# Lightning's advice for short runs, whose metrics each validation logs anyway.
ADVICE = "The number of training batches .* is smaller than the logging interval"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: the arguments of ``cola``; None: the process's.

    Returns:
        The exit status; see the module's docstring.
    """
    words = sys.argv[1:] if args is None else list(args)
    with _logging():
        try:
            return _run(words, args)
        except KeyboardInterrupt:  # before a handler is installed, or during imports
            return 130
        except SystemExit as exit_:  # --help, or code of the user's; as Python does, except that it exits
            if isinstance(exit_.code, int | None):
                return exit_.code or 0
            print(exit_.code, file=sys.stderr)
            return 1
        except Exception as error:
            if (refusal := _refusal(error)) is None:
                raise
            message, status = refusal
            print(f"error: {message}", file=sys.stderr)
            return status


def _run(words: Sequence[str], args: Sequence[str] | None) -> int:
    if words == ["--version"]:  # without slow imports
        print(f"cola {__version__}")
        return 0
    if words in (["-h"], ["--help"]):
        print(overview())
        return 0
    first = words[0] if words else ""
    if not first.startswith("-") and first not in SUBCOMMANDS:
        received = f"{first!r}{nearest(first, SUBCOMMANDS)}" if words else "none"
        raise UserError(f"cola: expected {', '.join(SUBCOMMANDS)}, received {received} (cola --help describes them)")
    if first in COMMANDS:
        command: Callable[[Sequence[str]], int | None] = getattr(importlib.import_module(COMMANDS[first]), first)
        return command(words[1:]) or 0
    from cola_lightning.cli.training import train

    return train(args)


def _refusal(error: BaseException) -> tuple[str, int] | None:
    """The message of an error in one line and the exit status; None for what is reported by its traceback.

    That is what fails in the user's own code, and what neither this package, jsonargparse nor Lightning refuses.
    """
    for cause in causes(error):  # jsonargparse wraps a constructor's exceptions
        if isinstance(cause, UserError | OutsideError):
            return str(cause), 1 if isinstance(cause, OutsideError) else 2
        if passes_through_own_code(cause):
            return None
    from jsonargparse import ArgumentError

    message: str | None = None
    if isinstance(error, PermissionError) and error.filename is not None:
        message = f"cola: expected a file or folder that may be used, received {str(error.filename)!r}: {error.strerror}"
    elif isinstance(error, ArgumentError):
        message = one_line(str(error))
    elif "lightning" in sys.modules:
        from cola_lightning.cli.training import refusal_of_libraries

        message = refusal_of_libraries(error)
    return None if message is None else (message, 2)


class ConsoleHandler(logging.Handler):
    """Prints log lines through rich's console, which keeps its progress bar intact; one line each."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        import rich

        rich.get_console().print(self.format(record), soft_wrap=True, markup=False, highlight=False)


def _is_of_the_run(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    package, lightnings = logging.getLogger("cola_lightning"), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    handler = ConsoleHandler()
    level = package.level
    if os.environ.get("LOCAL_RANK", "0") == "0":
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    lightnings.addFilter(_is_of_the_run)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ADVICE)
            yield
    finally:
        lightnings.removeFilter(_is_of_the_run)
        package.removeHandler(handler)
        package.setLevel(level)
