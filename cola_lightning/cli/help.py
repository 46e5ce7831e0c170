"""``cola --help``, without the slow imports of a fit, and what the commands that are not LightningCLI's have in common."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_lightning.errors import JSONARGPARSE, UserError, nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from cola_lightning.chain.chain import Chain
    from cola_lightning.chain.checkpoint import OpenedCheckpoint
    from cola_lightning.chain.sources import Source
    from cola_lightning.module import COLAModule

WIDTH = 80
SUBCOMMANDS = {
    "fit": "Trains a model with LoRA or a chain of LoRA.",
    "validate": "Evaluates a checkpoint on the validation data.",
    "test": "Evaluates a checkpoint on the test data.",
    "predict": "Writes the predictions for each row to a JSON Lines file.",
    "stages": "Trains stages one after the other, each from the one before.",
    "compare": "Compares LoRA, chains and other methods over rates and seeds.",
    "generate": "Generates text with a checkpoint, for a prompt or in a chat.",
    "inspect": "Shows what each link of a checkpoint or chain did.",
    "configs": "Lists and copies the configs that come with the package.",
    "export": "Writes a plain model, a PEFT adapter or a chain folder.",
    "verify": "Proves or refutes a merge, which any tool may have made.",
}
EXAMPLES = {
    "fit": "cola fit --model.model_name NAME --data.source FILE --chain.name sft",
    "validate": "cola validate --config runs/version_0/config.yaml --ckpt_path runs/version_0",
    "test": "cola test --config runs/version_0/config.yaml --ckpt_path runs/version_0",
    "predict": "cola predict --config runs/version_0/config.yaml --ckpt_path runs/version_0",
    "stages": "cola stages --config stages.yaml --output stages",
    "compare": "cola compare --config FILE --output study --methods '[lora, cola]' -- --trainer.max_steps 100",
    "generate": "cola generate runs/version_0 --chat",
    "inspect": "cola inspect runs/version_0",
    "configs": "cola configs quickstart",
    "export": "cola export runs/version_0 --format merged --output merged",
    "verify": "cola verify merged --base Qwen/Qwen3-0.6B --adapter out/sft out/dpo",
}
SHOWN = ("fit", "generate", "export")  # in `cola --help`
# Of options that several commands have.
LINKS = "Use only the first N links. Type `0` for the base without links, or the name of a stage for the links up to its end. "
LINKS += "By default, all links are used."
SCALE = "Multiply what a stage or a link changes by a factor. Type the stage's name or the link's index: '{dpo: 0.5, 3: 0}'. "
SCALE += "The first link is 0. The factor 0 leaves a link out. Fully trained modules, such as a new head, are not scaled. "
SCALE += "Later links were trained on top of earlier ones, so measure a model without a link in the middle before you use it."
CONTINUES = "These sources are not new adapters: the adapter of the source before went on. Type their names."
BASE = "The model that the first adapter was trained on: a folder, or an id of the Hugging Face hub."
TRUST = "Type `true` to run the Python files that come with the model. Do this only for a model that you trust. Default: false."
DESCRIPTION = "Chain of LoRA: fine-tune a pretrained model by a chain of low-rank updates."


def overview() -> str:
    """What ``cola --help`` prints: every subcommand, at 80 columns."""
    lines = [f"  {name:<10}{text}" for name, text in SUBCOMMANDS.items()]
    end = "`cola SUBCOMMAND --help` lists its options; `cola --version` shows the version."
    examples = ["examples:", *(f"  {EXAMPLES[name]}" for name in SHOWN)]
    return "\n".join(["usage: cola SUBCOMMAND [OPTIONS]", "", DESCRIPTION, "", "subcommands:", *lines, "", *examples, "", end])


def command_parser(command: str, description: str) -> "ArgumentParser":
    """The parser of a command, without options: it raises errors, and accepts no abbreviated options."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"cola {command}",
        description=description,
        epilog=f"example: {EXAMPLES[command]}",
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
    parser.add_argument("--links", type=int | str | None, metavar="N", help=LINKS)
    parser.add_argument("--continues", nargs="+", default=[], metavar="NAME", help=CONTINUES)


def read_sources(sources: "Sequence[str | Source]", options: Any, field: str = "checkpoint") -> "Chain":
    """The chain of a command's sources, as its options ask for it."""
    from cola_lightning.chain.checkpoint import read_chain

    return read_chain(sources, options.links, field, options.continues).scaled(options.get("scale") or {})


def add_checkpoint(parser: "ArgumentParser", kinds: str) -> None:
    """Adds the checkpoint of a command, its first argument, and how many of its links are used.

    Args:
        parser: the command's.
        kinds: what it may be, for ``--help``.
    """
    parser.usage = f"{parser.prog} PATH [OPTIONS]"
    parser.add_argument("checkpoint", type=Path, metavar="PATH", help=kinds)
    parser.add_argument("--links", type=int | str | None, metavar="N", help=LINKS)


def add_scale(parser: "ArgumentParser") -> None:
    """Adds the factors by which a command scales links."""
    parser.add_argument("--scale", type=dict[int | str, float] | None, metavar="FACTORS", help=SCALE)


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
    from cola_lightning.module import COLAModule, find_class

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
