"""``cola --help``, without the slow imports of a fit, and what the commands that are not LightningCLI's have in common."""

import argparse
import functools
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_lightning.errors import JSONARGPARSE, UserError, nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

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
# What most people set; a value in lower case is the default, of the classes that a run has where none is named.
MAIN_OPTIONS = {
    "--config FILE": "Read options from this YAML file. Options after it on the command line override it.",
    "--model.model_name NAME": "Load this pretrained model: a folder, or an id of the Hugging Face hub.",
    "--data.source NAME": "Load rows from this file, folder, or data set of the Hugging Face hub.",
    "--model.rank 8": "Train links of this rank. A larger rank trains more parameters.",
    "--model.alpha 16.0": "Scale each link's update by alpha / rank.",
    "--model.target_modules all-linear": "Add links to all linear layers except the output. Or type a list of layer names.",
    "--model.finished_links auto": "`merge` adds a finished link to the weights, `stack` does not. `auto` merges in float32.",
    "--model.dtype float32": "Load the model in float32, bfloat16 or float16. The last two need half of the memory.",
    "--model.optimizer.lr 0.001": "Train each link with this learning rate.",
    "--model.lr_schedule linear": "Lower the rate in each link (`linear`, `cosine`, `stable`) or keep it (`constant`).",
    "--model.warmup_steps 0.0": "In each link, raise the rate from 0 over this many steps. 0.1 means a tenth of its steps.",
    "--chain.every_n_epochs N": "Begin a new link every N epochs.",
    "--chain.every_n_train_steps N": "Begin a new link every N optimizer steps.",
    "--data.batch_size 8": "Put this many rows into a training batch.",
    "--data.max_length 1024": "Shorten rows with more tokens than this.",
    "--trainer.max_epochs 3": "Train for this many epochs. With --trainer.max_steps N, train for N optimizer steps.",
    "--trainer.precision 32-true": "Compute in this precision, for example `bf16-mixed`.",
    "--trainer.accumulate_grad_batches 1": "Add up the gradients of this many batches for each optimizer step.",
    "--trainer.devices auto": "Use this many GPUs. `auto` uses all.",
    "--ckpt_path RUN": "Load a run: its folder or checkpoint. A fit resumes it. `last` is the newest run with these options.",
}
# What `--help` says of options of Lightning's whose own text is of a Trainer in Python, and not of this command.
HERE = {
    "trainer.max_epochs": "Stop after this many epochs; `-1` sets no limit. Default: 3, if nothing else limits the fit.",
    "trainer.max_steps": "Stop after this many optimizer steps; `-1` sets no limit.",
    "ckpt_path": "Load a run: its folder, or a checkpoint's path or URL. `last` is the newest run in this folder with the same "
    "options of model, data and chain.",
}
# Options of peft, transformers' Trainer, TRL and axolotl, and what is typed here; docs/options.py shows this table on the site.
ELSEWHERE = {
    ("r", "lora_r"): "--model.rank 8",
    ("lora_alpha",): "--model.alpha 16",
    ("lora_dropout",): "--model.dropout 0.05",
    ("lora_target_modules",): "--model.target_modules all-linear",
    ("load_in_4bit", "quantization_config"): "--model.quantization nf4",
    ("model_name_or_path", "base_model"): "--model.model_name NAME",
    ("dataset", "dataset_name", "datasets", "path"): "--data.source NAME",
    ("max_seq_length", "max_seq_len", "sequence_len"): "--data.max_length 1024",
    ("per_device_train_batch_size", "micro_batch_size"): "--data.batch_size 8",
    ("per_device_eval_batch_size",): "--data.eval_batch_size 8",
    ("learning_rate", "lr"): "--model.optimizer.lr 1e-3",
    ("weight_decay",): "--model.optimizer.weight_decay 0",
    ("lr_scheduler_type", "lr_scheduler"): "--model.lr_schedule cosine",
    ("warmup_ratio",): "--model.warmup_steps 0.03",
    ("num_train_epochs", "num_epochs"): "--trainer.max_epochs 3",
    ("gradient_accumulation_steps",): "--trainer.accumulate_grad_batches 4",
    ("max_grad_norm",): "--trainer.gradient_clip_val 1.0",
    ("gradient_checkpointing",): "--model.activation_checkpointing true",
    ("bf16",): "--trainer.precision bf16-mixed",
    ("logging_steps",): "--trainer.log_every_n_steps 10",
    ("report_to",): "--trainer.logger WandbLogger",
    ("output_dir",): "--trainer.default_root_dir FOLDER",
    ("resume_from_checkpoint",): "--ckpt_path last",
}
OPTION_BY_OTHER_NAME = {name: here for names, here in ELSEWHERE.items() for name in names}
EXAMPLES = {
    "fit": "cola fit --model.model_name NAME --data.source FILE --chain.name sft",
    "validate": "cola validate --config runs/version_0/config.yaml --ckpt_path runs/version_0",
    "test": "cola test --config runs/version_0/config.yaml --ckpt_path runs/version_0",
    "predict": "cola predict --config runs/version_0/config.yaml --ckpt_path runs/version_0",
    "stages": "cola stages --config stages.yaml --output stages",
    "compare": "cola compare --config FILE --output study --methods '[lora, cola]' \\\n      -- --trainer.max_steps 100",
    "generate": "cola generate runs/version_0 --chat",
    "inspect": "cola inspect runs/version_0",
    "configs": "cola configs quickstart",
    "export": "cola export runs/version_0 --format merged --output merged",
    "verify": "cola verify merged --base Qwen/Qwen3-0.6B --adapter out/sft out/dpo",
}
SHOWN = ("fit", "generate", "export")  # in `cola --help`
# What `cola test --help` and others show of these options; the options of a fit, and groups of them, that they do not show.
EVALUATION = {"config", "ckpt_path", "data.source", "model.model_name", "trainer.devices", "trainer.precision"}
OF_FIT_IN_TRAINER = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "num_sanity_val_steps", "reload_dataloaders_every_n_epochs", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "detect_anomaly"),
)
OF_FIT = ("chain", "last", "return_predictions", *(f"trainer.{name}" for name in OF_FIT_IN_TRAINER))
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
def help_formatter(hidden: tuple[str, ...] = ()) -> "type[DefaultHelpFormatter]":
    """How ``--help`` is written: without Python types, and with a default only where the text does not name it.

    Args:
        hidden: options, and groups of them, that are accepted, because a run's configuration has them, but not shown.
    """
    from jsonargparse import DefaultHelpFormatter

    class Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        def add_argument(self, action: argparse.Action) -> None:
            if action.dest not in hidden and action.dest.split(".")[0] not in hidden:
                super().add_argument(action)

        # Private, but what a formatter overrides: argparse's ArgumentDefaultsHelpFormatter and jsonargparse's do.
        def _get_help_string(self, action: argparse.Action) -> str:
            if action.dest in HERE:
                return HERE[action.dest]
            text = re.sub(r"(?::\w+:)?`+(?:~[\w.]+\.)?([^`]+)`+", r"`\1`", action.help or "")  # docstrings' marks for code
            if action.default is not None:  # the text has Lightning's
                text = text.removesuffix("\nDefault: `None`.")
            if action.required:
                return f"{text} (required)"
            if "efault:" in text or isinstance(action.default, dict) or action.default in (None, False, [], argparse.SUPPRESS):
                return text
            return f"{text} (default: %(default)s)"

    return Formatter


def command_parser(command: str, description: str) -> "ArgumentParser":
    """The parser of a command, without options: it raises errors, and accepts no abbreviated options."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"cola {command}",
        description=description,
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
