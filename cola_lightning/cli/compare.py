"""``cola compare``: compares methods on one config."""

from collections.abc import Sequence

from cola_lightning.cli.entry import refusal
from cola_lightning.cli.help import command_parser, parse_options
from cola_lightning.study.comparison import Comparison

DESCRIPTION = """\
Compares methods on one config, with the same number of optimizer steps.
The same command continues a study that was stopped, and several processes that
run it share the work. Options after `--` are those of `cola fit`, for each run."""


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
        from cola_lightning.runs.child import send
        from cola_lightning.study.run import run

        try:
            return run(words[1])
        except Exception as error:
            if (refused := refusal(error)) is not None:
                send(refused[0])
            raise
    cut = list(words).index("--") if "--" in words else len(words)
    parser = command_parser("compare", DESCRIPTION)
    parser.add_class_arguments(Comparison)
    comparison = Comparison(**parse_options(parser, words[:cut]).as_dict())
    from cola_lightning.callbacks.command import RunWatch
    from cola_lightning.study.study import Study

    with RunWatch().listening():
        return Study(comparison, words[cut + 1 :]).run()
