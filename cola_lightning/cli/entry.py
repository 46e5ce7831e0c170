"""The ``cola`` command: runs a subcommand, and reports an error by one line and the exit status.

Exit status: 0; 2 for a user error, with one last line ``error: ...``; 1 for a failure while running, which has its traceback
where it comes from the user's own code; 3 if ``cola stages`` found more forgetting than is allowed; 130 after Ctrl-C; 143
after SIGTERM.

Only what a subcommand needs is imported: ``inspect`` needs neither lightning nor transformers.
"""

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cola_lightning import __version__
from cola_lightning.cli.help import SUBCOMMANDS, overview
from cola_lightning.console import log_on_console
from cola_lightning.errors import OutsideError, UserError, causes, nearest, one_line, passes_through_own_code

EXTRAS = {"peft": "peft", "bitsandbytes": "nf4", "matplotlib": "plot", "PIL": "images"}  # in pyproject.toml, by package


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: the arguments of ``cola``; None: the process's.

    Returns:
        The exit status; see the module's docstring.
    """
    words = sys.argv[1:] if args is None else list(args)
    # Of a launcher: torchrun and Lightning's own, Slurm, LSF. The first that is set counts, as in Lightning.
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    is_shown, is_stderr = next(filter(None, ranks), "0") == "0", words[:1] in (["generate"], ["inspect"])
    with log_on_console(is_shown=is_shown, is_stderr=is_stderr):
        try:
            return _run(words)
        except KeyboardInterrupt:  # of a command that handles no signals
            return 130
        except SystemExit as exit_:  # --help, a signal, or code of the user's
            if isinstance(exit_.code, int | None):
                return exit_.code or 0
            raise
        except Exception as error:
            if (refusal := _refusal(error)) is None:
                raise
            message, status = refusal
            print(f"error: {message}", file=sys.stderr)
            return status


def _run(words: list[str]) -> int:
    if words == ["--version"]:  # without slow imports
        print(f"cola {__version__}")
        return 0
    if words in (["-h"], ["--help"]):
        print(overview())
        return 0
    first = words[0] if words else ""
    if not first.startswith("-") and first not in SUBCOMMANDS:
        problem = f"there is no subcommand {first!r}{nearest(first, SUBCOMMANDS)}" if words else "add a subcommand"
        raise UserError(f"cola: {problem} ({', '.join(SUBCOMMANDS)}; cola --help describes them)")
    is_lightnings = first.startswith("-") or first in ("fit", "validate", "test", "predict")
    gc.disable()  # else collections go through a million imported objects, which takes a second
    module = importlib.import_module(f"cola_lightning.cli.{'training' if is_lightnings else first}")
    gc.enable()
    return module.train(words) if is_lightnings else getattr(module, first)(words[1:]) or 0


def _refusal(error: BaseException) -> tuple[str, int] | None:
    """The message of an error in one line and the exit status; None for what is reported by its traceback.

    That is what fails in the user's own code, and what neither this package, jsonargparse nor Lightning refuses.
    """
    for cause in causes(error):  # jsonargparse wraps a constructor's exceptions
        if isinstance(cause, UserError | OutsideError):
            return str(cause), 1 if isinstance(cause, OutsideError) else 2
        if isinstance(cause, ModuleNotFoundError) and cause.name in EXTRAS:
            return f"the package {cause.name} is not installed. It comes with pip install '.[{EXTRAS[cause.name]}]'", 2
        if passes_through_own_code(cause):
            return None
    from jsonargparse import ArgumentError

    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) and error.filename is not None:
        return f"cola: cannot use {str(error.filename)!r}: {error.strerror}", 2
    if isinstance(error, ArgumentError):
        return one_line(str(error)) + "".join(getattr(error, "__notes__", [])), 2
    return next(((one_line(str(cause)), 2) for cause in causes(error) if _is_refused_by_lightning(cause)), None)


def _is_refused_by_lightning(error: BaseException) -> bool:
    """Whether Lightning's own code raised an error, for arguments (a val_check_interval above the number of batches, say)."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    lightning = sys.modules.get("lightning")
    if lightning is None or not raised_in.is_relative_to(Path(str(lightning.__file__)).parent):
        return False
    kinds = TypeError | ValueError | RuntimeError | ImportError
    return isinstance(error, kinds) or type(error).__name__ == "MisconfigurationException"
