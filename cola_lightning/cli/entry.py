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
from collections.abc import Sequence

from cola_lightning.cli.help import SUBCOMMANDS, overview
from cola_lightning.console import log_on_console
from cola_lightning.errors import UserError, nearest, refusal


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
            if (refused := refusal(error)) is None:
                raise
            message, status = refused
            print(f"error: {message}", file=sys.stderr)
            return status


def _run(words: list[str]) -> int:
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
