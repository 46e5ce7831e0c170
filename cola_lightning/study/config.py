"""The config that a study's runs share: resolved, overridden by options, and compared with that of earlier runs."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from cola_lightning.callbacks.command import RunWatch
from cola_lightning.cli.training import COLACLI, differences
from cola_lightning.data.splits import files_identity
from cola_lightning.errors import UserError


def resolve_config(words: Sequence[str]) -> dict[str, Any]:
    """The complete configuration of ``cola fit`` with these arguments, including defaults; nothing is instantiated.

    Raises:
        UserError: for arguments that ``cola fit`` would refuse when it parses them; likewise jsonargparse's ArgumentError.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        COLACLI(["fit", *words, "--print_config"], RunWatch())
    config: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return config


def data_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and hashes of the files from which a config's data is read; empty for the hub, and for a data module without."""
    source = config["data"].get("init_args", {}).get("source")
    sources = source if isinstance(source, list) else [source]
    names = [source["source"] if isinstance(source, dict) else source for source in sources]
    files = [files_identity(name) for name in names if isinstance(name, str)]
    return files[0] if len(files) == 1 else {"files": files} if files else {}


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line arguments.

    Example:
        >>> as_words({"model.rank": 4, "chain.at_steps": None})
        ['--model.rank', '4', '--chain.at_steps', 'null']
    """
    values = ((name, value if isinstance(value, str) else json.dumps(value)) for name, value in options.items())
    return [word for name, value in values for word in (f"--{name}", value)]


def check_same(config: Mapping[str, Any], earlier: Mapping[str, Any], where: str) -> None:
    """Refuses a config that differs from that of the finished runs, because the runs would not be comparable.

    Args:
        config: this command's.
        earlier: the config of the finished runs.
        where: its file, for the message.

    Raises:
        UserError: if they differ.
    """
    for name, here, there in differences(config, earlier):
        raise UserError(f"config: {name} is {here!r} here, but {there!r} in {where}. Use another --output for another study")
