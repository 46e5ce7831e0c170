"""``cola compare``: its options."""

import contextlib
import importlib.util
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from cola_lightning.cli.help import command_parser, parsed
from cola_lightning.errors import UserError
from cola_lightning.study.comparison import Comparison

DESCRIPTION = (
    "Compares methods on one config, at equal numbers of optimizer steps. Finished runs are not repeated: the same command "
    "continues a study that was stopped, and several processes with the same command share the runs. Options after `--` are "
    "options of `cola fit` for every run: `cola compare --config configs/digits.yaml ... -- --model.rank 2`."
)


def compare(words: Sequence[str]) -> int:
    """Runs ``cola compare``.

    Args:
        words: its arguments.

    Returns:
        The exit status: 0, or 1 if runs failed.

    Raises:
        UserError: for invalid arguments.
    """
    if words and words[0] == "--run":  # the process of one run
        from cola_lightning.study.run import main

        return main(words[1])
    cut = list(words).index("--") if "--" in words else len(words)
    parser = command_parser("compare", DESCRIPTION)
    parser.add_class_arguments(Comparison)
    asked = Comparison(**parsed(parser, words[:cut]).as_dict())
    if missing := [name for name in ("optuna", "scipy") if importlib.util.find_spec(name) is None]:
        raise UserError(f"cola compare: expected {' and '.join(missing)}, received none: pip install {' '.join(missing)}")
    from cola_lightning.study.storage import answering
    from cola_lightning.study.study import Study

    with _stopping_on_sigterm(), answering():
        return Study(asked, words[cut + 1 :]).run()


@contextlib.contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM end the study as Ctrl-C does, with the right exit status."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
