"""``cola compare``: compares methods on one config."""

from collections.abc import Sequence

from cola_lightning.cli.help import command_parser, parse_options
from cola_lightning.study.comparison import Comparison


def compare(words: Sequence[str]) -> int:
    """Runs ``cola compare``.

    Args:
        words: its arguments.

    Returns:
        The exit status: 0, or 1 if runs failed.

    Raises:
        UserError: for invalid arguments.
    """
    cut = list(words).index("--") if "--" in words else len(words)
    parser = command_parser("compare")
    parser.add_class_arguments(Comparison)
    comparison = Comparison(**parse_options(parser, words[:cut]).as_dict())
    from cola_lightning import layout
    from cola_lightning.callbacks.command import RunWatch
    from cola_lightning.study.study import Study

    with RunWatch().listening():
        try:
            return Study(comparison, words[cut + 1 :]).run()
        finally:
            layout.leave_processes()
