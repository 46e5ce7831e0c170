"""Every option of the command line with its default, as Markdown that ``hooks.py`` appends to ``cli.md``."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from cola_lightning import (
    ChainOfLoRA,
    COLACausalLM,
    COLAImageClassifier,
    COLAPreferenceLM,
    COLASequenceClassifier,
    ImageDataModule,
    LastCheckpoint,
    PreferenceDataModule,
    PromptDataModule,
    TemplateDataModule,
    TextClassificationDataModule,
    TextDataModule,
)
from cola_lightning.cli import main
from cola_lightning.cli.help import ELSEWHERE, TEXTS

CLASSES = {
    "model": [COLACausalLM, COLAPreferenceLM, COLASequenceClassifier, COLAImageClassifier],
    "data": [
        TextDataModule,
        PreferenceDataModule,
        TemplateDataModule,
        TextClassificationDataModule,
        ImageDataModule,
        PromptDataModule,
    ],
    "chain": [ChainOfLoRA],
    "last": [LastCheckpoint],
    "trainer": [Trainer],
}
# What is called otherwise there, and is no option of the command.
IDEAS = """\
| `target_parameters` (experts) | `experts: true` |
| `get_peft_model(model, config)` | `AdaptedModel(build_model, LoRAConfig(...))` |
| `merge_and_unload()`, `save_pretrained(folder)` | `module.merged_model()`, `module.export(folder, "peft")` |
| `PeftModel.from_pretrained(base, "adapter")` | `init_chain: adapter`; it becomes the first link |
| `assistant_only_loss`, `completion_only_loss` | the default |
| `relora: true` | `chain.every_n_train_steps`, `model.kept_optimizer_state: 0.01`, `model.schedule_scope: run` |
| `layers_pattern` | a regular expression as `target_modules` |
| `exclude_modules` | the same name |
| `loraplus_lr_ratio` | `lr_ratio_B: 16` |
| DoRA, PiSSA, LoftQ | not available |
"""
COMMANDS = ["generate", "inspect", "export", "verify", "stages", "compare", "configs"]


def shown(default: Any) -> str:
    """A default as JSON, and a class with its arguments as a call."""
    if isinstance(default, Mapping) and "class_path" in default:
        arguments = ", ".join(f"{name}={value}" for name, value in default.get("init_args", {}).items())
        return f"{default['class_path'].rpartition('.')[2]}({arguments})"
    return json.dumps(default, default=str)


def rows(group: str, cls: type) -> Iterator[str]:
    """A row of the table for each option that a class has as a group."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, group)
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else ""
        if not name.startswith(f"--{group}.") or name.endswith((".help", "+")):
            continue
        default = "required" if action.required else f"`{shown(action.default)}`"
        text = re.sub(
            r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(TEXTS["here"].get(action.dest, action.help or "").split())
        )
        text = text.replace("|", "\\|").replace("``", "`")
        yield f"| `{name}` | {default} | {text} |"


def text_of_help(command: str) -> str:
    """What ``cola COMMAND --help`` prints."""
    out = io.StringIO()
    wide = mock.patch.dict(os.environ, COLUMNS="88")
    with wide, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return out.getvalue().strip()


def markdown() -> str:
    """The section on all options."""
    parts = [
        "## All options",
        "Options of `cola fit`, `validate`, `test` and `predict`, by group and class. (On the command line: `--help`.)",
    ]
    for group, classes in CLASSES.items():
        shown: set[str] = set()
        for cls in classes:
            new = [row for row in rows(group, cls) if row not in shown]
            others = "" if not shown else ", where it differs"
            parts += [
                f"### {group}: {cls.__name__}{others}",
                "\n".join(["| option | default | meaning |", "|---|---|---|", *new]),
            ]
            shown.update(new)
    parts.append("Options of the other commands:")
    for command in COMMANDS:
        parts += [f"### cola {command}", f"```text\n{text_of_help(command)}\n```"]
    names = [
        f"| {', '.join(f'`{name}`' for name in ELSEWHERE if ELSEWHERE[name] == here)} | `{here}` |"
        for here in dict.fromkeys(ELSEWHERE.values())
    ]
    parts += [
        "### Options of other tools",
        "\n".join(["| in peft, Trainer, TRL or axolotl | here |", "|---|---|", *names, IDEAS.strip()]),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(markdown())
