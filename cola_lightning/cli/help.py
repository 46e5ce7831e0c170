"""``cola --help``, without the slow imports of a fit, and what the commands that are not LightningCLI's have in common."""

import argparse
import functools
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cola_lightning.errors import JSONARGPARSE, UserError, nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

    from cola_lightning.chain.chain import Chain
    from cola_lightning.chain.checkpoint import OpenedCheckpoint
    from cola_lightning.chain.sources import Source
    from cola_lightning.module.module import COLAModule

WIDTH = 80
TEXTS = yaml.safe_load(Path(__file__).with_name("help.yaml").read_text(encoding="utf-8"))
SUBCOMMANDS: dict[str, str] = TEXTS["subcommands"]
EXAMPLES: dict[str, str] = TEXTS["examples"]
MAIN_OPTIONS: dict[str, str] = TEXTS["main options"]
ELSEWHERE: dict[str, str] = TEXTS["elsewhere"]  # by the names of options of other tools, what is typed here
# The main options of an evaluation.
EVALUATION = ("config", "ckpt_path", "data.source", "model.model_name", "trainer.devices", "trainer.precision")
OPTIONS: dict[str, str] = TEXTS["options"]  # the help of options that several commands have
DESCRIPTION = "Chain of LoRA: fine-tune a pretrained model by a chain of low-rank updates."


def overview() -> str:
    """What ``cola --help`` prints: every subcommand, at 80 columns."""
    lines = [f"  {name:<10}{text}" for name, text in SUBCOMMANDS.items()]
    end = "`cola SUBCOMMAND --help` lists its options; `cola --version` shows the version."
    return "\n".join(["usage: cola SUBCOMMAND [OPTIONS]", "", DESCRIPTION, "", "subcommands:", *lines, "", end])


def usage(subcommand: str) -> str:
    """The usage of a LightningCLI subcommand: the main options, in place of a line that lists all of the Trainer's."""
    width, is_fit = max(map(len, MAIN_OPTIONS)) + 4, subcommand == "fit"
    lines = list[str]()
    for option, text in MAIN_OPTIONS.items():
        if is_fit or option.split()[0].removeprefix("--") in EVALUATION:
            first = f"  {option}".ljust(width)
            lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * width, break_on_hyphens=False)
    return "\n".join([f"cola {subcommand} [OPTIONS]", "", "example:", f"  {EXAMPLES[subcommand]}", "", "main options:", *lines])


@functools.cache
def help_formatter(*, is_evaluation: bool = False) -> "type[DefaultHelpFormatter]":
    """How ``--help`` is written: without Python types, and with a default only where the text does not name it.

    Args:
        is_evaluation: whether options of a fit are not shown, which are accepted, because a run's configuration has them.
    """
    from jsonargparse import DefaultHelpFormatter

    hidden = TEXTS["of a fit"] if is_evaluation else ()

    class Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        def add_argument(self, action: argparse.Action) -> None:
            if action.dest not in hidden and action.dest.split(".")[0] not in hidden:
                super().add_argument(action)

        # Private, but what a formatter overrides: argparse's ArgumentDefaultsHelpFormatter and jsonargparse's do.
        def _get_help_string(self, action: argparse.Action) -> str:
            if action.dest in TEXTS["here"]:
                return str(TEXTS["here"][action.dest])
            text = re.sub(r"(?::\w+:)?`+(?:~[\w.]+\.)?([^`]+)`+", r"`\1`", action.help or "")  # docstrings' marks for code
            if action.default is not None:  # the text has Lightning's
                text = text.removesuffix("\nDefault: `None`.")
            if action.required:
                return f"{text} (required)"
            if "efault:" in text or isinstance(action.default, dict) or action.default in (None, False, [], argparse.SUPPRESS):
                return text
            return f"{text} (default: %(default)s)"

    return Formatter


def command_parser(command: str) -> "ArgumentParser":
    """The parser of a command, without options: it raises errors, and accepts no abbreviated options."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"cola {command}",
        description=TEXTS["descriptions"].get(command, SUBCOMMANDS[command]),
        epilog=f"example:\n  {EXAMPLES[command]}",
        formatter_class=help_formatter(),
        exit_on_error=False,
        allow_abbrev=False,
    )


def add_sources(parser: "ArgumentParser", name: str, kinds: str, **arguments: Any) -> None:
    """Adds the sources of a command's links, one or several, and which of their links are used.

    Args:
        parser: the command's.
        name: the argument's name.
        kinds: what they may be, for ``--help``.
        **arguments: for ``add_argument``.
    """
    parser.add_argument(name, nargs="+", metavar="PATH", help=kinds, **arguments)
    parser.add_argument("--links", type=int | str | None, metavar="N", help=OPTIONS["links"])
    parser.add_argument("--continues", nargs="+", default=[], metavar="NAME", help=OPTIONS["continues"])


def read_sources(sources: "Sequence[Source]", options: Any, field: str = "checkpoint") -> "Chain":
    """The chain of a command's sources, as its options ask for it."""
    from cola_lightning.chain.checkpoint import read_chain

    return read_chain(sources, options.links, field, options.continues).scaled(options.get("scale") or {})


def add_scale(parser: "ArgumentParser") -> None:
    """Adds the factors by which a command scales links."""
    parser.add_argument("--scale", type=dict[int | str, float] | None, metavar="FACTORS", help=OPTIONS["scale"])


def parse_options(parser: "ArgumentParser", words: Sequence[str]) -> "Namespace":
    """The options in a command's arguments; ``~`` at the start of a path stands for the user's home folder."""
    from jsonargparse import ArgumentError

    try:
        options = parser.parse_args(list(words))
    except ArgumentError as error:
        if unknown := JSONARGPARSE["unknown option"].search(str(error)):
            error.add_note(nearest(unknown[1], parser.get_defaults(skip_validation=True).keys(), "--{}".format))
        raise
    for name, value in vars(options).items():
        if isinstance(value, Path):
            options[name] = Path(os.path.expanduser(value))
    return options


def load_module(opened: "OpenedCheckpoint", options: Any, method: str) -> "COLAModule":
    """The module of a checkpoint, as a command's ``--links``, ``--scale`` and ``--trust_remote_code`` ask for it.

    Args:
        opened: the checkpoint.
        options: the command's.
        method: the module's method that does the same in Python.

    Raises:
        UserError: for a class that cannot be imported, or an argument that is not plain.
    """
    from cola_lightning.hub import quiet
    from cola_lightning.module.arguments import find_class
    from cola_lightning.module.module import COLAModule

    opened.state.all_links(options.links).scaled(options.scale or {})  # refused now, not once the model is loaded

    arguments = opened.state.facts.module
    if arguments.not_plain:
        raise UserError(
            f"checkpoint: {arguments.not_plain[0]!r} of {arguments.class_path} is not a plain value. Load the checkpoint "
            f"in Python, and call {method}() of the module"
        )
    find_class(arguments.class_path)
    more: dict[str, Any] = {"trust_remote_code": True} if options.trust_remote_code else {}  # not every class has it
    with quiet():
        return COLAModule.load_from_checkpoint(opened, links=options.links, scale=options.scale, **more)
