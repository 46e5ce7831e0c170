"""``cola --help``, without the slow imports of a fit, and the parsers of the commands that are not LightningCLI's."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

WIDTH = 80
SUBCOMMANDS = {
    "fit": "Trains a model by a chain of LoRA links, and writes checkpoints and metrics.",
    "validate": "Evaluates a checkpoint on the validation data.",
    "test": "Evaluates a checkpoint on the test data.",
    "predict": "Writes a checkpoint's predictions for each row to a JSONL file.",
    "compare": "Compares LoRA, chains, full fine-tuning and related methods over rates and seeds.",
    "generate": "Prints what a language model generates after a prompt, or chats.",
    "inspect": "Prints statistics of each link of a checkpoint or chain folder.",
    "configs": "Lists the configurations that come with the package, or copies them.",
    "export": "Converts a checkpoint to a plain model, a PEFT adapter or a chain folder.",
}
TITLES = {
    "model": "The model (`--model.help CLASS` lists a class' options)",
    "data": "The data (`--data.help CLASS` lists a class' options)",
    "chain": "The chain: when a link is finished",
    "last": "The file last.ckpt, from which an interrupted fit continues",
    "trainer": "The Trainer, as in Lightning",
}
DESCRIPTION = "Chain of LoRA: fine-tune a pretrained model by a chain of low-rank updates."


def overview() -> str:
    """What ``cola --help`` prints: every subcommand, at 80 columns."""
    indent = max(map(len, SUBCOMMANDS)) + 4
    lines = [
        textwrap.fill(text, WIDTH, initial_indent=f"  {name:<{indent - 2}}", subsequent_indent=" " * indent)
        for name, text in SUBCOMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: cola SUBCOMMAND [OPTIONS]",
            "",
            *(DESCRIPTION, "", "subcommands:", *lines, ""),
            "`cola SUBCOMMAND --help` lists the options of one; `cola --version` prints the",
            "version.",
        ]
    )


def usage(subcommand: str) -> str:
    """The usage line of a LightningCLI subcommand; LightningCLI's own lists every Trainer option."""
    return f"cola {subcommand} [--config FILE ...] [--GROUP.NAME VALUE ...]"


def command_parser(command: str, description: str) -> "ArgumentParser":
    """The parser of a command, without options: it raises errors, and accepts no abbreviated options."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"cola {command}", description=description, exit_on_error=False, allow_abbrev=False)


def parsed(parser: "ArgumentParser", words: Sequence[str]) -> "Namespace":
    """The options in a command's arguments; ``~`` at the start of a path stands for the user's home folder."""
    options = parser.parse_args(list(words))
    for name, value in vars(options).items():
        if isinstance(value, Path):
            options[name] = Path(os.path.expanduser(value))
    return options
