"""``cola stages``: trains the stages of a config, one after the other."""

from collections.abc import Sequence

from cola_lightning.cli.help import command_parser, parse_options
from cola_lightning.stages.options import StagesOptions


def stages(words: Sequence[str]) -> int:
    """Runs ``cola stages``.

    Args:
        words: its arguments.

    Returns:
        The exit status: 0, 1 if a stage failed or could not be measured, or 3 if more was forgotten than ``max_forgetting``.

    Raises:
        UserError: for invalid arguments.
    """
    cut = list(words).index("--") if "--" in words else len(words)
    parser = command_parser("stages")
    parser.add_class_arguments(StagesOptions)
    options = StagesOptions(**parse_options(parser, words[:cut]).as_dict())
    from cola_lightning import layout
    from cola_lightning.callbacks.command import RunWatch
    from cola_lightning.stages.stages import Stages

    with RunWatch().listening():
        try:
            return Stages(options, words[cut + 1 :]).run()
        finally:
            layout.leave_processes()
